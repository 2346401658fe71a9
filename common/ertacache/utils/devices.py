"""The device that a pipeline runs on: its name, synchronization, peak memory; main memory."""

from pathlib import Path

import torch

from ertacache.utils.errors import UserError, shown


def default_device() -> str:
    """Return "cuda" where there is a GPU, "mps" on a Mac that has one, else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def checked_device(name: str) -> torch.device:
    """Return a device that is here.

    Raises:
        UserError: No such device, or none that models run on.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"--device {shown(name)}: give cpu, cuda, cuda:N or mps") from error
    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type not in present or (device.index or 0) >= present[device.type]:
        here = [kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}" for kind, count in present.items() if count]
        raise UserError(f"--device {name}: no such device is visible here; use one of {', '.join(here)}")
    return device


def dtype_for(device: str, name: str | None = None) -> torch.dtype:
    """Return the dtype of this name; by default bfloat16 on a GPU and float32 on the CPU."""
    return getattr(torch, name or ("float32" if device.startswith("cpu") else "bfloat16"))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; does nothing on the CPU."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of the peak memory of a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory of a GPU since the reset in MiB; None on other devices."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def available_memory() -> int | None:
    """Return the bytes of main memory that programs can still take; None where the system does not say (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
