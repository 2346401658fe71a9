"""Open-Sora 1.2 from the checkpoints that its authors published, renamed to the modules here.

Names are pairs of patterns, upstream's and ours; `*` stands for one part of a name, `**` for one or more, and what they
stand for is kept. Both directions use the same pairs.

    python -m opensora12.convert hpcai-tech/OpenSora-STDiT-v3 opensora-1.2

writes a directory that `OpenSoraPipeline.from_pretrained` loads at once, about 25 GB.
"""

import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers.models.modeling_utils import load_state_dict
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, T5EncoderModel

from ertacache.cli.arguments import ArgumentParser
from ertacache.utils.errors import UserError, run_program
from ertacache.utils.files import ensure_writable

from .autoencoder import AutoencoderOpenSora
from .layers import inverse_frequencies
from .pipeline import OpenSoraPipeline
from .scheduler import RFlowScheduler
from .transformer import STDiT3Transformer3DModel

TRANSFORMER = "hpcai-tech/OpenSora-STDiT-v3"
VAE = "hpcai-tech/OpenSora-VAE-v1.2"
TEXT_ENCODER = "DeepFloyd/t5-v1_1-xxl"
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.ckpt")
REMEDY = "check the name and the network, or download it again"

Names = list[tuple[str, str]]
Weights = Mapping[str, torch.Tensor]


def _nested(parents: Iterable[tuple[str, str]], children: Iterable[tuple[str, str]]) -> Names:
    return [(f"{a}.{c}", f"{b}.{d}") for a, b in parents for c, d in children]


TRANSFORMER_NAMES: Names = [
    ("rope.freqs", "rope.freqs"),
    ("x_embedder.proj.*", "patch_embed.proj.*"),
    ("t_embedder.mlp.0.*", "time_embed.linear_1.*"),
    ("t_embedder.mlp.2.*", "time_embed.linear_2.*"),
    ("fps_embedder.mlp.0.*", "fps_embed.linear_1.*"),
    ("fps_embedder.mlp.2.*", "fps_embed.linear_2.*"),
    ("t_block.1.*", "time_modulation.*"),
    ("y_embedder.y_embedding", "y_embedding"),
    ("y_embedder.y_proj.fc1.*", "caption_projection.linear_1.*"),
    ("y_embedder.y_proj.fc2.*", "caption_projection.linear_2.*"),
    ("final_layer.scale_shift_table", "scale_shift_table"),
    ("final_layer.linear.*", "proj_out.*"),
    *_nested(
        [("spatial_blocks.*", "transformer_blocks.*"), ("temporal_blocks.*", "temporal_transformer_blocks.*")],
        [
            ("scale_shift_table", "scale_shift_table"),
            ("attn.qkv.*", "attn.to_qkv.*"),
            ("attn.q_norm.*", "attn.norm_q.*"),
            ("attn.k_norm.*", "attn.norm_k.*"),
            ("attn.proj.*", "attn.to_out.*"),
            ("cross_attn.q_linear.*", "cross_attn.to_q.*"),
            ("cross_attn.kv_linear.*", "cross_attn.to_kv.*"),
            ("cross_attn.proj.*", "cross_attn.to_out.*"),
            ("mlp.fc1.*", "ff.net.0.proj.*"),
            ("mlp.fc2.*", "ff.net.2.*"),
        ],
    ),
]
VAE_NAMES: Names = [
    ("spatial_vae.module.**", "spatial.**"),
    ("temporal_vae.quant_conv.conv.*", "temporal.quant_conv.*"),
    ("temporal_vae.post_quant_conv.conv.*", "temporal.post_quant_conv.*"),
    ("temporal_vae.encoder.conv_in.conv.*", "temporal.encoder.conv_in.*"),
    ("temporal_vae.encoder.conv_blocks.*.conv.*", "temporal.encoder.downsamplers.*.*"),
    ("temporal_vae.encoder.norm1.*", "temporal.encoder.norm_out.*"),
    ("temporal_vae.encoder.conv2.conv.*", "temporal.encoder.conv_out.*"),
    ("temporal_vae.decoder.conv1.conv.*", "temporal.decoder.conv_in.*"),
    ("temporal_vae.decoder.conv_blocks.*.conv.*", "temporal.decoder.upsamplers.*.*"),
    ("temporal_vae.decoder.norm1.*", "temporal.decoder.norm_out.*"),
    ("temporal_vae.decoder.conv_out.conv.*", "temporal.decoder.conv_out.*"),
    *_nested(
        [
            ("temporal_vae.*.res_blocks.*", "temporal.*.mid.*"),
            ("temporal_vae.*.block_res_blocks.*.*", "temporal.*.levels.*.*"),
        ],
        [
            ("norm1.*", "norm1.*"),
            ("conv1.conv.*", "conv1.*"),
            ("norm2.*", "norm2.*"),
            ("conv2.conv.*", "conv2.*"),
            ("conv3.conv.*", "shortcut.*"),
        ],
    ),
]


