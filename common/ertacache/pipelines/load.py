"""Loading a diffusers pipeline from a directory or the Hub: every failure is one line that names the remedy."""

import json
from pathlib import Path

from ertacache.utils.errors import UserError, reason_of


def check_model_directory(path: Path, expected_class: str) -> None:
    """Name what is missing from a local pipeline directory before hundreds of lines of loading code do."""
    again = f"download it again with `hf download REPO --local-dir {path}`"
    if not (path / "model_index.json").is_file():
        raise UserError(f"{path} has no model_index.json, so it is no diffusers pipeline: {again}")
    try:
        index = json.loads((path / "model_index.json").read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}/model_index.json is damaged: {again}") from error
    if index.get("_class_name") != expected_class:
        raise UserError(f"{path} holds a {index.get('_class_name')}, this folder runs {expected_class}")
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        component = path / name
        if not component.is_dir() or not any(component.iterdir()):
            raise UserError(f"{component} is missing or empty, the model is only partly downloaded: {again}")
        if "config.json" in (f.name for f in component.iterdir()):
            _check_weights(component, again)


def _check_weights(component: Path, again: str) -> None:
    wanted = set()
    for index in component.glob("*.safetensors.index.json"):
        wanted |= set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    missing = sorted(name for name in wanted if not (component / name).is_file())
    found = [f for pattern in ("*.safetensors", "*.bin") for f in component.glob(pattern)]
    if missing or not found:
        name = component / missing[0] if missing else f"the weights of {component}"
        raise UserError(f"{name} is missing, the model is only partly downloaded: {again}")


def load_pipeline(pipeline_class, model: str | Path, device: str, dtype, offload: str = "none", read=None):
    """A pipeline from a local directory or the hub, on its device. Every failure is one clear line.

    read(model, dtype): loads what is not in diffusers' format, in place of from_pretrained.
    """
    import torch
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what goes wrong is said once, below
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device is visible here; use --device cpu")
    if offload != "none" and device.type == "cpu":
        raise UserError(f"--offload {offload} moves parts of the model to a GPU in turn: it needs --device cuda")
    path = Path(model).expanduser()
    if path.is_dir():
        if read is None:
            check_model_directory(path, pipeline_class.__name__)
    elif path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1:
        raise UserError(f"--model {model}: no such directory, and no hub id of the form OWNER/NAME; try --model demo")
    try:
        read = read or pipeline_class.from_pretrained
        pipe = read(str(path) if path.is_dir() else str(model), dtype=dtype)
    except UserError:
        raise
    except Exception as error:  # hub, json, safetensors and torch all raise their own types here
        remedy = "the files are damaged, download them again" if path.is_dir() else "check the id, network and hf login"
        raise UserError(f"cannot load --model {model} ({reason_of(error)}): {remedy}, or try --model demo") from error
    pipe.set_progress_bar_config(disable=True)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe
