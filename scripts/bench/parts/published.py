"""Checkpoint directories with random weights, laid out as the four models are published: `write(model, folder, size)`.

Layout, file names, configs, tokenizer formats and sharding are those of the published repositories; weights are random
(seed 0), in bfloat16. What is smaller is in `FULL`: text encoders have one layer (of 24 of T5, 12 of CLIP), their
tokenizers a vocabulary of a few hundred pieces, trained on a few sentences, with the true special tokens; UMT5 has
32,128 rows in place of 256,384; FLUX has 2 + 4 blocks of its 19 + 38. `TOY` is the same layout at tiny widths.

| model | as |
|---|---|
| ERTACache4FLUX | FLUX.1-dev/ of black-forest-labs |
| ERTACache4Wan2.1 | Wan2.1-T2V-1.3B-Diffusers/ of Wan-AI |
| ERTACache4CogVideoX-2B | CogVideoX-2b/ of THUDM |
| ERTACache4OpenSora1.2 | OpenSora-STDiT-v3/, OpenSora-VAE-v1.2/ of hpcai-tech, t5-v1_1-xxl/ of DeepFloyd |
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ertacache.demos.random_models import MODELS, cogvideox_scheduler, random_module

SENTENCES = ("a lighthouse in a storm", "an old bicycle leans against a yellow wall", "two dogs run along the beach")
SHARD = {"full": "2GB", "toy": "100KB"}  # size of a file of weights
T5_LAYERS, T5_ROWS = 1, 32128
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64}
T5_TOY = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
FLUX_BLOCKS = {"num_layers": 2, "num_single_layers": 4}
FOUR = (8, 8, 8, 8)  # widths of a toy autoencoder
TOY_WAN_VAE = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


@dataclass(frozen=True)
class Sizes:
    """Arguments of a checkpoint's modules where they differ from the published classes' defaults.

    Attributes:
        transformer, vae, text: Of the transformer, the autoencoder and the T5 encoder.
        width: Of the pooled text states (FLUX).
    """

    transformer: dict
    vae: dict
    text: dict
    width: int = 768


FULL = {
    "ERTACache4FLUX": Sizes({"guidance_embeds": True, **FLUX_BLOCKS}, {}, T5_XXL),
    "ERTACache4Wan2.1": Sizes(MODELS["ERTACache4Wan2.1"].full.transformer, {}, T5_XXL),
    "ERTACache4CogVideoX-2B": Sizes({}, {}, T5_XXL),
    "ERTACache4OpenSora1.2": Sizes({}, {}, T5_XXL),
}
TOY = {
    "ERTACache4FLUX": Sizes(
        {**MODELS["ERTACache4FLUX"].small.transformer, "in_channels": 64},
        {"block_out_channels": FOUR, "layers_per_block": 1, "norm_num_groups": 4},
        T5_TOY,
        width=32,
    ),
    "ERTACache4Wan2.1": Sizes(MODELS["ERTACache4Wan2.1"].small.transformer, TOY_WAN_VAE, T5_TOY),
    "ERTACache4CogVideoX-2B": Sizes(
        {**MODELS["ERTACache4CogVideoX-2B"].small.transformer, "max_text_seq_length": 226},
        {"block_out_channels": FOUR, "layers_per_block": 1, "norm_num_groups": 4},
        T5_TOY,
    ),
    "ERTACache4OpenSora1.2": Sizes(
        {**MODELS["ERTACache4OpenSora1.2"].small.transformer, "model_max_length": 300},
        {
            **{f"{stage}_block_out_channels": FOUR for stage in ("spatial", "temporal")},
            **{f"{stage}_norm_num_groups": 4 for stage in ("spatial", "temporal")},
            "spatial_layers_per_block": 1,
            "temporal_num_res_blocks": 1,
        },
        T5_TOY,
    ),
}


def write(model: str, folder: Path, size: str = "full") -> Path:
    """Write the checkpoint of a model.

    Args:
        model: Name of the model folder.
        folder: For checkpoints; each lies in it under its own name on the Hub.
        size: "full" or "toy".

    Returns:
        What `MODEL=…` takes.
    """
    writer, names = WRITERS[model]
    return writer(folder, *names, {"full": FULL, "toy": TOY}[size][model], SHARD[size])


def new(cls, *arguments, **options) -> torch.nn.Module:
    """Return a module with random weights in bfloat16."""
    return random_module("cpu", torch.bfloat16, cls, *arguments, **options)


# --- the four repositories ---------------------------------------------------------------------------------------


def write_flux(folder: Path, name: str, sizes: Sizes, shard: str) -> Path:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    path = folder / name
    vocabulary = write_clip_tokenizer(path / "tokenizer")
    write_t5_tokenizer(path / "tokenizer_2", 512, fast=True)
    clip = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=1,
        num_attention_heads=max(1, sizes.width // 64),
        hidden_act="quick_gelu",
        projection_dim=sizes.width,
        bos_token_id=0,
        eos_token_id=2,  # as published; the model then takes the largest token id for the end
    )
    blocks = 4 * ["DownEncoderBlock2D"], 4 * ["UpDecoderBlock2D"]
    vae = {"down_block_types": blocks[0], "up_block_types": blocks[1], "block_out_channels": (128, 256, 512, 512)}
    vae |= {"layers_per_block": 2, "latent_channels": 16, "sample_size": 1024, "scaling_factor": 0.3611}
    vae |= {"shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
    write_t5(path / "text_encoder_2", sizes.text, shard)
    new(CLIPTextModel, clip).save_pretrained(path / "text_encoder")
    new(AutoencoderKL, **vae | sizes.vae).save_pretrained(path / "vae")
    new(FluxTransformer2DModel, **sizes.transformer).save_pretrained(path / "transformer", max_shard_size=shard)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.save_pretrained(path / "scheduler")
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return write_index(path, "FluxPipeline", "0.30.0.dev0", parts)


def write_wan(folder: Path, name: str, sizes: Sizes, shard: str) -> Path:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    path = folder / name
    write_t5_tokenizer(path / "tokenizer", 512, fast=True, extra=300, bos=True)
    config = UMT5Config(vocab_size=T5_ROWS, num_layers=T5_LAYERS, feed_forward_proj="gated-gelu", **sizes.text)
    new(UMT5EncoderModel, config).save_pretrained(path / "text_encoder", max_shard_size=shard)
    new(AutoencoderKLWan, **sizes.vae).save_pretrained(path / "vae")
    new(WanTransformer3DModel, **sizes.transformer).save_pretrained(path / "transformer", max_shard_size=shard)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    UniPCMultistepScheduler(**flow).save_pretrained(path / "scheduler")
    parts = {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    return write_index(path, "WanPipeline", "0.33.0.dev0", parts)


def write_cogvideox(folder: Path, name: str, sizes: Sizes, shard: str) -> Path:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    path = folder / name
    write_t5_tokenizer(path / "tokenizer", 226, fast=False)
    write_t5(path / "text_encoder", sizes.text, shard)
    vae = {"block_out_channels": (128, 256, 256, 512), "latent_channels": 16, "layers_per_block": 3}
    new(AutoencoderKLCogVideoX, **vae | sizes.vae).save_pretrained(path / "vae")
    transformer = new(CogVideoXTransformer3DModel, **sizes.transformer)
    transformer.save_pretrained(path / "transformer", max_shard_size="10GB")  # one file, as published
    cogvideox_scheduler().save_pretrained(path / "scheduler")
    parts = {
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    return write_index(path, "CogVideoXPipeline", "0.30.0.dev0", parts)


def write_opensora(folder: Path, transformer: str, vae: str, text: str, sizes: Sizes, shard: str) -> Path:
    """Write the three repositories, weights under upstream's own names; T5 in .bin files, as it is published."""
    from safetensors.torch import save_file

    from opensora12 import AutoencoderOpenSora, STDiT3Transformer3DModel
    from opensora12.convert import TRANSFORMER_NAMES, VAE_NAMES, back, rename

    def save(module, path: Path, names, **more) -> None:
        state = {rename(n, back(names)): tensor.contiguous() for n, tensor in module.state_dict().items()}
        path.mkdir(parents=True, exist_ok=True)
        save_file(state | more, path / "model.safetensors")
        config = {name: value for name, value in module.config.items() if not name.startswith("_")}
        write_json(path / "config.json", config)

    save(new(STDiT3Transformer3DModel, **sizes.transformer), folder / transformer, TRANSFORMER_NAMES)
    autoencoder = new(AutoencoderOpenSora, **sizes.vae)
    statistics = (autoencoder.config.latents_shift, autoencoder.config.latents_scale)
    shift, scale = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in statistics)
    save(autoencoder, folder / vae, VAE_NAMES, shift=shift, scale=scale)
    write_t5_tokenizer(folder / text, 512, fast=False)
    write_t5(folder / text, sizes.text, shard)
    _safetensors_to_bin(folder / text)
    return folder


