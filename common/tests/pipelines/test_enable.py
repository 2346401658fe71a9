"""Plans in stock diffusers pipelines: exact where they must be, exactly N model calls, and nothing left behind."""

import copy
import subprocess
import sys
import warnings
from dataclasses import replace
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

import ertacache
from conftest import ROOT
from ertacache import PlanError, Requirements
from ertacache.numerics.schedulers import solver_of
from ertacache.pipelines.enable import originals
from ertacache.utils.provenance import fingerprint
from helpers import (
    HALF,
    CallCounter,
    budget_plan,
    calibrate,
    fast,
    no_warning,
    refused,
    shipped_plan,
    threshold_plan,
    with_prompts,
)
from tiny_pipelines import (
    BUILDERS,
    STEPS,
    cogvideox,
    flux,
    ltx,
    qwenimage,
    sana,
    sd3,
    wan,
    wan_two_models,
)


@pytest.fixture(params=fast(BUILDERS, "flux", "flux_img2img", "wan", "cogvideox"))
def tiny(request):
    return BUILDERS[request.param]()


# --- every pipeline ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["budget", "threshold"])
def test_all_steps_computed_is_the_plain_run(tiny, kind):
    plain = tiny.run()
    ertacache.enable(tiny.pipe, budget_plan(tiny, range(STEPS)) if kind == "budget" else threshold_plan(tiny, ()))
    assert torch.equal(tiny.run(), plain)


@pytest.mark.parametrize("kind", ["budget", "threshold"])
def test_at_half_the_steps_it_makes_half_the_calls(tiny, kind):
    plan = budget_plan(tiny, HALF) if kind == "budget" else threshold_plan(tiny, (2, 4, 5, 6))
    plain, own = tiny.run(), tiny.pipe.scheduler
    ertacache.enable(tiny.pipe, plan)
    begin = 2 if "strength" in tiny.arguments else 0  # 0.75 of 8 steps
    computed = {begin, *(step for step in plan.computed if step > begin)}
    with CallCounter(tiny.pipe.transformer) as calls:
        planned = tiny.run()
    assert calls.count == len(computed) * tiny.branches
    assert planned.isfinite().all() and not torch.equal(planned, plain)
    summary = ertacache.summary(tiny.pipe)
    assert (summary.computed, summary.computed + summary.skipped) == (len(computed), STEPS - begin)
    ertacache.disable(tiny.pipe)
    assert tiny.pipe.scheduler is own and torch.equal(tiny.run(), plain)


def test_ddim_of_diffusers():
    tiny = cogvideox()
    tiny.pipe.scheduler = DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    plain = tiny.run()
    for plan in (budget_plan(tiny, range(STEPS)), threshold_plan(tiny, ())):
        ertacache.enable(tiny.pipe, plan)
        assert torch.equal(tiny.run(), plain)
        ertacache.disable(tiny.pipe)


# --- plans of the model folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["output", "blocks", "reference", "exact"])
def test_the_shipped_plans_run_in_the_stock_pipeline_as_in_the_folders_loop(model_folder, kind):
    """Bit for bit in float32: the jumps and steps are the same arithmetic."""
    sampler, pipe, prompts, seeds = model_folder.sampler, model_folder.pipe, model_folder.prompts[:1], [3]
    plan = shipped_plan(sampler, kind)
    in_loop = sampler.denoise(pipe, sampler.prepare(pipe, prompts, seeds, steps=plan.steps), plan)
    ertacache.enable(pipe, plan)
    try:
        enabled, summary = model_folder.stock(pipe, prompts, seeds, plan.steps), ertacache.summary(pipe)
    finally:
        ertacache.disable(pipe)
    assert torch.equal(enabled, in_loop)
    assert (summary.computed, summary.skipped) == (plan.nfe, plan.steps - plan.nfe)


# --- what cannot confuse it --------------------------------------------------------------------------------------


@pytest.fixture
def planned():
    tiny = wan()
    ertacache.enable(
        tiny.pipe, threshold_plan(tiny, (2, 4, 5), phi_definition="velocity", phi=(1, 1, 0.5, 1, 1, 1, 1, 1))
    )
    return tiny


