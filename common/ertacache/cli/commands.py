"""The commands and the options of their own; the shared ones are in options.py."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from ertacache import __version__
from ertacache.cli.options import FPS, given_path, path_option, takes_request
from ertacache.cli.request import Request
from ertacache.utils.checks import LARGEST_FPS
from ertacache.utils.errors import printable

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: ertacache generate black-forest-labs/FLUX.1-dev --prompt 'a fox' --steps 30 --speedup 2",
)
EXAMPLES = {  # by command
    "calibrate": "ertacache calibrate black-forest-labs/FLUX.1-dev --prompts prompts.txt --steps 30 --out plans",
    "import": "ertacache import black-forest-labs/FLUX.1-dev 0,1,2,4,8,16 --steps 30 --out plan.json",
    "generate": "ertacache generate black-forest-labs/FLUX.1-dev --prompt 'a fox' --steps 30 --speedup 2 --compare",
    "evaluate": "ertacache evaluate black-forest-labs/FLUX.1-dev --prompts prompts.txt --steps 30",
}
Seed = Annotated[int, typer.Option(help="seed of the first prompt; the next one has seed + 1, and so on")]


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    """Run a diffusion transformer at a fraction of its model calls, with hardly a visible change."""


@app.command(epilog=f"Example: {EXAMPLES['calibrate']}")
@takes_request
def calibrate(
    request: Request,
    out: Annotated[Path, path_option("FOLDER", "for the plans, and for what a killed run resumes from")],
    speedups: Annotated[str, typer.Option(metavar="S,S,…", help="plans that compute T/S of T steps")] = "2,3",
    seed: Seed = 0,
    effort: Annotated[
        str, typer.Option(help="what it may cost: quick, normal, thorough or a number of minutes")
    ] = "normal",
    force: Annotated[bool, typer.Option("--force", help="overwrite existing plans")] = False,
) -> None:
    """Make plans for a model and its settings.

    The same command resumes where an interrupted one stopped.

    To share the work between GPUs: accelerate launch -m ertacache calibrate …
    """
    from ertacache.cli.calibrate import run

    run(request, out, speedups, seed, effort, force)


@app.command("import", epilog=f"Example: {EXAMPLES['import']}")
@partial(takes_request, needs_prompts=False, without=("prompt", "prompts", "batch_size"))
def import_plan(
    request: Request,
    schedule: Annotated[
        str, typer.Argument(metavar="SCHEDULE", help="a released list, a .pt or .json file, or computed steps 0,1,2,…")
    ],
    out: Annotated[Path, path_option("FILE", "for the plan, a .json file")],
    prompt: Annotated[str, typer.Option(help="of the call that is begun, where it must not be empty")] = "",
    force: Annotated[bool, typer.Option("--force", help="overwrite an existing plan")] = False,
) -> None:
    """Make a plan of a schedule that was found elsewhere, for a model and its settings."""
    from ertacache.cli.released import run

    run(request, schedule, out, prompt, force)


@app.command("inspect", epilog="Example: ertacache inspect plans/FLUX.1-dev-15-of-30.json")
def inspect_plan(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="a plan file, a folder with one, or hf://OWNER/NAME")],
    json: Annotated[bool, typer.Option("--json", help="the whole plan as JSON")] = False,
) -> None:
    """Draw a plan's schedule, and show what it is for and how it was made."""
    from ertacache.cli.inspect import show

    show(plan, json)


stored_plans = typer.Typer(invoke_without_command=True, epilog="Example: ertacache plans show 3f2a91c0-15")
app.add_typer(stored_plans, name="plans")


@stored_plans.callback()
def plans(context: typer.Context) -> None:
    """List the plans that ertacache.accelerate and --speedup have made; show or delete them."""
    if context.invoked_subcommand is None:
        from ertacache.cli.plans import show_all

        show_all()


@stored_plans.command("show")
def show_plan(name: Annotated[str, typer.Argument(metavar="NAME", help="as listed, or its beginning")]) -> None:
    """Draw a stored plan."""
    from ertacache.cli.plans import show

    show(name)


