"""Which pipeline a command runs, how it is loaded, and the arguments of its call."""

import contextlib
import difflib
import functools
import inspect
import json
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ertacache.utils.errors import UserError, reason_of
from ertacache.utils.files import read_prompts

NEEDED = ("prompt", "num_inference_steps", "generator", "output_type")  # of a call that the commands can make


@dataclass(frozen=True)
class Request:
    """What a person asks for. flags: the call's common arguments, by flag; settings: NAME=VALUE, the others."""

    model: str
    flags: Mapping[str, Any]
    settings: Sequence[str] = ()
    dtype: str | None = None
    device: str | None = None
    offload: str = "none"
    revision: str | None = None

    # --- before the weights are loaded -------------------------------------------------------------------------------

    @functools.cached_property
    def pipeline(self) -> type:
        """The pipeline's class, by the model's model_index.json."""
        import diffusers
        from transformers.utils import logging

        from ertacache.pipelines.load import check_model_directory

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with self.loading():
            name = json.loads(self.index.read_text("utf-8")).get("_class_name")
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
        if found is None:
            raise UserError(f"{self.model} holds a {name}, unknown to diffusers: use ertacache.enable in a script")
        missing = [name for name in NEEDED if name not in inspect.signature(found.__call__).parameters]
        if missing:
            raise UserError(f"{self.model}: {name}'s call takes no {missing[0]}: use ertacache.enable in a script")
        if Path(self.source).is_dir():
            check_model_directory(Path(self.source), name)
        return found

    @property
    def index(self) -> Path:
        """The model's model_index.json, on disk."""
        from huggingface_hub import hf_hub_download

        from ertacache.plans.names import HUB_ID

        path = Path(self.source)
        if not path.is_dir() and not HUB_ID.fullmatch(self.model):
            raise UserError(f"no model {self.model}: give a folder that is there, or a Hub id of the form OWNER/NAME")
        if not path.is_dir():
            return Path(hf_hub_download(self.model, "model_index.json", revision=self.revision))
        if not (path / "model_index.json").is_file():
            raise UserError(
                f"{self.model} has no model_index.json, so it is no diffusers pipeline: give another folder"
            )
        return path / "model_index.json"

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call, by its own names; only what was given."""
        from ertacache.pipelines.uncached import NAMES

        given = [(f"--{flag_of(name)}", NAMES.get(name, name), value) for name, value in self.flags.items()]
        given += [(f"--set {text}", *_parsed(text)) for text in self.settings]
        found = {}
        for flag, name, value in given:
            self.check_name(flag, name)
            if name in found:
                raise UserError(f"{flag}: {name} is given twice, leave one of them out")
            found[name] = value
        return found

    def check_name(self, flag: str, name: str) -> None:
        """Refuse what the call does not take, and what the commands set themselves."""
        from ertacache.calibration.from_pipeline import OURS

        known = list(inspect.signature(self.pipeline.__call__).parameters)[1:]
        if name in (*OURS, "output_type", "return_dict"):
            raise UserError(f"{flag}: {name} is set by the command, leave it out")
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known)
            near = textwrap.shorten(near, 160, placeholder=" …")
            raise UserError(f"{flag}: {self.pipeline.__name__}'s call has no {name}: leave it out, or try {near}")

    @property
    def steps(self) -> int:
        """T, given or the call's default."""
        default = inspect.signature(self.pipeline.__call__).parameters["num_inference_steps"].default
        steps = self.arguments.get("num_inference_steps", default)
        if type(steps) is not int or steps < 1:
            raise UserError(f"num_inference_steps = {steps}: give --steps with a whole number of at least 1")
        return steps

    def plan(self, source: str | None):
        """The plan at `source`, for T steps (None: none); the call is checked.

        Warns when the call's settings differ from those of the calibration.
        """
        from ertacache.pipelines.enable import find
        from ertacache.pipelines.uncached import NAMES
        from ertacache.plans.requirements import Conditions

        steps = self.steps
        if source is None:
            return None
        plan = find(source)
        known = inspect.signature(self.pipeline.__call__).parameters.items()
        call = {name: p.default for name, p in known if p.default not in (None, inspect.Parameter.empty)}
        call |= self.arguments
        settings = call | {flag: call[name] for flag, name in NAMES.items() if name in call}  # a model folder's names
        made = shlex.join(["ertacache", "calibrate", self.model, "--steps", str(steps)])
        remedy = f"give what it was made for, or make another plan with `{made} …`"
        if plan.steps != steps:
            remedy = f"give --steps {plan.steps}, or make another plan with `{made} …`"
        plan.check(Conditions(steps, {}, {}, settings), remedy)
        return plan

    # --- the pipeline ------------------------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        """The folder with ~ expanded, or the Hub id."""
        path = Path(self.model).expanduser()
        return str(path) if path.is_dir() else self.model

    def load(self):
        """The pipeline on its device."""
        import torch

        from ertacache.pipelines.load import load_pipeline
        from ertacache.utils import parallel

        device = parallel.device(self.device)
        dtype = getattr(torch, self.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))

        def read(source, dtype):
            with self.loading():
                return self.pipeline.from_pretrained(source, dtype=dtype, revision=self.revision)

        return load_pipeline(self.pipeline, self.source, device, dtype, self.offload, read)

    @contextlib.contextmanager
    def loading(self):
        """What goes wrong in it is one line about the model."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # hub, json, safetensors and torch all raise their own types here
            local = Path(self.source).is_dir()
            remedy = "the files are damaged, download them again" if local else "check the id, network and hf login"
            raise UserError(f"cannot load {self.model} ({reason_of(error)}): {remedy}") from error

    @contextlib.contextmanager
    def calling(self):
        """A call that fails, mostly on a value that the pipeline cannot take, is one line."""
        try:
            yield
        except UserError:
            raise
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            remedy = "check its arguments, or save memory with --offload model or a smaller --batch-size"
            raise UserError(f"{self.pipeline.__name__}'s call failed ({reason_of(error)}): {remedy}") from error

    def words(self) -> list[str]:
        """The arguments that were given, as the command line takes them."""
        options = {"dtype": self.dtype, "device": self.device, "revision": self.revision}
        options["offload"] = None if self.offload == "none" else self.offload
        given = {**self.flags, **{name: value for name, value in options.items() if value is not None}}
        words = [word for name, value in given.items() for word in (f"--{flag_of(name)}", str(value))]
        return words + [word for text in self.settings for word in ("--set", text)]


def flag_of(name: str) -> str:
    return name.replace("_", "-")


def prompts_of(prompt: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of --prompt or --prompts, of which one must be given."""
    if bool(prompt) == bool(file):
        problem = "--prompt and --prompts exclude each other" if prompt else "no prompt"
        raise UserError(f"{problem}: give --prompt TEXT, or --prompts FILE with one a line")
    prompts = prompt or read_prompts(file)
    if not all(text.strip() for text in prompts):
        raise UserError("--prompt is empty: say what should be seen")
    return prompts


def _parsed(text: str) -> tuple[str, Any]:
    """NAME and value of NAME=VALUE: JSON, or text where it is none."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise UserError(f"--set {text}: write NAME=VALUE, for example --set max_sequence_length=128")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