def test_an_interrupted_run_leaves_nothing_behind(planned):
    first = planned.run()

    def stop(pipe, i, t, tensors):
        if i == 1:
            raise KeyboardInterrupt
        return tensors

    def skip_the_rest(pipe, i, t, tensors):
        pipe._interrupt = i == 1
        return tensors

    with pytest.raises(KeyboardInterrupt):
        planned.run(callback_on_step_end=stop)
    assert torch.equal(planned.run(), first)
    planned.run(callback_on_step_end=skip_the_rest)
    assert ertacache.summary(planned.pipe).computed == 2 and torch.equal(planned.run(), first)


def test_another_number_of_steps_is_refused_before_a_call_and_forgotten(planned):
    first = planned.run()
    remedies = "num_inference_steps=8", "ertacache.calibrate(pipe, prompts, num_inference_steps=5)"
    with CallCounter(planned.pipe.transformer) as calls, refused("8 steps", "has 5", *remedies, error=PlanError):
        planned.run(steps=5)
    assert calls.count == 0 and torch.equal(planned.run(), first)


def test_two_pipelines_in_threads(planned):
    other = flux()
    ertacache.enable(other.pipe, budget_plan(other, HALF))
    alone = [planned.run(), other.run()]
    found = {}
    threads = [Thread(target=lambda t=t: found.update({id(t): t.run()})) for t in (planned, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[id(planned)], alone[0]) and torch.equal(found[id(other)], alone[1])


def test_several_images_of_a_prompt():
    tiny = flux()
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = tiny.run(num_images_per_prompt=2, generator=seeds)
    for row, seed in enumerate((0, 1)):
        assert torch.allclose(both[row], tiny.run(seed=seed)[0], atol=1e-5)


def test_enabling_again_replaces_the_plan_and_a_refused_plan_does_not(planned):
    own = originals(planned.pipe)["scheduler"]
    plan = planned.pipe.scheduler.plan
    wrong = replace(plan, requirements=replace(plan.requirements, model={**plan.requirements.model, "num_layers": 7}))
    other = replace(plan, requirements=replace(plan.requirements, scheduler={"class": "EulerDiscreteScheduler"}))
    for bad, values in ((wrong, "num_layers 7 ≠ 1"), (other, "EulerDiscreteScheduler ≠ UniPC")):
        with refused(values, "ertacache.calibrate(", error=PlanError):
            ertacache.enable(planned.pipe, bad)
        assert planned.pipe.scheduler.plan is plan
    ertacache.enable(planned.pipe, replace(plan, cached=(2, 3)))
    planned.run()
    assert ertacache.summary(planned.pipe).computed == 6
    ertacache.disable(planned.pipe)
    ertacache.disable(planned.pipe)
    assert planned.pipe.scheduler is own


def test_other_weights_and_another_dtype_are_a_warning():
    tiny = flux()
    plan = budget_plan(tiny, HALF)
    half = replace(plan, requirements=replace(plan.requirements, settings={"dtype": "bfloat16"}))
    for other, text in (
        (half, "dtype bfloat16, now float32"),
        (replace(plan, provenance={"weights": "0f"}), "0f, now"),
    ):
        with pytest.warns(UserWarning, match=text):
            ertacache.enable(tiny.pipe, other)


def test_the_second_transformer_counts_as_weights_too():
    tiny = wan_two_models()
    plan = replace(budget_plan(tiny, HALF), provenance={"weights": fingerprint(tiny.pipe)})
    with no_warning():
        ertacache.enable(tiny.pipe, plan)
    with torch.no_grad():
        next(tiny.pipe.transformer_2.parameters()).add_(1.0)
    with pytest.warns(UserWarning, match="other weights"):
        ertacache.enable(tiny.pipe, plan)


def test_how_weights_are_kept_binds_no_plan():
    """A plan of an int8 model on one that is loaded in int4, or not quantised."""
    tiny = flux()
    plan = budget_plan(tiny, HALF)
    for bits in (8, 4):
        tiny.pipe.transformer.register_to_config(quantization_config={"bits": bits})
        other = Requirements.of(tiny.pipe, STEPS, {})
        assert other.model == plan.requirements.model
        ertacache.enable(tiny.pipe, plan)


def test_what_a_plan_cannot_follow_is_refused():
    tiny = cogvideox()
    plan = threshold_plan(tiny, (2,))
    with refused("CogVideoXPipeline", "ertacache.enable(pipe, plan)"):
        ertacache.summary(tiny.pipe)
    with refused("SimpleNamespace", "transformer or unet"):
        ertacache.enable(SimpleNamespace(vae=object(), scheduler=tiny.pipe.scheduler), plan)
    with refused("SimpleNamespace", "several pipelines in one", "pipe.decoder_pipe"):
        ertacache.enable(SimpleNamespace(decoder_pipe=object(), unet=object(), scheduler=tiny.pipe.scheduler), plan)
    tiny.pipe.scheduler = CogVideoXDPMScheduler.from_config(tiny.pipe.scheduler.config)
    with refused("CogVideoXDPMScheduler", "diffusers.CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)"):
        ertacache.enable(tiny.pipe, plan)
    random = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with refused("stochastic_sampling = True", "stochastic_sampling=False"):
        solver_of(random)
    tiny = flux()
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    tiny.pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=1.0)
    x, t = torch.zeros(1, 4, 16), tiny.pipe.scheduler.timesteps[0]
    with refused("s_churn = 0.5", "leave it out"):
        tiny.pipe.scheduler.step(x, t, x, s_churn=0.5)
    with refused("time 123", "8", "disable the plan"):
        tiny.pipe.scheduler.step(x, torch.tensor(123.0), x)