# What is recognised by the beginning of a name, the first that fits; only the last two are Open-Sora 1.2.
CHECKPOINTS = [
    (r"double_blocks\.", "Open-Sora 2.0 (MMDiT)"),
    (r"t_block_temp\.", "Open-Sora 1.1 (STDiT2)"),
    (r"blocks\.\d+\.attn_temp\.", "Open-Sora 1.0 (STDiT)"),
    (r"spatial_blocks\.", "the transformer of Open-Sora 1.2 (STDiT3)"),
    (r"temporal_vae\.", "the video autoencoder of Open-Sora 1.2"),
]


def rename(name: str, names: Names) -> str | None:
    """The other side of the first pair that the name matches, or None."""
    for pattern, other in names:
        regex = re.escape(pattern).replace(r"\*\*", "(.+)").replace(r"\*", r"([^.]+)")
        if match := re.fullmatch(regex, name):
            return re.sub(r"\*+", "{}", other).format(*match.groups())
    return None


def back(names: Names) -> Names:
    """The pairs that lead from our names to upstream's."""
    return [(ours, upstream) for upstream, ours in names]


def transformer_state_dict(upstream: Weights, source: str | Path = "the checkpoint") -> dict[str, torch.Tensor]:
    """STDiT3's weights under our names; a missing `rope.freqs` is computed, for it is not trained."""
    state = _renamed(upstream, TRANSFORMER_NAMES, f"{source} is not the transformer of Open-Sora 1.2", TRANSFORMER)
    norm = state.get("transformer_blocks.0.attn.norm_q.weight")
    if norm is not None:
        state.setdefault("rope.freqs", inverse_frequencies(len(norm)))
    return state


def vae_state_dict(upstream: Weights, source: str | Path = "the checkpoint") -> dict[str, torch.Tensor]:
    """The autoencoder's weights under our names, without `shift` and `scale`, which our config holds."""
    weights = {name: tensor for name, tensor in upstream.items() if name not in ("shift", "scale")}
    return _renamed(weights, VAE_NAMES, f"{source} is not the video autoencoder of Open-Sora 1.2", VAE)


def load_transformer(path: str | Path = TRANSFORMER, dtype: torch.dtype | None = None) -> STDiT3Transformer3DModel:
    """A published transformer: hub id, directory, or file of weights. Its sizes are those of the config.json beside."""
    file, weights = _read(path)
    sizes = _sizes_beside(file, STDiT3Transformer3DModel)
    state = transformer_state_dict(weights, path)
    return _model(STDiT3Transformer3DModel, sizes, state, TRANSFORMER_NAMES, path, dtype)


def load_vae(path: str | Path = VAE, dtype: torch.dtype | None = None, **sizes) -> AutoencoderOpenSora:
    """A published autoencoder, with its `shift` and `scale` in the config. sizes: others than its config.json has."""
    file, weights = _read(path)
    statistics = {f"latents_{n}": weights[n].flatten().tolist() for n in ("shift", "scale") if n in weights}
    sizes = _sizes_beside(file, AutoencoderOpenSora) | statistics | sizes
    return _model(AutoencoderOpenSora, sizes, vae_state_dict(weights, path), VAE_NAMES, path, dtype)


def _sizes_beside(file: Path, model_class: type) -> dict:
    """Return the arguments of a class that the config.json beside a file of weights has."""
    config = file.with_name("config.json")
    published = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    known = inspect.signature(model_class.__init__).parameters
    return {name: value for name, value in published.items() if name in known}


def load_pipeline(
    transformer: str | Path = TRANSFORMER,
    vae: str | Path = VAE,
    text_encoder: str | Path = TEXT_ENCODER,
    dtype: torch.dtype = torch.bfloat16,
) -> OpenSoraPipeline:
    """The pipeline of three published checkpoints, each a hub id or a directory; `save_pretrained` writes it as one."""
    transformer, vae = load_transformer(transformer, dtype), load_vae(vae, dtype)  # small, and refused first
    try:
        tokenizer = AutoTokenizer.from_pretrained(text_encoder)
        encoder = T5EncoderModel.from_pretrained(text_encoder, dtype=dtype)
    except Exception as error:  # hub, json, safetensors and sentencepiece raise their own types here
        raise UserError(f"cannot load the text encoder {text_encoder} ({_first_line(error)}): {REMEDY}") from error
    return OpenSoraPipeline(tokenizer, encoder, vae, transformer, RFlowScheduler())


