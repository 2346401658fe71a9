"""Plans in folders and on the Hub, which is a folder here. The card says what the plan says, and its snippet runs."""

import inspect
import json
import re
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, ModelHubMixin, errors

import ertacache
from conftest import ROOT
from ertacache import BudgetPlan, Plan, PlanError, ThresholdPlan
from ertacache.evaluation.report import card_table
from ertacache.evaluation.rows import REMEDY
from ertacache.plans import card
from helpers import refused, row
from tiny_pipelines import flux_img2img

LAYOUT = {"README.md", "plan.json", "plan.safetensors", "schedule.png"}
SHIPPED = {
    "budget": "ERTACache4FLUX/cache/demo-30-budget-15.json",
    "exact": "ERTACache4FLUX/cache/demo-30-budget-10-exact.json",
    "threshold": "ERTACache4FLUX/cache/demo-30-0.09.json",
    "blocks": "ERTACache4FLUX/cache/demo-30-0.1-blocks.json",
    "opensora": "ERTACache4OpenSora1.2/cache/demo-30-budget-6.json",
}


def shipped(kind) -> Plan:
    return Plan.load(ROOT / SHIPPED[kind])


def named(plan: Plan, model: str) -> Plan:
    return replace(plan, provenance={**plan.provenance, "model": model})


class FakeHub:
    """Repositories as folders, ROOT/OWNER/NAME/BRANCH; what was asked for, in order."""

    def __init__(self, root: Path):
        self.root, self.calls, self.failure = root, [], None

    def create_repo(self, api, **asked):
        self.record(api, asked)
        name = asked["repo_id"] if "/" in asked["repo_id"] else f"someone/{asked['repo_id']}"
        (self.root / name).mkdir(parents=True, exist_ok=asked["exist_ok"])
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, api, **asked):
        self.record(api, asked)
        branch = self.root / asked["repo_id"] / (asked["revision"] or "main")
        shutil.copytree(asked["folder_path"], branch, dirs_exist_ok=True)
        return f"https://hub/{asked['repo_id']}/commit/1"

    def snapshot_download(self, repo_id, **asked):
        self.record(SimpleNamespace(token=asked.get("token")), {"repo_id": repo_id, **asked})
        cache, branch = self.root / "cache" / repo_id, self.root / repo_id / (asked["revision"] or "main")
        if not branch.is_dir():
            raise failure(errors.RepositoryNotFoundError)
        shutil.copytree(branch, cache, dirs_exist_ok=True)
        for path in cache.iterdir():
            if not any(fnmatch(path.name, pattern) for pattern in asked["allow_patterns"]):
                path.unlink()
        return str(cache)

    def record(self, api, asked):
        self.calls.append({**asked, "token": api.token})
        if self.failure:
            raise self.failure


def failure(kind, message="the hub's own long story\n\nin many lines"):
    if issubclass(kind, errors.HfHubHTTPError):
        return kind(message, response=SimpleNamespace(headers={}, request=None))
    return kind(message)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    for name in ("create_repo", "upload_folder"):
        method = getattr(fake, name)
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda api, method=method, **asked: method(api, **asked))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


# --- round trips ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHIPPED)
def test_a_plan_comes_back_from_a_folder_and_the_hub_bit_for_bit(kind, hub, tmp_path):
    plan, folder = shipped(kind), tmp_path / "plans" / kind
    saved = plan.save(tmp_path / "saved" / "plan.json")
    assert plan.save_pretrained(folder) is None and {path.name for path in folder.iterdir()} == LAYOUT
    assert plan.push_to_hub(f"someone/{kind}") == f"https://hub/someone/{kind}/commit/1"
    pushed = hub.root / "someone" / kind / "main"
    assert {path.name for path in pushed.iterdir()} == LAYOUT
    for copy in (folder, pushed):
        for name in ("plan.json", "plan.safetensors"):  # the checksum over both is in the first
            assert (copy / name).read_bytes() == saved.with_name(name).read_bytes()
    for source in (folder, str(folder), f"someone/{kind}"):
        assert Plan.from_pretrained(source) == type(plan).from_pretrained(source) == plan