# --- the object --------------------------------------------------------------------------------------------------


def test_copies_and_saved_pipelines(planned, tmp_path):
    first, own = planned.run(), originals(planned.pipe)["scheduler"]
    for copied in (copy.copy(planned.pipe), copy.deepcopy(planned.pipe)):
        assert torch.equal(replace(planned, pipe=copied).run(), first)
        ertacache.disable(copied)
        assert type(copied.scheduler) is type(own) and ertacache.summary(planned.pipe).computed == 5
    assert isinstance(planned.pipe.scheduler, type(own))
    tiny = flux()
    tiny.pipe.save_pretrained(tmp_path / "plain")
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    tiny.pipe.save_pretrained(tmp_path / "enabled")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "enabled" / name).read_text() == (tmp_path / "plain" / name).read_text()


def test_the_summary():
    tiny = flux()
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    assert str(ertacache.summary(tiny.pipe)) == "plan 2x for 8 steps: no call yet"
    tiny.run()
    tiny.run()
    found = ertacache.summary(tiny.pipe)
    assert (found.calls, found.computed, found.skipped, found.all_computed, found.all_skipped) == (2, 4, 4, 8, 8)
    assert found.seconds_saved > 0
    assert str(found).startswith("plan 2x for 8 steps. Last call: 4 steps computed, 4 skipped, ")
    assert str(found).endswith("All: 2 calls, 8 computed, 8 skipped.")


def test_a_plan_from_a_file_a_directory_and_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    tiny = flux()
    plan = budget_plan(tiny, HALF)
    path = plan.save(tmp_path / "plan.json")
    for source in (plan, path, str(path), tmp_path, str(tmp_path)):
        ertacache.enable(tiny.pipe, source)
        assert tiny.pipe.scheduler.plan == plan
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: {"someone/plan": str(tmp_path)}[repo])
    ertacache.enable(tiny.pipe, "hf://someone/plan")
    assert tiny.pipe.scheduler.plan == plan
    with refused("someone/else", "check the id"):
        ertacache.enable(tiny.pipe, "hf://someone/else")
    with refused("no plan someone/plan here", "hf://someone/plan", error=PlanError):  # a path that is not there
        ertacache.enable(tiny.pipe, "someone/plan")
    for missing in ("plans/none.json", "../none", str(tmp_path / "none.json")):
        with refused(missing, "check the path", error=PlanError):
            ertacache.enable(tiny.pipe, missing)


def test_importing_the_package_is_light():
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'common')!r}); import ertacache; "
    code += "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(hasattr(ertacache, name) for name in ertacache.__all__) and not hasattr(ertacache, "nothing")


@pytest.mark.slow
def test_the_script_of_the_readme():
    text = (ROOT / "README.md").read_text()
    script = text.split("## One line on your pipeline")[1].split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "15 steps computed, 15 skipped" in done.stdout, done.stderr


@pytest.mark.parametrize("plan", [None, 5, b"x", ["plan.json"], {1, 2}])
def test_what_is_no_plan_is_named(plan):
    with refused("plan = ", "hf://OWNER/NAME"):
        ertacache.enable(flux().pipe, plan)


def test_what_is_no_set_of_plans_is_named():
    with refused("plans: key 'computed'", "a number of at least 1"):
        ertacache.enable(flux().pipe, {"computed": [0]})


