"""The nodes against a stub of the interface that they use: V3 nodes, KSAMPLER, the guider and its model."""

import asyncio
import importlib
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from closed_form_models import CALLS, PIPE, STEPS, FlowModel, calibrated, folder, prompts_and_seeds
from ertacache.comfyui.grid import sigmas_of
from ertacache.plans import PlanSet
from helpers import refused


class KSAMPLER:
    """As in comfy.samplers, without what noise and masks need."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=True
    ):
        extra_args["denoise_mask"] = denoise_mask
        total = len(sigmas) - 1
        count = callback and (lambda step: callback(step["i"], step["denoised"], step["x"], total))
        model = SimpleNamespace(inner_model=model_wrap)
        options = {"extra_args": extra_args, "callback": count, "disable": True, **self.extra_options}
        scale = (1 + sigmas[0] ** 2) ** 0.5 if self.max_denoise(model_wrap, sigmas) else sigmas[0]
        return self.sampler_function(Wrapped(model_wrap, **vars(model)), noise * scale, sigmas, **options)

    def max_denoise(self, model_wrap, sigmas):
        return sigmas[0] > 14.6


class Wrapped:
    """KSamplerX0Inpaint."""

    def __init__(self, guider, inner_model):
        self.guider, self.inner_model = guider, inner_model

    def __call__(self, x, sigma, denoise_mask=None, seed=None):
        return self.guider(x, sigma)


class CONST:
    sigma_max = torch.tensor(1.0)


class ModelSampling(CONST):
    pass


class Flux:
    """A model of ComfyUI, with the closed-form denoiser for a diffusion model."""

    def __init__(self):
        self.model_sampling, self.diffusion_model = ModelSampling(), PIPE.transformer
        self.model_config = SimpleNamespace(unet_config={"depth": 1, "dtype": torch.float32})

    def get_dtype(self):
        return torch.float32


class Guider:
    """CFGGuider: the conditioning is the model folder's inputs."""

    cfg = 3.5

    def __init__(self, inputs, **conditions):
        self.inner_model, self.calls = Flux(), 0
        self.conds = {"positive": [{"inputs": inputs, **conditions}]}

    def __call__(self, x, sigma):
        self.calls += 1
        return FlowModel(self.conds["positive"][0]["inputs"])(x, sigma)


class Input:
    def __init__(self, id, options=None, **details):
        self.id, self.options, self.details = id, options, details


class Type:
    Input, Output = Input, SimpleNamespace


class ComfyNode:
    hidden = SimpleNamespace(unique_id="7")


