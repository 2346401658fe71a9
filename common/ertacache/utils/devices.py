"""Synchronization and peak memory of the device that a pipeline runs on."""

import torch


def synchronize(pipe) -> None:
    """Wait for the GPU of a pipeline; does nothing on other devices."""
    if pipe._execution_device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of the peak memory of a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory of a GPU since the reset in MiB; None on other devices."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
