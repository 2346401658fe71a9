"""The nodes: Load plan, Sampler, Sigmas and Learn plan. The only module that imports ComfyUI, which loads it."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import comfy.samplers
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from ertacache.calibration.effort import EFFORTS
from ertacache.comfyui.grid import begin_of, check_kind, sigmas_of
from ertacache.comfyui.learning import Learner
from ertacache.comfyui.models import check_model, describe, scales_noise, space_of
from ertacache.comfyui.samplers import sample_plan
from ertacache.pipelines.enable import read_plans
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.names import HUB_PREFIX
from ertacache.utils.errors import UserError, shown

CATEGORY = "sampling/ertacache"
folder_paths.add_model_folder_path("ertacache", str(Path(folder_paths.models_dir, "ertacache")))
PLANS = Path(folder_paths.get_folder_paths("ertacache")[0])  # where plans are looked for, and learned ones saved
PlanType = io.Custom("ERTACACHE_PLAN")
LOG = logging.getLogger("ertacache")


class LoadPlan(io.ComfyNode):
    """A plan from a file, a folder or the Hub."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        source = f"a plan file, a folder with a plan.json, or {HUB_PREFIX}OWNER/NAME; relative paths begin at {PLANS}"
        return io.Schema(
            node_id="ERTACacheLoadPlan",
            display_name="Load plan (ERTACache)",
            category=CATEGORY,
            description="Read a budget plan: which N of T steps call the model, and the weights of the jumps between.",
            inputs=[
                io.String.Input("source", default="plan.json", tooltip=source),
                io.Float.Input(
                    "speedup",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="T/N of the plan to take from a set; 0 takes the least",
                ),
            ],
            outputs=[PlanType.Output(display_name="plan")],
        )

    @classmethod
    def validate_inputs(cls, source=None, speedup=None) -> bool | str:
        """Say before anything runs what is wrong with a plan; one on the Hub is read when its turn comes."""
        if None in (source, speedup) or source.startswith(HUB_PREFIX):
            return True
        try:
            load_plan(source, speedup)
        except UserError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, source, speedup) -> float:
        """Have a plan read again when its file has changed."""
        path = PLANS / source
        paths = [*path.glob("plan*.json")] if path.is_dir() else [path]
        return max((file.stat().st_mtime for file in paths if file.exists()), default=0.0)

    @classmethod
    def execute(cls, source: str, speedup: float) -> io.NodeOutput:
        return io.NodeOutput(load_plan(source, speedup))


class PlanSampler(io.ComfyNode):
    """A SAMPLER that follows a plan."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ERTACacheSampler",
            display_name="Sampler (ERTACache)",
            category=CATEGORY,
            description="Follow a plan with exactly N model calls; needs the Sigmas (ERTACache) of the same plan.",
            inputs=[PlanType.Input("plan")],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, plan: BudgetPlan) -> io.NodeOutput:
        return io.NodeOutput(PlannedSampler(follow_plan, {"plan": plan}))


class PlannedSampler(comfy.samplers.KSAMPLER):
    """What Sampler puts out: it scales the initial noise as the pipeline of the plan does."""

    def max_denoise(self, model_wrap, sigmas) -> bool:
        plan = self.extra_options["plan"]
        scales = scales_noise(plan, begin_of(plan, sigmas.tolist()))
        return super().max_denoise(model_wrap, sigmas) if scales is None else scales


class PlanSigmas(io.ComfyNode):
    """The SIGMAS of a plan's computed steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        denoise = "share of the T steps that the run makes, below 1 from an image; the plan's steps after its beginning"
        return io.Schema(
            node_id="ERTACacheSigmas",
            display_name="Sigmas (ERTACache)",
            category=CATEGORY,
            description="The noise levels at which a plan calls the model, from the grid that it was calibrated on.",
            inputs=[
                PlanType.Input("plan"),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=denoise),
                io.Model.Input("model", optional=True, tooltip="refused here, before sampling, if the plan is not its"),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, plan: BudgetPlan, denoise: float, model=None) -> io.NodeOutput:
        if model is not None:
            check_model(plan, model.model, model.get_model_object("model_sampling"))
        return io.NodeOutput(torch.tensor(sigmas_of(plan, denoise)))