def test_a_pipeline_follows_a_folder_and_a_repository(hub, tmp_path, demo):
    plan = shipped("budget")
    plan.save_pretrained(tmp_path / "flux-2x")
    plan.push_to_hub("flux-2x", private=True)
    try:
        for source in (tmp_path / "flux-2x", str(tmp_path / "flux-2x"), "hf://someone/flux-2x"):
            ertacache.disable(demo)
            ertacache.enable(demo, source)
            assert demo.scheduler.plan == plan
    finally:
        ertacache.disable(demo)


def test_it_takes_what_the_mixin_takes():
    for name in ("save_pretrained", "from_pretrained", "push_to_hub"):
        ours, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (Plan, ModelHubMixin))
        common = theirs.keys() - {"config", "model_card_kwargs", "model_kwargs"}
        assert common <= ours.keys() and all(ours[key].kind == theirs[key].kind for key in common)
        others = {key for key in common if ours[key].default != theirs[key].default}
        assert others <= {"commit_message"}


def test_the_arguments_reach_the_hub(hub):
    plan = shipped("budget")
    patterns = {"allow_patterns": "*", "ignore_patterns": ["*.tmp"], "delete_patterns": ["old/*"]}
    options = {"create_pr": True, "commit_message": "Half the calls"}
    plan.push_to_hub("flux-2x", private=True, token="hf_a", branch="two", **options, **patterns)
    made, uploaded = hub.calls
    assert made == {"repo_id": "flux-2x", "private": True, "exist_ok": True, "token": "hf_a"}
    assert uploaded.pop("folder_path")
    expected = {"repo_id": "someone/flux-2x", "revision": "two", "token": "hf_a", **options, **patterns}
    assert uploaded == expected
    reading = {"revision": "two", "token": "hf_b", "cache_dir": "c", "local_files_only": True, "force_download": True}
    assert Plan.from_pretrained("someone/flux-2x", **reading) == plan
    asked = hub.calls[-1]
    assert {name: asked[name] for name in reading} == reading
    assert set(asked["allow_patterns"]) == {
        *("plan.json", "plan.safetensors", "plan-*.json", "plan-*.safetensors"),
    }


def test_saving_can_push(hub, tmp_path):
    plan = shipped("threshold")
    address = plan.save_pretrained(tmp_path / "lambda", push_to_hub=True, private=True, license="mit")
    assert address == "https://hub/someone/lambda/commit/1" and hub.calls[0]["private"]
    assert Plan.from_pretrained("someone/lambda") == Plan.from_pretrained(tmp_path / "lambda") == plan
    plan.save_pretrained(tmp_path / "lambda", repo_id="other/name", push_to_hub=True)
    for folder in (tmp_path / "lambda", hub.root / "other/name/main"):
        assert 'enable(pipe, "hf://other/name")' in (folder / "README.md").read_text()
    with refused("private, token", "push_to_hub=True"):
        plan.save_pretrained(tmp_path / "again", private=True, token="hf_a")
    assert not (tmp_path / "again").exists()


def test_the_script_of_the_docs(hub, tmp_path, monkeypatch, demo):
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(json.dumps([row("FLUX", "budget (H = 3)", "budget", 2, 2.0, 70.25)]))
    given = {"plans": {2: shipped("budget")}, "pipe": demo, "ertacache": ertacache, "BudgetPlan": BudgetPlan}
    try:
        exec(snippet((ROOT / "common/docs/guide/sharing.md").read_text()), given)
        assert demo.scheduler.plan == given["plan"] == shipped("budget")
    finally:
        ertacache.disable(demo)
    assert {path.name for path in (hub.root / "OWNER/flux-2x/main").iterdir()} == LAYOUT


