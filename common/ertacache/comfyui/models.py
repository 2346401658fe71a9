"""What a ComfyUI model is to a plan, read off its attributes; nothing of ComfyUI is imported.

A model's space says how its latents mix data and noise: "flow", x = (1 − sigma) · data + sigma · noise (FLUX, Wan,
Qwen-Image, SD3); or "sigma", x = data + sigma · noise (SDXL and other epsilon and v-prediction models).
"""

import json
from collections.abc import Mapping
from typing import Any

from ertacache.plans.budget import BudgetPlan
from ertacache.plans.requirements import differences
from ertacache.utils.errors import PlanError, UserError

SPACES = {"flow": "flow matching", "sigma": "epsilon or v-prediction in sigma space"}
SCHEDULER = "ComfyUI"  # class of the scheduler in the plans that are made here; its config has the space
LEARN = "make one with Learn plan (ERTACache)"
CLASSES = {  # of ComfyUI's models, for those of diffusers; BaseModel is the base of all
    "FluxTransformer2DModel": "Flux",
    "WanTransformer3DModel": "WAN21",
    "QwenImageTransformer2DModel": "QwenImage",
    "SD3Transformer2DModel": "SD3",
    "ChromaTransformer2DModel": "Chroma",
    "UNet2DConditionModel": "BaseModel",
}
KEYS = {  # of ComfyUI's model config, for those of diffusers, with values that both write in the same way
    "num_layers": ("depth", "num_layers"),
    "num_single_layers": ("depth_single_blocks",),
    "guidance_embeds": ("guidance_embed",),
    "cross_attention_dim": ("context_dim",),
}
LEVEL_SLACK = 1.001  # of the largest noise level


def space_of(sampling) -> str:
    """Return the space of a model of ComfyUI by the classes of its `model_sampling`.

    Raises:
        UserError: Another one.
    """
    kinds = [kind.__name__ for kind in type(sampling).__mro__]
    if "CONST" in kinds:
        return "flow"
    if "EPS" in kinds and "IMG_TO_IMG" not in kinds:
        return "sigma"
    text = f"the model's sampling is {' with '.join(kinds[1:3])}, which no plan can follow"
    raise UserError(f"{text}: use another sampler")


def space_of_plan(plan: BudgetPlan) -> str:
    """Return the space of the models that a plan is for, by the scheduler that it requires.

    Raises:
        PlanError: A plan for a scheduler whose jumps are no combinations of dx/dsigma.
    """
    scheduler = plan.requirements.scheduler
    name, prediction = scheduler.get("class"), scheduler.get("prediction_type")
    if name == SCHEDULER:
        return scheduler["space"]
    is_flow = scheduler.get("use_flow_sigmas") and prediction == "flow_prediction"
    if name == "FlowMatchEulerDiscreteScheduler" or is_flow:
        return "flow"
    if name in ("EulerDiscreteScheduler", "LMSDiscreteScheduler") and prediction == "epsilon":
        return "sigma"
    raise PlanError(f"the plan is for a {name} with {prediction or 'its'} prediction, which ComfyUI lacks: {LEARN}")


def scales_noise(plan: BudgetPlan, begin: int) -> bool | None:
    """Return whether a run in sigma space begins with sqrt(sigma² + 1) · noise; None if ComfyUI decides.

    ComfyUI does so at the model's largest sigma, and begins with data + sigma · noise at others. Pipelines of diffusers
    do so with the timestep spacing "leading", whose first sigma is below the largest; with the other spacings they
    begin with sigma · noise, and from an image with data + sigma · noise.

    Args:
        plan: To follow.
        begin: Step of the plan's T at which the run begins.
    """
    scheduler = plan.requirements.scheduler
    if scheduler.get("class") == SCHEDULER:
        return None
    return begin == 0 and scheduler.get("timestep_spacing") == "leading"


def describe(model) -> dict[str, Any]:
    """Return class and config of a ComfyUI model as JSON values, as a plan requires them."""
    config = {key: value for key, value in model.model_config.unet_config.items() if key not in ("dtype", "device")}
    return json.loads(json.dumps({"class": type(model).__name__, **config}, default=str))


def check_model(plan: BudgetPlan, model, sampling=None) -> None:
    """Refuse a model that a plan was not made for.

    Args:
        plan: To follow.
        model: Of ComfyUI (`comfy.model_base.BaseModel`).
        sampling: Its `model_sampling` with the patches of nodes like ModelSamplingFlux, where they are not applied yet.

    Raises:
        PlanError: Another space, class or config of the model, or noise levels above its largest.
    """
    sampling = sampling or model.model_sampling
    space, needed = space_of(sampling), space_of_plan(plan)
    if space != needed:
        raise PlanError(f"the plan is for {SPACES[needed]}, the model is of {SPACES[space]}: {LEARN}")
    check_same_model(plan.requirements.model, model)
    highest, largest = max(plan.calibrated_levels()), float(sampling.sigma_max)
    if highest > largest * LEVEL_SLACK:
        raise PlanError(f"the plan begins at sigma {highest:.4g}, the model's largest is {largest:.4g}: {LEARN}")


def check_same_model(required: Mapping[str, Any], model) -> None:
    """Refuse a model of another class or config, as far as diffusers and ComfyUI have the same names for them."""
    present, name = describe(model), required.get("class")
    if name in CLASSES:
        known = [kind.__name__ for kind in type(model).__mro__ if kind.__name__ in CLASSES.values()]
        if known[:1] != [CLASSES[name]]:  # Chroma's class, for one, is derived from Flux
            raise PlanError(f"the plan is for a {name}, the model is a {present['class']}: load the plan's, or {LEARN}")
        names = [(key, other) for key, others in KEYS.items() for other in others]
        pairs = [(key, required[key], present[other]) for key, other in names if key in required and other in present]
    else:
        pairs = [(key, required[key], present[key]) for key in differences(required, present)]
    for key, mine, other in pairs:
        if mine != other:
            raise PlanError(f"the plan is for another model ({key} {mine} ≠ {other}): load the plan's, or {LEARN}")