def test_arguments_the_wrong_way_round_are_named(tmp_path):
    tiny = flux()
    plan = budget_plan(tiny, HALF)
    for first in (plan, str(plan.save(tmp_path / "plan.json"))):
        with refused("the pipeline first, then the plan"):
            ertacache.enable(first, tiny.pipe)


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b"])
def test_a_path_that_no_file_can_have_is_one_line(path):
    with refused("plan", "check the path"):
        ertacache.enable(flux().pipe, path)


def test_a_folder_with_a_bad_plan_says_what_is_wrong_with_it(tmp_path):
    path = budget_plan(flux(), HALF).save(tmp_path / "plan.json")
    path.write_text(path.read_text().replace('"steps": 8', '"steps": 9'))
    with refused(path, "checksum", error=PlanError):
        ertacache.enable(flux().pipe, tmp_path)


def test_a_call_under_other_conditions_is_one_warning_that_names_them(tmp_path):
    """Calibration records what the call turns out to be, whatever it was given."""
    tiny = with_prompts(flux(max_sequence_length=5))
    plan = calibrate(tiny, work=tmp_path)[2]
    recorded = plan.requirements.settings
    assert recorded["latents"] and recorded["text_length"] == 5
    assert recorded["guidance_scale"] and recorded["true_cfg_scale"] == 1 and recorded["height"]
    ertacache.enable(tiny.pipe, plan)
    with no_warning():
        tiny.run(prompt=["a red star"])
    others = {"text_length": 30, "latents": [1, 2], "guidance_scale": 9, "true_cfg_scale": 2}
    changed = replace(plan.requirements, settings={**recorded, **others})
    ertacache.enable(tiny.pipe, replace(plan, requirements=changed))
    with pytest.warns(UserWarning, match="calibrated at") as caught:
        tiny.run(prompt=["a red star"])
        tiny.run(prompt=["a red star"])
    assert len([w for w in caught if "calibrated at" in str(w.message)]) == 1
    for word in ("text_length 30, now", "latents [1, 2], now", "guidance_scale 9, now", "true_cfg_scale 2, now 1"):
        assert word in str(caught[0].message)


def warned_of(tiny, **changes) -> str:
    """What a run warns of, of all that it is compared in; "" where that is as the plan has it."""
    tiny.pipe.scheduler.enabled.warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        tiny.run(**changes)
    return "; ".join(str(w.message) for w in caught if "quality may be lower" in str(w.message))


def with_settings(plan, **settings):
    """The plan as if these had been recorded when it was made."""
    return replace(plan, requirements=replace(plan.requirements, settings=settings))


NEGATIVE = {"negative_prompt_embeds": torch.zeros(1, 5, 16), "negative_pooled_prompt_embeds": torch.zeros(1, 16)}


@pytest.mark.parametrize("recorded", [{}, {"guidance": 3.5}, {"true_cfg_scale": 1.0}, {"true_cfg_scale": 1}])
def test_a_plan_that_records_no_true_cfg_was_made_without_it(recorded):
    """As those of the model folders; without a negative prompt the scale of the call does nothing."""
    tiny = flux()
    ertacache.enable(tiny.pipe, with_settings(budget_plan(tiny, HALF), **recorded))
    for harmless in ({}, {"true_cfg_scale": 4.0}, {"true_cfg_scale": 1.0, **NEGATIVE}):
        assert warned_of(tiny, **harmless) == ""
    said = warned_of(tiny, true_cfg_scale=4.0, **NEGATIVE)
    assert said.startswith(f"the plan was calibrated at true_cfg_scale {recorded.get('true_cfg_scale', 1.0)}, now 4.0")
    assert said.endswith("give the call the same true_cfg_scale, or calibrate a plan for it")


def test_a_plan_that_records_no_true_cfg_was_made_at_the_default_where_that_is_guidance():
    tiny = qwenimage()  # 4
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    assert warned_of(tiny) == ""
    assert "true_cfg_scale 4.0, now 7.0" in warned_of(tiny, true_cfg_scale=7.0)


def test_a_negative_prompt_that_turns_guidance_on_is_a_warning_at_the_same_scale(tmp_path):
    """Qwen's scale is 4 by default, and has an effect with a negative prompt alone."""
    tiny = with_prompts(qwenimage())
    plan = calibrate(tiny, work=tmp_path)[2]
    assert plan.requirements.settings["true_cfg_scale"] == 1
    ertacache.enable(tiny.pipe, plan)
    assert warned_of(tiny, prompt=["a red star"]) == ""
    assert "true_cfg_scale 1, now 4.0" in warned_of(tiny, prompt=["a red star"], negative_prompt=["a blue star"])


