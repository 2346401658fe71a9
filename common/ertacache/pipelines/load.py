"""Loading a diffusers pipeline from a directory or the Hub: every failure is one line that names the remedy."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from ertacache.plans.names import model_source
from ertacache.utils.errors import UserError, reason_of


def load_pipeline(
    pipeline_class: type,
    model: str | Path,
    device: str,
    dtype,
    offload: str = "none",
    read: Callable | None = None,
    **options,
):
    """Load a pipeline onto its device.

    Args:
        pipeline_class: Of diffusers, or like one.
        model: A local directory, or a Hub id OWNER/NAME.
        device: "cpu", "cuda", "cuda:N" or "mps".
        dtype: Of the weights.
        offload: "none"; "model" or "sequential" move parts of the model to a GPU in turn.
        read: read(model, dtype=…) loads what is not in diffusers' format, in place of from_pretrained.
        **options: Further arguments of from_pretrained, for example revision.

    Raises:
        UserError: No such device, directory or Hub id; a partly downloaded or damaged model.
    """
    from diffusers.utils import logging

    from ertacache.utils.devices import checked_device

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # an error is one line, below
    device = checked_device(device)
    if offload != "none" and device.type == "cpu":
        raise UserError(f"--offload {offload} moves parts of the model to a GPU in turn: it needs --device cuda")
    source = model_source(str(model))
    with one_line_errors(model):
        if read is None and Path(source).is_dir():
            check_model_directory(Path(source), pipeline_class.__name__)
        pipe = (read or pipeline_class.from_pretrained)(source, dtype=dtype, **options)
    pipe.set_progress_bar_config(disable=True)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


@contextlib.contextmanager
def one_line_errors(model: str | Path) -> Iterator[None]:
    """Turn whatever fails while a model is loaded into one line about the model."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # hub, json, safetensors and torch all raise their own types here
        local = Path(model).expanduser().is_dir()
        remedy = "the files are damaged, download them again" if local else "check the id, network and hf login"
        raise UserError(f"cannot load {model} ({reason_of(error)}): {remedy}") from error


def check_model_directory(path: Path, expected_class: str) -> None:
    """Name what is missing from a local pipeline directory before hundreds of lines of loading code do.

    Args:
        path: The directory.
        expected_class: Of the pipeline, by its model_index.json.
    """
    again = f"download it again with `hf download REPO --local-dir {path}`"
    if not (path / "model_index.json").is_file():
        raise UserError(f"{path} has no model_index.json, so it is no diffusers pipeline: {again}")
    try:
        index = json.loads((path / "model_index.json").read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}/model_index.json is damaged: {again}") from error
    if index.get("_class_name") != expected_class:
        raise UserError(f"{path} holds a {index.get('_class_name')}, not a {expected_class}: give another --model")
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        component = path / name
        if not component.is_dir() or not any(component.iterdir()):
            raise UserError(f"{component} is missing or empty, the model is only partly downloaded: {again}")
        if "config.json" in (file.name for file in component.iterdir()):
            _check_weights(component, again)


def _check_weights(component: Path, again: str) -> None:
    shards: set[str] = set()
    for index in component.glob("*.safetensors.index.json"):
        shards |= set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    missing = sorted(name for name in shards if not (component / name).is_file())
    present = [file for pattern in ("*.safetensors", "*.bin") for file in component.glob(pattern)]
    if missing or not present:
        name = component / missing[0] if missing else f"the weights of {component}"
        raise UserError(f"{name} is missing, the model is only partly downloaded: {again}")
