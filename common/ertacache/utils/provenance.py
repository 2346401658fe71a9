"""What a measured number depends on: weights, library versions and the machine; and its peak memory."""

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def fingerprint(pipe) -> str:
    """Tells two checkpoints of one architecture apart: a hash of each parameter's first 16 values, in bfloat16.

    pipe: a pipeline, whose transformers are looked at: Wan2.2 has two.
    """
    modules = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    parts = [part for module in modules if module is not None for p in module.parameters() for part in _parts(p)]
    if any(part.is_meta for part in parts):  # under sequential offload the weights are elsewhere
        return "offloaded"
    heads = [part.detach().flatten()[:16].to("cpu", torch.bfloat16).float() for part in parts]
    return hashlib.sha256(torch.cat(heads).numpy().tobytes()).hexdigest()[:16]


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor itself; of a quantised (torchao) or sharded one the plain tensors that it consists of."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return [part for name in names for part in _parts(getattr(tensor, name))] or [tensor]


def library_versions() -> dict[str, str]:
    found = {}
    for name in ("ertacache", "torch", "diffusers", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> str:
    """One line: the GPU's name, or the processor architecture and the number of cores in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores"
