"""The options that the commands share, declared once."""

import functools
import inspect
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from ertacache.cli.arguments import path_of, prompts_of
from ertacache.cli.request import Request
from ertacache.utils.errors import Stopped

CALL = "Arguments of the pipeline's call (left out: its own defaults)"
LOAD = "How the model is loaded"
FPS = 8  # frames per second of videos


def _option(help: str, panel: str | None = None, *flags: str, **details):
    return typer.Option(*flags, help=help, rich_help_panel=panel, **details)


def path_option(metavar: str, help: str):
    """Return an option that takes a path. metavar: FILE or FOLDER."""
    return _option(help, metavar=metavar, parser=given_path)


def given_path(text: str) -> Path:
    """Return the path of an option or an argument."""
    try:
        return path_of(text)
    except ArgumentTypeError as error:
        raise typer.BadParameter(str(error)) from error


def request_of(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="a diffusers pipeline: a folder, or a Hub id OWNER/NAME")
    ],
    prompt: Annotated[list[str] | None, _option("a prompt; may be given several times")] = None,
    prompts: Annotated[Path | None, path_option("FILE", "a text file with one prompt a line")] = None,
    batch_size: Annotated[int, _option("prompts per call", min=1)] = 1,
    steps: Annotated[int | None, _option("T, steps of the uncached run", CALL, min=1)] = None,
    guidance: Annotated[float | None, _option("guidance scale", CALL)] = None,
    height: Annotated[int | None, _option("in pixels", CALL, min=1)] = None,
    width: Annotated[int | None, _option("in pixels", CALL, min=1)] = None,
    frames: Annotated[int | None, _option("frames of the video", CALL, min=1)] = None,
    negative_prompt: Annotated[str | None, _option("prompt of the unconditional branch", CALL)] = None,
    settings: Annotated[
        list[str] | None, _option("any other; VALUE is JSON or text", CALL, "--set", metavar="NAME=VALUE")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, _option("default: float32 on the CPU, else bfloat16", LOAD)
    ] = None,
    device: Annotated[str | None, _option("cpu, cuda, cuda:N or mps; default: a GPU when there is one", LOAD)] = None,
    offload: Annotated[Literal["none", "model", "sequential"], _option("save GPU memory, slower", LOAD)] = "none",
    revision: Annotated[str | None, _option("branch, tag or commit on the Hub; default: main", LOAD)] = None,
    *,
    needs_prompts: bool = True,
) -> Request:
    """Return what the shared options ask for; without prompts, where a command has its own, the request has none."""
    flags = {"steps": steps, "guidance": guidance, "height": height, "width": width, "frames": frames}
    flags["negative_prompt"] = negative_prompt
    given = {name: value for name, value in flags.items() if value is not None}
    texts = prompts_of(prompt, prompts) if needs_prompts or prompt or prompts else []
    return Request(model, texts, batch_size, given, settings or [], dtype, device, offload, revision)


def takes_request(
    command: Callable[..., None], needs_prompts: bool = True, without: Sequence[str] = ()
) -> Callable[..., None]:
    """Turn command(request, …) into a function that has the parameters of `request_of` in place of `request`.

    typer reads options off a signature, so that this is all that it needs.

    Args:
        command: The command.
        needs_prompts: Whether it refuses a command line without prompts.
        without: Shared options that mean nothing to it, so that it has none of them.
    """
    shared = dict(inspect.signature(request_of).parameters)
    for name in ("needs_prompts", *without):
        del shared[name]
    own = {name: p for name, p in inspect.signature(command).parameters.items() if name != "request"}

    @functools.wraps(command)
    def run(**values) -> None:
        request = request_of(**{name: values.pop(name) for name in shared}, needs_prompts=needs_prompts)
        try:
            command(request, **values)
        except KeyboardInterrupt as stop:  # typer would swallow what it says
            raise Stopped(*stop.args) from stop

    model, *others = shared.values()
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (model, *own.values(), *others)]
    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    del run.__wrapped__
    return run
