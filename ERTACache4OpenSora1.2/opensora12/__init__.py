"""Open-Sora 1.2 in the manner of diffusers: STDiT3, its video autoencoder, rectified flow, pipeline and checkpoints."""

from .autoencoder import AutoencoderOpenSora
from .convert import load_pipeline, load_transformer, load_vae
from .pipeline import OpenSoraPipeline, OpenSoraPipelineOutput
from .scheduler import RFlowScheduler
from .transformer import STDiT3Transformer3DModel

__all__ = [
    "AutoencoderOpenSora",
    "OpenSoraPipeline",
    "OpenSoraPipelineOutput",
    "RFlowScheduler",
    "STDiT3Transformer3DModel",
    "load_pipeline",
    "load_transformer",
    "load_vae",
]
