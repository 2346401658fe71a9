"""What a command runs: a pipeline, its prompts, and the arguments of its call."""

import contextlib
import difflib
import functools
import inspect
import json
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ertacache.utils.checks import LARGEST_STEPS, argument_problem, steps_problem
from ertacache.utils.errors import CallFailed, UserError, call_failed, printable, shown, warnings_as
from ertacache.utils.logs import refusing_other_sizes

if TYPE_CHECKING:
    from ertacache.plans import Plan

LONGEST = 160  # characters of an argument in a message
FLAGS = ("steps", "guidance", "height", "width", "frames", "negative_prompt")  # those of arguments of the call
OWN = ("speedup ", "speedups ", "effort ")  # how messages about options of the commands begin
# A line of code, or NAME, NAME= or NAME =
IN_TEXT = re.compile(r"\w\([^()]*\)|(?<!--set )(?<![\w.])([a-z]\w*)( ?= ?)?")
IN_PYTHON = re.compile(r"ertacache\.calibrate\(pipe, prompts[^)]*\)")
NEEDED = ("prompt", "num_inference_steps", "generator", "output_type")  # of a call that the commands can make


@dataclass(frozen=True)
class Request:
    """What the shared options of a command ask for.

    Args:
        model: A directory or a Hub id.
        prompts: Texts.
        batch_size: Prompts per call.
        flags: Common arguments of the call, by flag.
        settings: Further arguments, each NAME=VALUE.
        dtype, device, offload, revision: How the model is loaded.
    """

    model: str
    prompts: Sequence[str]
    batch_size: int
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

        from ertacache.pipelines.load import check_model_directory, one_line_errors

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with one_line_errors(self.source):
            name = json.loads(self.index.read_text("utf-8")).get("_class_name")
        pipeline = getattr(diffusers, name, None) if isinstance(name, str) else None
        if pipeline is None:
            raise UserError(f"{self.model} holds a {name}, unknown to diffusers: use ertacache.enable in a script")
        missing = [name for name in NEEDED if name not in inspect.signature(pipeline.__call__).parameters]
        if missing:
            raise UserError(f"{self.model}: {name}'s call takes no {missing[0]}: use ertacache.enable in a script")
        if Path(self.source).is_dir():
            with one_line_errors(self.source):
                check_model_directory(Path(self.source), name)
        return pipeline

    @property
    def makes_videos(self) -> bool:
        """Whether the pipeline makes videos; others make images."""
        return not {"num_frames", "video_length"}.isdisjoint(inspect.signature(self.pipeline.__call__).parameters)

    @property
    def index(self) -> Path:
        """The model's model_index.json, on disk."""
        from huggingface_hub import hf_hub_download

        from ertacache.plans.names import HUB_ID

        path = Path(self.source)
        if not self.model or (not path.is_dir() and not HUB_ID.fullmatch(self.model)):
            name = self.model or "''"
            raise UserError(f"no model {name}: give a folder that is there, or a Hub id of the form OWNER/NAME")
        if path.is_dir() and self.revision is not None:
            raise UserError(f"--revision {self.revision}: the folder {self.model} has none, leave it out")
        if not path.is_dir():
            return Path(hf_hub_download(self.model, "model_index.json", revision=self.revision))
        if not (path / "model_index.json").is_file():
            raise UserError(
                f"{self.model} has no model_index.json, so it is no diffusers pipeline: give another folder"
            )
        return path / "model_index.json"

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, by its own names; only what was given."""
        from ertacache.pipelines.uncached import CALL_NAMES

        given = [(f"--{flag_of(name)} {v}", CALL_NAMES.get(name, name), v) for name, v in self.flags.items()]
        given += [(f"--set {text}", *_parsed(text)) for text in self.settings]
        arguments: dict[str, Any] = {}
        for flag, name, value in given:
            flag = printable(flag, LONGEST)
            self.check_name(flag, name)
            problem = None if name == "num_inference_steps" else argument_problem(name, value)  # those are in `steps`
            if problem:
                raise UserError(f"{flag}: {problem}")
            if name in arguments:
                raise UserError(f"{flag}: {name} is given twice, leave one of them out")
            arguments[name] = value
        return arguments

    def check_name(self, flag: str, name: str) -> None:
        """Refuse an argument that the call does not take, or that the commands set themselves."""
        from ertacache.calibration.from_pipeline import SET_BY_CALIBRATE

        known = list(inspect.signature(self.pipeline.__call__).parameters)[1:]
        if name in (*SET_BY_CALIBRATE, "output_type", "return_dict"):
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
        if steps_problem(steps, 1):
            text = f"num_inference_steps = {shown(steps)}"
            raise UserError(f"{text}: give --steps with a whole number from 1 to {LARGEST_STEPS}")
        return steps

    def plan(self, source: str | None, speedup: float | None = None) -> "Plan | None":
        """Return the plan at `source` (None: none), checked against T; of a set that of a speed-up, or the first."""
        from ertacache.numerics.schedulers import num_inference_steps_of, steps_of
        from ertacache.pipelines.enable import read_plans
        from ertacache.plans.requirements import Requirements

        steps = self.steps
        if source is None:
            return None
        plans = read_plans(source)
        plan = plans.first if speedup is None else plans.at(speedup, "--speedup")
        scheduler = plan.requirements.scheduler.get("class", "")
        fitting = num_inference_steps_of(scheduler, plan.steps)
        remedy = f"give --steps {fitting}, or make another plan with `{self.calibrate} …`"
        plan.check(Requirements(steps_of(scheduler, steps), {}, {}), remedy)
        return plan

    @property
    def calibrate(self) -> str:
        """The command that makes a plan for this model and T."""
        return shlex.join(["ertacache", "calibrate", self.model, "--steps", str(self.steps)])

    # --- the pipeline ------------------------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        """The folder with ~ expanded, or the Hub id."""
        path = Path(self.model).expanduser()
        return str(path) if path.is_dir() else self.model

    @property
    def name(self) -> str:
        """The Hub id, or the folder's name without the way to it."""
        path = Path(self.source)
        return path.resolve().name if path.is_dir() else self.model

    @property
    def commit(self) -> str | None:
        """The commit on the Hub that the model is of; None for a folder."""
        parts = [] if Path(self.source).is_dir() else self.index.parts
        return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None

    def load(self):
        """Load the pipeline onto its device."""
        from ertacache.pipelines.load import load_pipeline
        from ertacache.utils import parallel
        from ertacache.utils.devices import dtype_for

        device = parallel.device(self.device)
        dtype = dtype_for(device, self.dtype)
        return load_pipeline(self.pipeline, self.source, device, dtype, self.offload, revision=self.revision)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Turn a failing call, mostly on a value that the pipeline cannot take, into one line, with flags as below."""
        with self.naming_flags():
            try:
                with refusing_other_sizes("diffusers"):
                    yield
            except CallFailed as failed:
                raise self.failed(failed.__cause__) from failed.__cause__
            except UserError:
                raise
            except Exception as error:  # whatever pipelines, tokenizers and torch raise for a value
                raise self.failed(error) from error

    @contextlib.contextmanager
    def naming_flags(self) -> Iterator[None]:
        """Have refusals and warnings of the library name flags of the command line, not arguments in Python."""
        try:
            with warnings_as(self.with_flags):
                yield
        except UserError as error:
            text = self.with_flags(str(error))
            raise (error if text == str(error) else type(error)(text)) from error.__cause__

    def failed(self, error: BaseException) -> CallFailed:
        """Return a pipeline's error in its call as one line with the flags that were given."""
        savings = "--offload model or a smaller --batch-size" if self.batch_size > 1 else "--offload model"
        remedy = f"check these arguments, or save memory with {savings}"
        return call_failed(self.pipeline.__name__, error, self.given, remedy)

    def with_flags(self, text: str) -> str:
        """Return a message of the library with the flags of the arguments that it names."""
        from ertacache.pipelines.uncached import CALL_NAMES

        flags = {CALL_NAMES.get(name, name): f"--{flag_of(name)}" for name in FLAGS}
        flags |= {"batch_size": "--batch-size"}
        with_value = {name: f"{flag} " for name, flag in flags.items()}
        with_value |= {name: f"--set {name}=" for name, _ in map(_parsed, self.settings)}
        alone = {name: flag for name, flag in flags.items() if "_" in name}  # no words of plain English

        def as_typed(found: re.Match) -> str:
            return (with_value if found[2] else alone).get(found[1], found[0])

        text = IN_TEXT.sub(as_typed, text)
        text = f"--{text}" if text.startswith(OWN) else text
        text = IN_PYTHON.sub(lambda _: f"`{self.calibrate} …`", text)
        return text.replace("on_drift='compute'", "--on-drift compute")

    @property
    def given(self) -> str:
        """The given arguments of the call, as they stand on the command line."""
        words = [word for name, value in self.flags.items() for word in (f"--{flag_of(name)}", str(value))]
        return shlex.join(words + [word for text in self.settings for word in ("--set", text)])

    def words(self) -> list[str]:
        """Return the given arguments as the command line takes them."""
        options = {"dtype": self.dtype, "device": self.device, "revision": self.revision}
        options["offload"] = None if self.offload == "none" else self.offload
        given = {**self.flags, **{name: value for name, value in options.items() if value is not None}}
        words = [word for name, value in given.items() for word in (f"--{flag_of(name)}", str(value))]
        return words + [word for text in self.settings for word in ("--set", text)]


def flag_of(name: str) -> str:
    """Return a setting's flag without its dashes."""
    return name.replace("_", "-")


def _parsed(text: str) -> tuple[str, Any]:
    """Return NAME and value of NAME=VALUE: JSON, or text where it is no JSON."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        remedy = "write NAME=VALUE, for example --set max_sequence_length=128"
        raise UserError(f"--set {printable(text, LONGEST)}: {remedy}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value
