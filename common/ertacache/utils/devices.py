"""The device that a pipeline runs on: waiting for it, and its peak memory."""

import torch


def synchronize(pipe) -> None:
    if pipe._execution_device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float | None:
    """MiB on a GPU since the reset, None elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