@stored_plans.command("delete")
def delete_plans(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="as listed, or their beginnings")] = None,
    everything: Annotated[bool, typer.Option("--all", help="every plan")] = False,
) -> None:
    """Delete stored plans; they are made anew where they are asked for again."""
    from ertacache.cli.plans import delete

    delete(names or [], everything)


@app.command(epilog=f"Example: {EXAMPLES['generate']}")
@takes_request
def generate(
    request: Request,
    plan: Annotated[str | None, typer.Option(metavar="PLAN", help="a plan; without --speedup: uncached")] = None,
    speedup: Annotated[
        float | None, typer.Option(metavar="S", help="T/S of T steps, by a stored plan or one made now; or of a set")
    ] = None,
    seed: Seed = 1000,
    out: Annotated[Path, path_option("FOLDER", "for one .png or .mp4 per prompt")] = Path("sample"),
    compare: Annotated[bool, typer.Option("--compare", help="also run uncached, and compare")] = False,
    fps: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_FPS, help=f"frames per second of the .mp4 files; default: {FPS}")
    ] = None,
    on_drift: Annotated[
        Literal["warn", "compute", "ignore"] | None,
        typer.Option(help="where a run is unlike the plan's calibration: warn once (default), or compute more steps"),
    ] = None,
) -> None:
    """Make images or videos, with a plan or without.

    A run that was broken off goes on with what is missing.

    To share the prompts between GPUs: accelerate launch -m ertacache generate …
    """
    from ertacache.cli.generate import Output, run

    run(request, plan, speedup, seed, Output(out, compare, fps), on_drift)


@app.command(epilog=f"Example: {EXAMPLES['evaluate']}")
@partial(takes_request, needs_prompts=False)
def evaluate(
    request: Request,
    plan: Annotated[
        list[str] | None, typer.Option(metavar="PLAN", help="measure this one; may be given several times")
    ] = None,
    out: Annotated[
        Path | None,
        path_option("FOLDER", "for the comparison; without --plan: ertacache-evaluation"),
    ] = None,
    calibration_prompts: Annotated[
        Path | None, path_option("FILE", "what the comparison learns on, one prompt a line")
    ] = None,
    seed: Seed = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="timed calls of each, in turn; the median counts")] = 5,
    json: Annotated[Path | None, path_option("FILE", "also write the rows there")] = None,
) -> None:
    """Compare plans with fewer steps and other methods: speed-up, and quality against the uncached run.

    Without --plan: budget plans at 2× and 3×, stored ones or calibrated now.

    With --plan and --out: the plans given. With --plan alone: these and fewer steps only.

    A run that was broken off goes on with what is missing.

    To share the prompts between GPUs: accelerate launch -m ertacache evaluate …
    """
    from ertacache.cli.evaluate import run

    run(request, plan or [], out, calibration_prompts, seed, repeats, json)


comfyui_nodes = typer.Typer(no_args_is_help=True, epilog="Example: ertacache comfyui install ~/ComfyUI")
app.add_typer(comfyui_nodes, name="comfyui")
Checkout = Annotated[
    Path, typer.Argument(metavar="PATH", parser=given_path, help="ComfyUI's folder, the one with main.py")
]


@comfyui_nodes.callback()
def comfyui() -> None:
    """Install the nodes for ComfyUI, or remove them."""


@comfyui_nodes.command("install")
def install_nodes(path: Checkout) -> None:
    """Write a node folder, which imports the nodes from the installed ertacache; safe to repeat."""
    from ertacache.cli.comfyui import install

    print(f"wrote {install(path)}; ComfyUI's Python must have ertacache: restart ComfyUI")


@comfyui_nodes.command("remove")
def remove_nodes(path: Checkout) -> None:
    """Delete what install has written, and nothing else."""
    from ertacache.cli.comfyui import remove

    folder, left = remove(path)
    print(f"removed {folder}" + (f"; left in it: {', '.join(printable(other.name) for other in left)}" if left else ""))
