"""Published checkpoints of Open-Sora 1.2: every name has its place, and what is not one of them is refused."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import refused
from opensora import DATA, VAE_SIZES, case_a, random_pipeline, transformer, vae
from opensora12 import AutoencoderOpenSora, STDiT3Transformer3DModel, convert, load_pipeline, load_transformer, load_vae
from opensora12.convert import TRANSFORMER_NAMES, VAE_NAMES, back, rename


@pytest.mark.parametrize(
    ("model_class", "names", "keys", "count"),
    [
        (STDiT3Transformer3DModel, TRANSFORMER_NAMES, "stdit3_xl2_keys", 973),
        (AutoencoderOpenSora, VAE_NAMES, "vae_v1_2_keys", 517),
    ],
)
def test_the_full_size_models_have_the_published_names_and_shapes(model_class, names, keys, count):
    published = json.loads((DATA / f"{keys}.json").read_text())
    assert len(published) == count
    statistics = {n: published.pop(n) for n in ("shift", "scale") if n in published}
    with torch.device("meta"):
        ours = {name: list(tensor.shape) for name, tensor in model_class().state_dict().items()}
    assert {rename(name, names): shape for name, shape in published.items()} == ours
    assert all(rename(rename(name, names), back(names)) == name for name in published)
    assert statistics in ({}, {"shift": [1, 4, 1, 1, 1], "scale": [1, 4, 1, 1, 1]})


def weights(kind):
    return load_file(DATA / kind / "model.safetensors")


def checkpoint(folder, tensors, config=True):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text((DATA / "stdit3" / "config.json").read_text())
    return folder


def test_a_missing_rope_is_computed_and_pickled_weights_are_read(tmp_path):
    tensors = weights("stdit3")
    freqs = tensors.pop("rope.freqs")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((DATA / "stdit3" / "config.json").read_text())
    model = load_transformer(tmp_path)
    assert torch.allclose(model.rope.freqs, freqs, rtol=1e-6)
    assert torch.allclose(model(**case_a()).sample, transformer()(**case_a()).sample, atol=1e-5)


def test_the_statistics_of_a_checkpoint_are_kept_and_may_be_missing(tmp_path):
    tensors = weights("vae")
    tensors["shift"] += 1
    assert load_vae(checkpoint(tmp_path, tensors), **VAE_SIZES).config.latents_shift == pytest.approx(
        [0.9, 1.34, 1.27, 1.98]
    )
    del tensors["shift"], tensors["scale"]
    loaded = load_vae(checkpoint(tmp_path, tensors), **VAE_SIZES)
    assert loaded.config.latents_shift == (-0.10, 0.34, 0.27, 0.98)
    z = torch.ones(1, 4, 1, 2, 2)
    assert torch.allclose(loaded.decode(z, 2).sample, vae().decode(z, 2).sample, atol=1e-5)


OTHERS = {
    "Open-Sora 2.0 (MMDiT)": ["double_blocks.0.img_attn.qkv.weight", "img_in.weight"],
    "Open-Sora 1.1 (STDiT2)": ["t_block_temp.1.weight", "fps_embedder.mlp.0.weight", "blocks.0.attn_temp.qkv.weight"],
    "Open-Sora 1.0 (STDiT)": ["blocks.0.attn_temp.qkv.weight", "pos_embed", "x_embedder.proj.weight"],
    "the video autoencoder of Open-Sora 1.2": ["temporal_vae.encoder.norm1.weight", "scale"],
    "something else": ["model.diffusion_model.input_blocks.0.0.weight"],
}


@pytest.mark.parametrize(("kind", "names"), OTHERS.items())
def test_another_checkpoint_is_named(tmp_path, kind, names):
    with refused(tmp_path, f"like {kind}", names[0], "hpcai-tech/OpenSora-STDiT-v3"):
        load_transformer(checkpoint(tmp_path, {name: torch.zeros(1) for name in names}))


def test_a_transformer_is_no_autoencoder():
    with refused("like the transformer of Open-Sora 1.2", "86 more", "hpcai-tech/OpenSora-VAE"):
        load_vae(DATA / "stdit3", **VAE_SIZES)


def without(tensors, name):
    return {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: without(t, "final_layer.linear.bias"), ("lacks final_layer.linear.bias", "incomplete")),
        (lambda t: {n: v for n, v in t.items() if "mlp" not in n}, ("lacks t_embedder.mlp.0.", "21 more")),
        (
            lambda t: t | {"spatial_blocks.2.attn.proj.bias": torch.zeros(64)},
            ("spatial_blocks.2.attn.proj.bias",),
        ),
        (lambda t: t | {"t_block.1.bias": torch.zeros(1)}, ("t_block.1.bias [1]",)),
        (lambda t: t | {"ema_step": torch.zeros(1)}, ("ema_step", "hpcai-tech/OpenSora-STDiT-v3")),
    ],
)
def test_incomplete_and_unexpected_weights_are_named(tmp_path, change, words):
    with refused(*words):
        load_transformer(checkpoint(tmp_path, change(weights("stdit3"))))


def test_missing_and_damaged_files_are_named(tmp_path):
    with refused(tmp_path, "model.safetensors", "pytorch_model.bin"):
        load_transformer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with refused(tmp_path, "download it again"):
        load_transformer(tmp_path)
    with refused("/no/such/directory", "check the name"):
        load_vae("/no/such/directory")


def test_a_pipeline_is_put_together_from_three_checkpoints(tmp_path, monkeypatch):
    pipe = random_pipeline(tmp_path / "tokenizer")
    for part in (pipe.tokenizer, pipe.text_encoder):
        part.save_pretrained(tmp_path / "text")
    monkeypatch.setattr(convert, "load_vae", functools.partial(load_vae, **VAE_SIZES))
    loaded = load_pipeline(DATA / "stdit3", DATA / "vae", tmp_path / "text", dtype=torch.float32)
    texts = [p.encode_prompt(["a red circle"])[0] for p in (pipe, loaded)]
    assert torch.allclose(*texts, atol=1e-5)
    assert load_pipeline(DATA / "stdit3", DATA / "vae", tmp_path / "text").transformer.dtype == torch.bfloat16
    with refused(tmp_path / "none", "check the name"):
        load_pipeline(DATA / "stdit3", DATA / "vae", tmp_path / "none")


def test_copies_of_the_repositories_are_found_in_a_folder_and_beside_the_transformer(tmp_path, monkeypatch):
    names = ("OpenSora-STDiT-v3", "OpenSora-VAE-v1.2", "t5-v1_1-xxl")
    parts = [tmp_path / name for name in names]
    hub = [convert.TRANSFORMER, convert.VAE, convert.TEXT_ENCODER]
    asked = []
    monkeypatch.setattr(convert, "load_pipeline", lambda *given, dtype: asked.append([str(part) for part in given]))
    parts[0].mkdir()
    convert.load_published(tmp_path)
    convert.load_published(parts[0])
    parts[1].mkdir()
    parts[2].mkdir()
    convert.load_published(tmp_path)
    convert.load_published(parts[0])
    convert.load_published(convert.TRANSFORMER)
    everything = [str(part) for part in parts]
    assert asked == [[everything[0], *hub[1:]]] * 2 + [everything] * 2 + [[convert.TRANSFORMER]]


def test_an_autoencoder_has_the_sizes_of_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"cal_loss": False, "shift": [1.0], **VAE_SIZES}))
    assert load_vae(checkpoint(tmp_path, weights("vae"), config=False)).config.spatial_layers_per_block == 1
