"""The four commands and their options, as typer reads them off the signatures."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ertacache import __version__
from ertacache.cli.request import Request

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a diffusers pipeline: a folder, or a Hub id OWNER/NAME")]
Prompt = Annotated[list[str] | None, typer.Option(help="a prompt; may be given several times")]
Prompts = Annotated[Path | None, typer.Option(metavar="FILE", help="a text file with one prompt a line")]
Seed = Annotated[int, typer.Option(help="seed of the first prompt; the next one has seed + 1, and so on")]
BatchSize = Annotated[int, typer.Option(min=1, help="prompts a call")]

_CALL = "Arguments of the pipeline's call (left out: its own defaults)"
Steps = Annotated[int | None, typer.Option(min=1, help="T, steps of the uncached run", rich_help_panel=_CALL)]
Guidance = Annotated[float | None, typer.Option(help="scale of the guidance", rich_help_panel=_CALL)]
Height = Annotated[int | None, typer.Option(min=1, help="in pixels", rich_help_panel=_CALL)]
Width = Annotated[int | None, typer.Option(min=1, help="in pixels", rich_help_panel=_CALL)]
Frames = Annotated[int | None, typer.Option(min=1, help="frames of the video", rich_help_panel=_CALL)]
NegativePrompt = Annotated[
    str | None, typer.Option(help="what the unconditional branch is told", rich_help_panel=_CALL)
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="any other; VALUE is JSON or text", rich_help_panel=_CALL),
]

_LOAD = "How the model is loaded"
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="default: bfloat16 on cuda, float32 on the CPU", rich_help_panel=_LOAD),
]
Device = Annotated[str | None, typer.Option(help="default: cuda when there is one, else cpu", rich_help_panel=_LOAD)]
Offload = Annotated[
    Literal["none", "model", "sequential"], typer.Option(help="save GPU memory, slower", rich_help_panel=_LOAD)
]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit on the Hub", rich_help_panel=_LOAD)]


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    """Run a diffusion transformer at a fraction of its model calls, with hardly a visible change."""


@app.command()
def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="where the plans go, and what a killed run goes on from")],
    speedups: Annotated[str, typer.Option(metavar="S,S,…", help="plans that compute T/S of T steps")] = "2,3",
    prompt: Prompt = None,
    prompts: Prompts = None,
    seed: Seed = 0,
    batch_size: BatchSize = 1,
    search: Annotated[int, typer.Option(min=0, metavar="EVALS", help="more replays for a local search, a plan")] = 0,
    force: Annotated[bool, typer.Option("--force", help="write over plans that are there")] = False,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    negative_prompt: NegativePrompt = None,
    settings: Set = None,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = "none",
    revision: Revision = None,
) -> None:
    """Make plans for a model and its settings.

    The same command again goes on where a killed one stopped.

    To share the work between GPUs: accelerate launch -m ertacache calibrate …
    """

    from ertacache.cli.calibrate import run

    flags = _flags(steps, guidance, height, width, frames, negative_prompt)
    request = Request(model, flags, settings or [], dtype, device, offload, revision)
    run(request, out, speedups, prompt, prompts, seed, batch_size, search, force)


@app.command("inspect")
def inspect_plan(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="a plan file, a folder with one, or a Hub id")],
    json: Annotated[bool, typer.Option("--json", help="all of the plan as JSON")] = False,
) -> None:
    """Draw a plan's schedule, and tell what it is for and how it was made."""

    from ertacache.cli.inspect import show

    show(plan, json)


@app.command()
def generate(
    model: Model,
    plan: Annotated[str | None, typer.Option(metavar="PLAN", help="left out: every step is computed")] = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    seed: Seed = 1000,
    batch_size: BatchSize = 1,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="one .png or .mp4 a prompt goes there")] = Path("sample"),
    compare: Annotated[bool, typer.Option("--compare", help="also run uncached, and compare")] = False,
    fps: Annotated[int, typer.Option(min=1, help="frames a second of the .mp4 files")] = 8,
    on_drift: Annotated[
        Literal["warn", "compute", "ignore"],
        typer.Option(help="where a run is unlike the plan's calibration: warn once, or compute more steps"),
    ] = "warn",
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    negative_prompt: NegativePrompt = None,
    settings: Set = None,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = "none",
    revision: Revision = None,
) -> None:
    """Make pictures or videos, with a plan or without."""

    from ertacache.cli.generate import run

    flags = _flags(steps, guidance, height, width, frames, negative_prompt)
    request = Request(model, flags, settings or [], dtype, device, offload, revision)
    run(request, plan, prompt, prompts, seed, batch_size, out, compare, fps, on_drift)


@app.command()
def evaluate(
    model: Model,
    plan: Annotated[list[str], typer.Option(metavar="PLAN", help="may be given several times")],
    prompt: Prompt = None,
    prompts: Prompts = None,
    seed: Seed = 1000,
    batch_size: BatchSize = 1,
    repeats: Annotated[int, typer.Option(min=1, help="timed calls of each, in turn; the median counts")] = 5,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="also write the rows there")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    negative_prompt: NegativePrompt = None,
    settings: Set = None,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = "none",
    revision: Revision = None,
) -> None:
    """Measure plans, and plainly fewer steps, against the uncached run: speed-up and quality."""

    from ertacache.cli.evaluate import run

    flags = _flags(steps, guidance, height, width, frames, negative_prompt)
    request = Request(model, flags, settings or [], dtype, device, offload, revision)
    run(request, plan, prompt, prompts, seed, batch_size, repeats, json)


def _flags(steps, guidance, height, width, frames, negative_prompt) -> dict:
    """Those that were given, by the names of their flags."""
    flags = {"steps": steps, "guidance": guidance, "height": height, "width": width, "frames": frames}
    flags["negative_prompt"] = negative_prompt
    return {name: value for name, value in flags.items() if value is not None}