def _safetensors_to_bin(path: Path) -> None:
    """Replace files of weights by those of torch.save, and their index."""
    from safetensors.torch import load_file

    def old(name: str) -> str:
        return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")

    for file in sorted(path.glob("*.safetensors")):
        torch.save(load_file(file), path / old(file.name))
        file.unlink()
    for index in path.glob("*.safetensors.index.json"):
        content = json.loads(index.read_text("utf-8"))
        content["weight_map"] = {name: old(file) for name, file in content["weight_map"].items()}
        write_json(path / old(index.name), content)
        index.unlink()


WRITERS: dict[str, tuple[Callable[..., Path], tuple[str, ...]]] = {
    "ERTACache4FLUX": (write_flux, ("FLUX.1-dev",)),
    "ERTACache4Wan2.1": (write_wan, ("Wan2.1-T2V-1.3B-Diffusers",)),
    "ERTACache4CogVideoX-2B": (write_cogvideox, ("CogVideoX-2b",)),
    "ERTACache4OpenSora1.2": (write_opensora, ("OpenSora-STDiT-v3", "OpenSora-VAE-v1.2", "t5-v1_1-xxl")),
}

# --- text --------------------------------------------------------------------------------------------------------


def write_t5(path: Path, sizes: dict, shard: str) -> None:
    """Write a T5 v1.1 encoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=T5_ROWS, num_layers=T5_LAYERS, feed_forward_proj="gated-gelu", **sizes)
    new(T5EncoderModel, config).save_pretrained(path, max_shard_size=shard)


def write_t5_tokenizer(path: Path, length: int, fast: bool, extra: int = 100, bos: bool = False) -> None:
    """Write a sentencepiece unigram tokenizer with T5's special tokens: <pad> 0, </s> 1, then <s> (UMT5) and <unk>.

    Args:
        path: Of the folder.
        length: model_max_length.
        fast: Whether tokenizer.json is published beside spiece.model.
        extra: Number of sentinels <extra_id_…>.
        bos: Whether there is a <s>.
    """
    import sentencepiece

    path.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?:'-"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SENTENCES, " ".join(letters)] * 20),
        model_prefix=str(path / "spiece"),
        vocab_size=150,
        character_coverage=1.0,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2 if bos else -1,
        unk_id=3 if bos else 2,
        minloglevel=2,
    )
    (path / "spiece.vocab").unlink()
    sentinels = [f"<extra_id_{i}>" for i in range(extra)]
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", **({"bos_token": "<s>"} if bos else {})}
    config = {**special, "additional_special_tokens": sentinels, "extra_ids": extra, "model_max_length": length}
    config |= {"clean_up_tokenization_spaces": True, "sp_model_kwargs": {}, "tokenizer_class": "T5Tokenizer"}
    write_json(path / "special_tokens_map.json", {**special, "additional_special_tokens": sentinels})
    write_json(path / "tokenizer_config.json", config)
    if fast:
        from transformers import T5TokenizerFast

        T5TokenizerFast.from_pretrained(path).backend_tokenizer.save(str(path / "tokenizer.json"))


def write_clip_tokenizer(path: Path) -> int:
    """Write a byte-pair encoding in CLIP's files, vocab.json and merges.txt. Returns its size."""
    from tokenizers import ByteLevelBPETokenizer

    path.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer(lowercase=True, end_of_word_suffix="</w>")
    bpe.train_from_iterator(SENTENCES, vocab_size=600, min_frequency=1, special_tokens=[])
    merges = json.loads(bpe.to_str())["model"]["merges"]
    letters = sorted(json.loads(bpe.to_str())["model"]["vocab"])
    letters = [token for token in letters if len(token) == 1]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    pairs = [tuple(pair) for pair in merges if all(part.removesuffix("</w>") for part in pair)]
    tokens += [token for token in ("".join(pair) for pair in pairs) if token not in tokens]
    tokens = list(dict.fromkeys([*tokens, *CLIP_SPECIAL]))
    write_json(path / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs), "utf-8")
    begin, end = CLIP_SPECIAL
    special = {"bos_token": begin, "eos_token": end, "pad_token": end, "unk_token": end}
    write_json(path / "special_tokens_map.json", special)
    config = {**special, "add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    write_json(path / "tokenizer_config.json", {**config, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    return len(tokens)


# --- files -------------------------------------------------------------------------------------------------------


def write_index(path: Path, pipeline: str, version: str, parts: dict[str, list[str]]) -> Path:
    """Write model_index.json; returns the folder."""
    write_json(path / "model_index.json", {"_class_name": pipeline, "_diffusers_version": version, **parts})
    return path


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