def load_published(model: str | Path, dtype: torch.dtype = torch.bfloat16) -> OpenSoraPipeline:
    """The pipeline of a published transformer, with the published autoencoder and text encoder from the hub.

    model: hub id or directory of the transformer, or a directory in which copies of the three repositories lie under
    their own names (OpenSora-STDiT-v3, OpenSora-VAE-v1.2, t5-v1_1-xxl). Copies next to the transformer's
    directory are used too; what is missing comes from the hub.
    """
    path = Path(model).expanduser()
    names = {hub_id: hub_id.split("/")[1] for hub_id in (TRANSFORMER, VAE, TEXT_ENCODER)}
    if any((path / name).is_dir() for name in names.values()):
        return load_pipeline(*_copies(path, names), dtype=dtype)
    others = _copies(path.resolve().parent, names)[1:] if path.is_dir() else ()
    return load_pipeline(model, *others, dtype=dtype)


def _copies(folder: Path, names: Mapping[str, str]) -> list[Path | str]:
    """Return the directory of each name in a folder, or where there is none the Hub id."""
    return [folder / name if (folder / name).is_dir() else hub_id for hub_id, name in names.items()]


def _read(path: str | Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file of weights that a hub id, a directory or a file leads to, and what is in it."""
    folder = Path(path).expanduser()
    try:
        if not folder.exists():
            folder = Path(snapshot_download(str(path), allow_patterns=["config.json", *WEIGHTS]))
        files = [folder] if folder.is_file() else [folder / n for n in WEIGHTS if (folder / n).is_file()]
        if not files:
            raise UserError(f"{path} has none of {', '.join(WEIGHTS)}: give the directory of a checkpoint")
        return files[0], load_state_dict(str(files[0]))
    except UserError:
        raise
    except Exception as error:  # hub, safetensors and pickle raise their own types here
        raise UserError(f"cannot load {path} ({_first_line(error)}): {REMEDY}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[0], 160, placeholder=" …")


def _renamed(upstream: Weights, names: Names, complaint: str, wanted: str) -> dict[str, torch.Tensor]:
    ours = {name: rename(name, names) for name in upstream}
    strange = [name for name, other in ours.items() if other is None]
    if strange:
        guesses = (kind for pattern, kind in CHECKPOINTS if any(re.match(pattern, name) for name in upstream))
        kind = next(guesses, "something else")
        lacking = [
            pattern for pattern, _ in names if not any(rename(name, [(pattern, "")]) is not None for name in ours)
        ]
        found = f"with {_some(strange)}" + (f" and without {_some(lacking)}" if lacking else "")
        raise UserError(f"{complaint} but looks like {kind}, {found}: give {wanted} or a copy of it")
    return {ours[name]: tensor for name, tensor in upstream.items()}


def _model(model_class, sizes: dict, state: dict, names: Names, source: str | Path, dtype: torch.dtype | None):
    """A model of these sizes with exactly these weights."""
    with torch.device("meta"):
        model = model_class(**sizes)
    wanted = model.state_dict()
    shapes = {n: f"{rename(n, back(names))} {list(state[n].shape)}" for n in wanted if n in state}
    for problem, found in {
        "lacks": [rename(n, back(names)) for n in wanted if n not in state],
        "has besides": [rename(n, back(names)) for n in state if n not in wanted],
        "has of another size": [shape for n, shape in shapes.items() if state[n].shape != wanted[n].shape],
    }.items():
        if found:
            raise UserError(f"{source} {problem} {_some(found)}: it is incomplete or not of its config.json's sizes")
    model.load_state_dict(state, assign=True)
    return (model if dtype is None else model.to(dtype)).eval()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def main() -> None:
    parser = ArgumentParser(description="Write Open-Sora 1.2 as a directory in diffusers' format.")
    parser.add_argument(
        "source", help="hub id or directory of the transformer, or a directory of all three checkpoints"
    )
    parser.add_argument("out", help="the directory to write")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args()
    out = ensure_writable(args.out)
    load_published(args.source, getattr(torch, args.dtype)).save_pretrained(out)


if __name__ == "__main__":
    run_program(main)