# --- folders are whole -------------------------------------------------------------------------------------------


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    old, new = shipped("budget"), shipped("exact")
    old.save_pretrained(tmp_path / "old")

    def full_disk(image):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(card, "png", full_disk)
    for name in ("old", "new"):
        with refused(tmp_path / name, "No space left", "another folder"):
            new.save_pretrained(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path.name for path in (tmp_path / "old").iterdir()} == LAYOUT
    monkeypatch.undo()
    assert Plan.from_pretrained(tmp_path / "old") == old
    new.save_pretrained(tmp_path / "old")
    assert Plan.from_pretrained(tmp_path / "old") == new
    assert "10 of 30" in (tmp_path / "old" / "README.md").read_text()


def test_a_readme_of_something_else_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    with refused(tmp_path / "README.md", "another folder"):
        shipped("budget").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    (tmp_path / "file").write_text("")
    with refused(tmp_path / "file", "another folder"):
        shipped("budget").save_pretrained(tmp_path / "file")


# --- the card ----------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_plan_says():
    plan = named(shipped("budget"), "black-forest-labs/FLUX.1-dev")
    made = plan.generate_model_card(repo_id="someone/flux-2x", license="apache-2.0")
    data, calibration = ModelCard(str(made)).data, plan.provenance["calibration"]
    assert data.library_name == "ertacache" and data.license == "apache-2.0"
    assert data.base_model == "black-forest-labs/FLUX.1-dev" and {"diffusers", "budget-plan"} <= set(data.tags)
    for part in (
        "# 15 of 30 steps: a budget plan for black-forest-labs/FLUX.1-dev",
        "**15 of 30 model calls, a speed-up of 2.00× in calls**",
        "FluxTransformer2DModel of `black-forest-labs/FLUX.1-dev` with FlowMatchEulerDiscreteScheduler",
        f"Computed steps: {', '.join(map(str, shipped('budget').computed))}.",
        "](schedule.png)",
        'ertacache.enable(pipe, "hf://someone/flux-2x")',
        "Geometric mean over prompts of the mean squared error of the final latents to the uncached run:",
        f"| calibration | 24 | {plan.predicted_error:.3g} |",
        f"| held out of the fit | 8 | {plan.held_out_error:.3g} |",
        "| weights, fingerprint | 55f71aec7ec7efcf |",
        "| seeds | 0 to 31 |",
        "| date | 2026-11-26 |",
        "torch 2.13.0+cpu",
        "guidance 3.5, height 64",
        f"chose **{calibration['chosen']}**",
        f"| {calibration['chosen']} | {calibration['errors'][calibration['chosen']]:.3g} |",
    ):
        assert part in made.text, part


def test_the_cards_of_the_other_kinds():
    plan = shipped("exact")
    exact = str(plan.generate_model_card(repo_id="a/b"))
    assert f"plan's own grid of 60 intervals: {', '.join(map(str, plan.computed))}." in exact
    assert "final latents to the exact solution" in exact and "license" not in exact and "base_model" not in exact
    plan = shipped("threshold")
    text = str(plan.generate_model_card(repo_id="a/b"))
    assert (
        f"λ = 0.09, cached at site `output`; skipped steps: {', '.join(map(str, plan.cached))}." in text
        and "threshold-plan" in text
    )
    error = plan.provenance["calibration"]["errors"]["policy + rectification"]
    assert f"| calibration | 32 | {error:.3g} |" in text and "| held out of the fit | 0 | – |" in text
    bare = replace(plan, provenance={})
    text = str(bare.generate_model_card(repo_id="a/b"))
    assert "| calibration | – | – |" in text and "The plan does not say." in text


