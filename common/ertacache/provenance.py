"""What a measured number depends on: library versions and the machine; and its peak memory."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch


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


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float | None:
    """MiB on a GPU since the reset, None elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