class LearnPlan(io.ComfyNode):
    """A SAMPLER that is uncached, learns a plan on the way, and follows it when it is there."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        name = f"the plan is saved as this .json in {PLANS}; one that is there is followed"
        good = "mean squared error of the final latents over their mean square at which the search ends early; 0: never"
        return io.Schema(
            node_id="ERTACacheLearnPlan",
            display_name="Learn plan (ERTACache)",
            category=CATEGORY,
            description="Sample uncached, and learn a plan from it; once it is there, follow it. Give it the sigmas of "
            "the uncached run, of any scheduler.",
            inputs=[
                io.String.Input("name", default="my-plan", tooltip=name),
                io.Float.Input("speedup", default=2.0, min=1.0, max=100.0, step=0.1, tooltip="T/N of the plan"),
                io.Int.Input("images", default=8, min=1, max=256, tooltip="runs to learn from, uncached"),
                io.Int.Input(
                    "extra_calls", default=60, min=1, max=10000, tooltip="model calls that each further run adds"
                ),
                io.Float.Input("good_enough", default=0.0, min=0.0, max=1.0, step=0.0001, round=False, tooltip=good),
                io.Combo.Input("effort", options=list(EFFORTS), default="quick", tooltip="how long to search"),
            ],
            outputs=[io.Sampler.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, name=None) -> bool | str:
        return (name is not None and name_problem(name)) or True

    @classmethod
    def execute(cls, name: str, **options) -> io.NodeOutput:
        if name_problem(name):
            raise UserError(name_problem(name))
        path = PLANS / f"{name.removesuffix('.json')}.json"
        return io.NodeOutput(LearnSampler(path, options, partial(say, cls.hidden.unique_id)))


class LearnSampler(comfy.samplers.KSAMPLER):
    """What Learn plan puts out.

    Args:
        path: The plan's file.
        options: Of the `Learner`.
        say: Called with its messages.
    """

    def __init__(self, path: Path, options: dict[str, Any], say):
        super().__init__(self.run)
        self.path, self.options, self.say = path, options, say

    @property
    def learner(self) -> Learner:
        """The learner of the plan, which this process keeps between prompts."""
        return learner_of(self.path, self.options, self.say)

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
        """Sample on the noise levels that the learner wants, with a progress bar for all model calls."""
        learner = self.learner
        sigmas, extra = learner.sigmas(sigmas), learner.extra_calls if learner.busy else 0

        def count(step, denoised, x, total):
            callback(step, denoised, x, total + extra)

        return super().sample(model_wrap, sigmas, extra_args, callback and count, noise, *args, **kwargs)

    def run(self, model, x, sigmas, extra_args=None, callback=None, disable=None) -> torch.Tensor:
        """As a sampler function."""
        learner = self.learner
        if learner.plan is not None:
            return follow_plan(model, x, sigmas, extra_args, callback, disable, plan=learner.plan)
        pupil = ComfyPupil(model, extra_args or {})
        return learner.sample(model, x, sigmas, extra_args, callback, disable, pupil=pupil)


class ComfyPupil:
    """A model during a run, for `learning.Pupil`.

    Args:
        model: As a sampler function gets it; its `inner_model` is the guider, whose `inner_model` is the model.
        extra_args: Of the sampler function.
    """

    def __init__(self, model, extra_args: Mapping[str, Any]):
        self.guider = model.inner_model
        base = self.guider.inner_model
        self.space, self.description = space_of(base.model_sampling), describe(base)
        self.settings = {"cfg": float(getattr(self.guider, "cfg", 1.0))}
        self.parameters, self.dtype = list(base.diffusion_model.parameters()), base.get_dtype()
        conditions = [condition for kind in self.guider.conds.values() for condition in kind]
        if extra_args.get("denoise_mask") is not None:
            self.unrepeatable = "it has a mask"
        elif any("control" in condition or condition.get("hooks") for condition in conditions):
            self.unrepeatable = "it has a ControlNet, or hooks on its conditioning"
        else:
            self.unrepeatable = None

    def keep(self) -> dict[str, list]:
        return {name: list(conditions) for name, conditions in self.guider.conds.items()}

    @contextlib.contextmanager
    def given(self, kept: dict[str, list]) -> Iterator[None]:
        own, self.guider.conds = self.guider.conds, kept
        try:
            yield
        finally:
            self.guider.conds = own


def follow_plan(model, x, sigmas, extra_args=None, callback=None, disable=None, *, plan: BudgetPlan) -> torch.Tensor:
    """Follow a plan, if it is one of the model's: a sampler function."""
    check_model(plan, model.inner_model.inner_model)
    return sample_plan(model, x, sigmas, extra_args, callback, disable, plan=plan)


def load_plan(source: str, speedup: float) -> BudgetPlan:
    """Return the plan of a source, or that of a speed-up in a set.

    Raises:
        UserError: No plan there, none of this speed-up, or one that is no budget plan.
    """
    plans = read_plans(source if source.startswith(HUB_PREFIX) else PLANS / Path(source).expanduser())
    return check_kind(plans.at(speedup) if speedup else plans.first)


def name_problem(name: str) -> str | None:
    """Return what is wrong with the name of a plan to be learned."""
    if not name.strip() or Path(name).name != name or name.startswith("."):
        return f"name = {shown(name)}: give the name of a file, without a folder"
    return None


LEARNERS: dict[Path, tuple[dict[str, Any], Learner]] = {}  # by plan, with their options: of this process


def learner_of(path: Path, options: dict[str, Any], say) -> Learner:
    """Return the learner of a plan; a new one where options have changed, or where its plan was deleted."""
    fixed = {name: value for name, value in options.items() if name != "extra_calls"}
    known, learner = LEARNERS.get(path, (None, None))
    if known != fixed or (learner.plan is not None and not path.exists()):
        if learner is not None:
            learner.forget()
        learner = Learner(path, **options, work=folder_paths.get_temp_directory())
        LEARNERS[path] = fixed, learner
    learner.extra_calls, learner.say = options["extra_calls"], say
    return learner


def say(node: str, text: str) -> None:
    """Show a message below a node, and log it."""
    LOG.info("%s", text)
    PromptServer.instance.send_progress_text(text, node)


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadPlan, PlanSampler, PlanSigmas, LearnPlan]


async def comfy_entrypoint() -> Extension:
    return Extension()
