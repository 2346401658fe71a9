"""What a measured number depends on: weights, library versions and the machine."""

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from ertacache.utils.denoisers import denoisers_of


def fingerprint(pipe) -> str:
    """Return a hash that tells checkpoints of one architecture apart: of each parameter's first 16 values in bfloat16.

    Args:
        pipe: The pipeline.

    Returns:
        16 hexadecimal digits, or "offloaded" where the weights are not in memory.
    """
    parameters = [p for module in denoisers_of(pipe).values() for p in module.parameters()]
    tensors = [tensor for p in parameters for tensor in _plain_tensors(p)]
    if any(tensor.is_meta for tensor in tensors):  # sequential offload keeps the weights elsewhere
        return "offloaded"
    heads = [tensor.detach().flatten()[:16].to("cpu", torch.bfloat16).float() for tensor in tensors]
    return hashlib.sha256(torch.cat(heads).numpy().tobytes()).hexdigest()[:16]


def _plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors inside a quantised (torchao) or sharded one; a plain tensor returns itself."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return [plain for name in names for plain in _plain_tensors(getattr(tensor, name))] or [tensor]


def library_versions() -> dict[str, str]:
    """Return the versions of ertacache, torch, diffusers and transformers, by name."""
    versions = {}
    for name in ("ertacache", "torch", "diffusers", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def measured_with() -> str:
    """Return machine and library versions in one line."""
    versions = library_versions()
    return f"{machine()}; torch {versions['torch'].split('+')[0]}, diffusers {versions['diffusers']}"


def machine(device: torch.device | None = None) -> str:
    """Return the GPU's name, or the processor architecture and the number of usable cores.

    Args:
        device: That was measured on; by default a GPU where there is one.
    """
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {usable_cores()} cores"


def usable_cores() -> int:
    """Return the number of cores that this process may use; where the system does not say (macOS, Windows), of all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
