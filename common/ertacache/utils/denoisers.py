"""Which parts of a diffusers pipeline are its denoisers."""

from typing import Any

DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")  # attributes; the last two of Stable Cascade


def denoisers_of(pipe) -> dict[str, Any]:
    """Return a pipeline's denoisers by the names of its attributes: two for Wan2.2, one for most others."""
    parts = {name: getattr(pipe, name, None) for name in DENOISERS}
    return {name: part for name, part in parts.items() if part is not None}


def denoiser_of(pipe):
    """Return a pipeline's first denoiser; None without one."""
    return next(iter(denoisers_of(pipe).values()), None)