SQUARED = (np.linspace(1, 1 / STEPS, STEPS) ** 2).tolist()  # another grid than the pipeline's own


@pytest.mark.parametrize("build", [flux, qwenimage])
def test_other_sigmas_are_a_warning_where_the_grid_follows_the_size(build):
    """Qwen's grid is stretched after the shift, too."""
    tiny = build()
    larger = {name: 4 * tiny.arguments[name] for name in ("height", "width")}
    plan = budget_plan(tiny, HALF)
    ertacache.enable(tiny.pipe, plan)
    assert warned_of(tiny) == warned_of(tiny, **larger) == ""
    assert "shifted to this size" in warned_of(tiny, sigmas=SQUARED)
    assert "shifted to this size" in warned_of(tiny, sigmas=SQUARED, **larger)


def test_at_the_calibrations_size_the_grid_is_compared_as_it_is(tmp_path):
    """These sigmas are what a larger image would have: at this size no shift explains them."""
    tiny = with_prompts(flux())
    ertacache.enable(tiny.pipe, calibrate(tiny, work=tmp_path)[2])
    even = np.linspace(1, 1 / STEPS, STEPS)
    shifted = (3 * even / (1 + 2 * even)).tolist()
    assert warned_of(tiny, prompt=["a red star"], sigmas=even.tolist()) == ""
    said = warned_of(tiny, prompt=["a red star"], sigmas=shifted)
    assert said.startswith("this run has other noise levels than the plan's calibration (step 6 is at 0.6")
    assert said.endswith("quality may be lower: calibrate one with these settings")
    larger = {"height": 64, "width": 64, "prompt": ["a red star"]}
    assert "noise levels" not in warned_of(tiny, sigmas=shifted, **larger)
    assert "noise levels" in warned_of(tiny, sigmas=SQUARED, **larger)


# --- the length of the text --------------------------------------------------------------------------------------


def longer(tiny, count=3):
    """Its text with this much padding, as a larger max_sequence_length gives it: noise, masked where it has a mask."""
    noise = torch.randn(1, count, 16, generator=torch.Generator().manual_seed(9))
    texts = [name for name, value in tiny.arguments.items() if torch.is_tensor(value) and value.shape == (1, 5, 16)]
    masks = [name for name in tiny.arguments if name.endswith("mask")]
    padded = {name: torch.cat([tiny.arguments[name], noise], 1) for name in texts}
    return padded | {name: torch.cat([tiny.arguments[name], torch.zeros(1, count).long()], 1) for name in masks}


@pytest.mark.parametrize("build", [ltx, sana])
def test_where_the_model_masks_its_padding_the_texts_length_makes_no_difference(build):
    tiny = build()
    ertacache.enable(tiny.pipe, with_settings(budget_plan(tiny, HALF), text_length=5))
    assert warned_of(tiny, **longer(tiny)) == ""
    assert torch.allclose(tiny.run(**longer(tiny)), tiny.run(), atol=1e-5)


@pytest.mark.parametrize("build", [flux, wan, sd3])
def test_where_it_does_not_another_length_is_a_warning(build):
    tiny = build()
    ertacache.enable(tiny.pipe, with_settings(budget_plan(tiny, HALF), text_length=5))
    assert warned_of(tiny) == ""
    said = warned_of(tiny, **longer(tiny))
    assert "text_length 5, now 8" in said and "give the call the same max_sequence_length, or" in said
    assert not torch.allclose(tiny.run(**longer(tiny)), tiny.run(), atol=1e-5)


def test_a_text_that_is_not_padded_has_the_length_of_its_prompt():
    """Qwen's: no model sees more tokens of a prompt for a larger max_sequence_length."""
    tiny = qwenimage()
    plan = budget_plan(tiny, HALF)
    settings = {"text_length": 5, "max_sequence_length": 512, "true_cfg_scale": 4.0}
    ertacache.enable(tiny.pipe, with_settings(plan, **settings))
    texts = {name: value for name, value in longer(tiny).items() if not name.endswith("mask")}
    masks = {f"{name}_mask": torch.ones(1, 8, dtype=torch.int64) for name in texts}
    assert warned_of(tiny, **texts, **masks) == ""
    ertacache.enable(tiny.pipe, with_settings(plan, **{**settings, "max_sequence_length": 5}))
    assert "text_length 5, now 8" in warned_of(tiny, **texts, **masks)
