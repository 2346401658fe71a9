"""Open-Sora 1.2 in the manner of diffusers."""

from .autoencoder import AutoencoderOpenSora

__all__ = ["AutoencoderOpenSora"]