class NodeOutput:
    def __init__(self, *args):
        self.args = args


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """The module, over stubs; its folder of plans is in tmp_path."""
    said = []
    names = ("String", "Float", "Int", "Combo", "Model", "Sampler", "Sigmas")
    io = SimpleNamespace(
        **dict.fromkeys(names, Type),
        ComfyNode=ComfyNode,
        NodeOutput=NodeOutput,
        Schema=SimpleNamespace,
        Custom=lambda name: Type,
        Hidden=SimpleNamespace(unique_id="UNIQUE_ID"),
    )
    server = SimpleNamespace(send_progress_text=lambda text, node: said.append((node, text)))
    stubs = {
        "comfy": {},
        "comfy.samplers": {"KSAMPLER": KSAMPLER},
        "comfy_api": {},
        "comfy_api.latest": {"io": io, "ComfyExtension": object},
        "folder_paths": {
            "models_dir": str(tmp_path),
            "add_model_folder_path": lambda name, path: None,
            "get_folder_paths": lambda name: [str(tmp_path / "plans")],
            "get_temp_directory": lambda: str(tmp_path),
        },
        "server": {"PromptServer": SimpleNamespace(instance=server)},
    }
    for name, values in stubs.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["comfy"].samplers = sys.modules["comfy.samplers"]
    monkeypatch.delitem(sys.modules, "ertacache.comfyui.nodes", raising=False)
    module = importlib.import_module("ertacache.comfyui.nodes")
    module.said = said
    yield module
    del sys.modules["ertacache.comfyui.nodes"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    plan = calibrated(4, tmp_path_factory.mktemp("work"))
    required = {"model": {"class": "Flux", "depth": 1}, "scheduler": {"class": "ComfyUI", "space": "flow"}}
    return replace(plan, requirements=replace(plan.requirements, **required))


@pytest.fixture
def saved(plan, nodes):
    nodes.PLANS.mkdir()
    return plan.save(nodes.PLANS / "mine.json")


def inputs_of(seed):
    (prompt,), _ = prompts_and_seeds(1, seed)
    return folder.prepare(PIPE, [prompt], [seed], steps=STEPS)


def outputs(node, *args, **kwargs):
    (result,) = node.execute(*args, **kwargs).args
    return result


def test_the_extension_has_four_nodes(nodes):
    listed = asyncio.run(asyncio.run(nodes.comfy_entrypoint()).get_node_list())
    schemas = [node.define_schema() for node in listed]
    assert [schema.display_name for schema in schemas] == [
        f"{name} (ERTACache)" for name in ("Load plan", "Sampler", "Sigmas", "Learn plan")
    ]
    assert len({schema.node_id for schema in schemas}) == 4


def test_a_plan_gives_exact_calls_and_a_full_progress_bar(nodes, saved, plan):
    loaded = outputs(nodes.LoadPlan, "mine.json", 0.0)
    assert loaded == plan
    sigmas = outputs(nodes.PlanSigmas, loaded, 1.0, SimpleNamespace(model=Flux(), get_model_object=lambda _: CONST()))
    guider, seen = Guider(inputs_of(50)), []
    noise = guider.conds["positive"][0]["inputs"].latents
    sampler = outputs(nodes.PlanSampler, loaded)
    sampler.sample(guider, sigmas, {"seed": 0}, lambda step, _, __, total: seen.append((step + 1, total)), noise)
    assert guider.calls == CALLS and seen == [(i + 1, CALLS) for i in range(CALLS)]
    late = outputs(nodes.PlanSigmas, loaded, 0.5)
    assert late.tolist() == sigmas_of(plan, 0.5) and late.dtype == torch.float32


def test_the_noise_of_the_beginning_is_scaled_as_by_the_pipeline(nodes, plan):
    def scale(plan, denoise=1.0):
        sampler, sigmas = outputs(nodes.PlanSampler, plan), torch.tensor(sigmas_of(plan, denoise))
        sampler.sampler_function, sampler.extra_options = lambda model, x, sigmas, **_: x, {"plan": plan}
        noise = sampler.sample(Guider(inputs_of(50)), sigmas, {}, None, torch.ones(1))
        return noise.item() / sigmas[0].item()

    def of(**scheduler):
        return replace(plan, requirements=replace(plan.requirements, scheduler=scheduler))

    euler = {"class": "EulerDiscreteScheduler", "prediction_type": "epsilon"}
    assert scale(of(**euler, timestep_spacing="leading")) == pytest.approx(2**0.5)  # at sigma 1
    assert scale(of(**euler, timestep_spacing="leading"), 0.5) == pytest.approx(1)
    assert scale(of(**euler, timestep_spacing="linspace")) == pytest.approx(1)
    assert scale(plan) == pytest.approx(1)


def test_sets_and_folders(nodes, plan):
    PlanSet({3.0: plan}).save_pretrained(nodes.PLANS / "set")
    assert outputs(nodes.LoadPlan, "set", 3.0) == plan
    assert nodes.LoadPlan.validate_inputs("set", 3.0) is True
    assert "the plans are for 3" in nodes.LoadPlan.validate_inputs("set", 2.0)
    assert "no plan" in nodes.LoadPlan.validate_inputs("none.json", 0.0)
    assert nodes.LoadPlan.validate_inputs("hf://a/b", 0.0) is nodes.LoadPlan.validate_inputs() is True
    assert nodes.LoadPlan.fingerprint_inputs("set", 0.0) > 0 == nodes.LoadPlan.fingerprint_inputs("none", 0.0)


def test_what_does_not_fit_is_refused(nodes, plan):
    sampler = outputs(nodes.PlanSampler, plan)
    guider = Guider(inputs_of(50))
    guider.inner_model.model_sampling = type("V", (type("EPS", (), {}),), {"sigma_max": 14.6})()
    with refused("flow", "sigma space"):
        sampler.sample(guider, torch.tensor(sigmas_of(plan)), {}, None, torch.zeros(1, 3, 16, 16))
    with refused("12 steps", "Sigmas (ERTACache)"):
        sampler.sample(Guider(inputs_of(50)), torch.linspace(1, 0, 13), {}, None, torch.zeros(1, 3, 16, 16))
    assert "without a folder" in nodes.LearnPlan.validate_inputs("../a")
    assert nodes.LearnPlan.validate_inputs("a") is True
    with refused("name = ''"):
        nodes.LearnPlan.execute("", speedup=2.0)


def test_learning_until_the_workflow_is_fast(nodes):
    options = {"speedup": 3.0, "images": 4, "extra_calls": 24, "good_enough": 0.0, "effort": "quick"}
    calls, seen = [], []
    for seed in range(20):
        sampler, inputs = outputs(nodes.LearnPlan, "new", **options), inputs_of(seed)
        seen.clear()
        guider = Guider(inputs)
        own = guider.conds
        sampler.sample(
            guider, inputs.sigmas, {"seed": 0}, lambda *step: seen.append((step[0] + 1, step[3])), inputs.latents
        )
        calls.append(guider.calls)
        assert guider.conds is own and [step for step, _ in seen] == list(range(1, guider.calls + 1))
        assert seen[-1][0] <= seen[-1][1]
        if guider.calls == CALLS:
            break
    assert calls[:3] == [STEPS] * 3 and calls[3] == STEPS + 24 and calls[-1] == CALLS
    assert seen == [(i + 1, CALLS) for i in range(CALLS)]
    assert (nodes.PLANS / "new.json").exists() and {node for node, _ in nodes.said} == {"7"}
    assert any("followed from now on" in text for _, text in nodes.said)


def test_masks_and_controlnets_teach_nothing(nodes):
    options = {"speedup": 3.0, "images": 2, "extra_calls": 24, "good_enough": 0.0, "effort": "quick"}
    sampler, inputs = outputs(nodes.LearnPlan, "new", **options), inputs_of(0)
    sampler.sample(Guider(inputs, control=1), inputs.sigmas, {}, None, inputs.latents)
    sampler.sample(Guider(inputs), inputs.sigmas, {}, None, inputs.latents, denoise_mask=torch.ones(1))
    assert ["ControlNet" in nodes.said[0][1], "a mask" in nodes.said[1][1]] == [True, True]


def test_a_deleted_plan_is_learned_anew(nodes, saved):
    options = {"speedup": 3.0, "images": 2, "extra_calls": 24, "good_enough": 0.0, "effort": "quick"}
    assert nodes.learner_of(saved, options, print).plan is not None
    saved.unlink()
    learner = nodes.learner_of(saved, options, print)
    assert learner.plan is None
    assert nodes.learner_of(saved, options | {"extra_calls": 5}, print) is learner and learner.extra_calls == 5
    assert nodes.learner_of(saved, options | {"images": 5}, print) is not learner
