"""Nothing is fetched that was not asked for: no address is looked up and nothing is connected to, whatever is read."""

import socket
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import ertacache
from conftest import ROOT
from ertacache import Plan, UserError
from ertacache.cli import folder_command
from ertacache.cli import main as command
from ertacache.cli.request import Request
from ertacache.demos.model_folder import load_model_folder
from ertacache.evaluation.metrics import FETCH, Clip, Lpips
from ertacache.pipelines.load import load_pipeline
from ertacache.plans.plan_set import PlanSet
from helpers import counted, flux_plan, flux_planned, shipped_plans
from tiny_pipelines import flux as tiny_flux

DEMO = str(ROOT / "ERTACache4FLUX" / "demo")
FUNCTIONS = {socket: ("getaddrinfo", "gethostbyname", "create_connection")}
FUNCTIONS[socket.socket] = ("connect", "connect_ex", "sendto")
MISTYPED = ["gone", "./gone", "gone/", "/gone/x", "~/gone", "a/b/c", "gone.json", "a/b.json", "hf:/a/b", ""]


@pytest.fixture(autouse=True)
def reached(monkeypatch):
    """What was reached for, which fails; at the end it must be nothing."""
    tried = []

    def refusing(name):
        def refuse(*arguments, **_):
            tried.append((name, arguments))
            raise OSError(f"{name}: no network here")

        return refuse

    for place, names in FUNCTIONS.items():
        for name in names:
            monkeypatch.setattr(place, name, refusing(name))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield tried
    assert tried == []


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["ertacache", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code in (0, None)


def test_a_hub_id_is_looked_up_where_it_was_asked_for(reached):
    with pytest.raises(UserError):
        PlanSet.from_pretrained("hf://owner/name")
    assert reached
    reached.clear()


@pytest.mark.slow
def test_imports():
    guard = f"""
import importlib, pkgutil, socket
def refuse(*_, **__): raise SystemExit("reached for the network")
for name in {FUNCTIONS[socket]}: setattr(socket, name, refuse)
for name in {FUNCTIONS[socket.socket]}: setattr(socket.socket, name, refuse)
import ertacache
for module in pkgutil.walk_packages(ertacache.__path__, "ertacache."):
    if module.name not in ("ertacache.__main__", "ertacache.comfyui.nodes"):
        importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", guard], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_demo_follows_a_shipped_plan(tmp_path):
    flux = load_model_folder(ROOT / "ERTACache4FLUX")
    plans = shipped_plans(flux)
    name = min((name for name, plan in plans.items() if plan.kind == "budget"), key=lambda name: plans[name].nfe)
    path = flux.FOLDER / "cache" / name
    folder_command.main(flux, ["--prompt", "a red apple", "--plan", str(path), "--out", str(tmp_path)])
    assert {file.suffix for file in tmp_path.iterdir()} == {".png", ".json"}


def test_plans_in_a_pipeline(tmp_path):
    tiny, wanted = tiny_flux(), flux_planned()
    flux_plan().save_pretrained(tmp_path)  # with its model card
    assert Plan.from_pretrained(tmp_path) == flux_plan()
    for source in (tmp_path, str(tmp_path / "plan.json")):
        ertacache.enable(tiny.pipe, source)
        latents, calls = counted(tiny)
        assert torch.equal(latents, wanted) and calls == 4
        ertacache.disable(tiny.pipe)


@pytest.mark.slow
def test_commands_on_a_model_in_a_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    prompts = [word for prompt in ("a rocket", "a fruit", "a house", "a red apple") for word in ("--prompt", prompt)]
    call = ["--steps", 4, "--height", 64, "--width", 64, "--set", "max_sequence_length=16", "--batch-size", 4]
    run(monkeypatch, "calibrate", DEMO, *prompts, *call, "--speedups", 2, "--effort", "quick", "--out", "plans")
    run(monkeypatch, "inspect", "plans/demo-2-of-4.json")
    run(monkeypatch, "generate", DEMO, *prompts[:2], *call, "--plan", "plans/demo-2-of-4.json", "--compare")
    run(monkeypatch, "evaluate", DEMO, *prompts[:4], *call, "--plan", "plans/demo-2-of-4.json", "--repeats", 1)


@pytest.mark.parametrize("name", MISTYPED)
def test_a_mistyped_path_is_one_line(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "serve"))
    from server_parts.model import Model

    readers = [
        lambda: ertacache.enable(tiny_flux().pipe, name),
        lambda: Plan.load(name),
        lambda: Plan.from_pretrained(name),
        lambda: Request(name, ["a rocket"], 1, {}).pipeline,
        lambda: Clip(name),
        lambda: Model(name, [2], {}),
        lambda: load_pipeline(type(tiny_flux().pipe), name, "cpu", torch.float32),
    ]
    for reader in readers:
        with pytest.raises(UserError) as caught:
            reader()
        assert "\n" not in str(caught.value) and ": " in str(caught.value)


def test_a_plan_with_the_form_of_a_hub_id_is_a_path():
    for read in (lambda: ertacache.enable(tiny_flux().pipe, "a/b"), lambda: Plan.load("a/b")):
        with pytest.raises(UserError, match="check the path"):
            read()


@pytest.mark.parametrize("there", [False, True])
def test_weights_of_lpips_are_not_fetched(monkeypatch, tmp_path, there):
    made = []
    lpips, torchvision, models = (ModuleType(name) for name in ("lpips", "torchvision", "torchvision.models"))
    lpips.LPIPS = lambda **options: made.append(options) or "network"
    url = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    models.AlexNet_Weights = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=url))
    for module in (lpips, torchvision, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    weights = tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth"
    if there:
        weights.touch()
        assert Lpips().network == "network" and len(made) == 1
    else:
        assert Lpips().problem == f"LPIPS is not computed (no file {weights}): fetch it, {FETCH}" and not made