def test_a_folder_of_models_is_no_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = named(shipped("budget"), "models/flux")
    assert plan.generate_model_card(repo_id="a/b").data.base_model == "models/flux"
    (tmp_path / "models" / "flux").mkdir(parents=True)
    assert plan.generate_model_card(repo_id="a/b").data.base_model is None


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def snippet(text: str) -> str:
    return re.search(r"```\w+\n(.*?)\n```", text, re.S)[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind, computed", [("budget", 15), slow("exact", 10), slow("opensora", 6)])
def test_the_snippet_of_the_card_runs(kind, computed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").symlink_to((ROOT / SHIPPED[kind]).parents[1] / "demo")
    shipped(kind).save_pretrained(f"my-{kind}")
    code = snippet(Path(f"my-{kind}/README.md").read_text())
    done = {}
    exec(code, done)
    assert f"{computed} steps computed, {30 - computed} skipped" in capsys.readouterr().out
    result = done["result"]
    assert len(result.images if hasattr(result, "images") else result.frames) == 1


def test_the_snippet_of_a_plan_around_the_blocks(flux, tmp_path):
    plan = shipped("blocks")
    plan.save_pretrained(tmp_path / "plan")
    code = snippet((tmp_path / "plan" / "README.md").read_text())
    compile(code, "snippet", "exec")
    assert "ertacache.enable(pipe, " in code and "num_inference_steps=30" in code
    assert "max_sequence_length=16" in code  # the folder's own; the stock pipeline's is 512


def test_the_snippet_of_a_pipelines_own_call():
    """Images are the reader's; a model that has no name is too."""
    tiny, plan = flux_img2img(), shipped("budget")
    settings = {
        "pipeline": "FluxImg2ImgPipeline",
        "image": "Image 0123456789abcdef",
        "strength": 0.75,
        "dtype": "bfloat16",
    }
    settings["negative_prompt"] = 'a "blurry" image'
    plan = named(replace(plan, requirements=replace(plan.requirements, settings=settings)), type(tiny.pipe).__name__)
    code = snippet(str(plan.generate_model_card(repo_id="a/b")))
    compile(code, "snippet", "exec")
    assert "from diffusers import FluxImg2ImgPipeline" in code and "image = ..." in code
    assert 'FluxImg2ImgPipeline.from_pretrained("path/to/the/model", dtype=torch.bfloat16)' in code
    call = re.search(r'pipe\("a prompt", (.*)\)', code)[1]
    given = eval(f"dict({call})", {"image": 1})
    assert given == {"num_inference_steps": 30, "image": 1, "strength": 0.75, "negative_prompt": 'a "blurry" image'}
    assert given.keys() <= inspect.signature(type(tiny.pipe).__call__).parameters.keys()


def test_measured_rows(tmp_path, hub):
    rows = [row("FLUX", "none", "none", None, 1.0, None), row("FLUX", "budget (H = 3)", "budget", 2, 2.0, 70.25)]
    rows.append(row("FLUX", "tea|cache (δ = 0.1)", "peer", 2, 2.1, 50.0, speedup_latency=None))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    plan = shipped("budget")
    text = str(plan.generate_model_card(repo_id="a/b", results=card_table(rows)))
    assert text == str(plan.generate_model_card(repo_id="a/b", results=card_table(path)))
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert lines["| method"].startswith(
        "| method | NFE | FLOPs speed-up | latency speed-up | end-to-end speed-up | PSNR"
    )
    assert "LPIPS" not in lines["| method"]  # measured in no row
    assert (
        "| 6 | 2.00× | **1.80×** | 1.60× | **70.25** |" in lines["| budget (H = 3)"]
    )  # the other cache saves more FLOPs
    assert r"tea\|cache" in text and " | – | " in lines[r"| tea\|cache (δ = 0.1)"]
    assert "machine toy machine, date 2026-01-02" in text and "prompts 2" in text
    plan.push_to_hub("someone/measured", results=card_table(path))
    assert "70.25" in (hub.root / "someone/measured/main/README.md").read_text()
    (tmp_path / "none.json").write_text("[]")
    del rows[1]["psnr"]
    for bad, words in (
        (rows, ("row 2", "'psnr'")),
        (tmp_path / "none.json", (tmp_path / "none.json",)),
        (tmp_path / "no.json", (tmp_path / "no.json",)),
    ):
        with refused(*words, REMEDY):
            card_table(bad)


@pytest.mark.parametrize("kind", SHIPPED)
def test_the_image_of_the_schedule(kind):
    """Filled cells are the computed steps, at every width of a cell."""
    plan = shipped(kind)
    image = card.schedule_image(plan).convert("RGB")
    count = len(plan.sigmas or plan.native_sigmas) - 1
    cell = min(56, 1400 // count)
    left = (image.width - cell * count) // 2
    filled = [image.getpixel((left + i * cell + cell // 2, 148)) == (0x25, 0x63, 0xEB) for i in range(count)]
    assert tuple(i for i in range(count) if filled[i]) == plan.computed and sum(filled) == plan.nfe


# --- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, remedy",
    [
        (errors.RepositoryNotFoundError, ("private", "hf auth login", "token")),
        (errors.GatedRepoError, ("gated", "hf auth login")),
        (errors.LocalTokenNotFoundError, ("not logged in", "hf auth login")),
        (errors.RevisionNotFoundError, ("revision", "check the name")),
        (errors.LocalEntryNotFoundError, ("cache", "check the network")),
        (errors.HFValidationError, ("not a Hub id", "OWNER/NAME")),
        (errors.HfHubHTTPError, ("the hub's own long story in many lines", "check the id")),
    ],
)
def test_errors_of_the_hub_are_one_line(kind, remedy, hub, demo):
    hub.failure = failure(kind)
    for attempt in (
        lambda: Plan.from_pretrained("a/b"),
        lambda: ertacache.enable(demo, "hf://a/b"),
        lambda: shipped("budget").push_to_hub("a/b"),
    ):
        with refused("a/b", *remedy):
            attempt()


def test_what_is_no_plan(hub, tmp_path):
    budget, threshold = shipped("budget"), shipped("threshold")
    budget.save_pretrained(tmp_path / "budget")
    threshold.push_to_hub("someone/threshold")
    with refused(tmp_path / "budget", "a threshold plan is needed", error=PlanError):
        ThresholdPlan.from_pretrained(tmp_path / "budget")
    with refused("someone/threshold", "a budget plan is needed", error=PlanError):
        BudgetPlan.from_pretrained("someone/threshold")
    (hub.root / "someone/threshold/main/plan.safetensors").unlink()
    shutil.rmtree(hub.root / "cache")
    with refused("someone/threshold", "plan.safetensors", "check the id"):
        Plan.from_pretrained("someone/threshold")
    with refused(tmp_path / "budget" / "plan.json", "BudgetPlan.load"):
        BudgetPlan.from_pretrained(tmp_path / "budget" / "plan.json")
    for wrong in ("no plan", "../none", "plan", tmp_path / "none", "a/plan.json"):
        with refused(wrong, "OWNER/NAME"):
            Plan.from_pretrained(wrong)
    (tmp_path / "empty").mkdir()
    with refused(tmp_path / "empty" / "plan.json", "calibrate one", error=PlanError):
        Plan.from_pretrained(tmp_path / "empty")


def test_the_real_cache_without_a_network(tmp_path):
    """huggingface_hub's own code, on its cache's layout: a plan that was downloaded before, and one that was not."""
    plan, commit = shipped("budget"), "0" * 40
    repo = tmp_path / "models--someone--flux-2x"
    plan.save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    offline = {"cache_dir": tmp_path, "local_files_only": True}
    assert BudgetPlan.from_pretrained("someone/flux-2x", **offline) == plan
    assert BudgetPlan.from_pretrained("someone/flux-2x", revision=commit, **offline) == plan
    for name, options in (("someone/flux-3x", offline), ("someone/flux-2x", {**offline, "revision": "v2"})):
        with refused(name, "cache", "check the network"):
            Plan.from_pretrained(name, **options)
    with refused("a--b/c", "OWNER/NAME"):
        Plan.from_pretrained("a--b/c", **offline)
