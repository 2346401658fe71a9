"""STDiT3 against the original code's numbers, and what a cache loop relies on."""

import math

import pytest
import torch
from diffusers.models.embeddings import Timesteps

from helpers import refused
from opensora import case_a, far, golden, transformer
from opensora12 import STDiT3Transformer3DModel
from opensora12.layers import RotaryEmbedding, coordinates, pack_text, position_embedding, rotate

# --- embeddings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [16, 72])
def test_rotary_embedding(head_dim):
    g, rope = golden("embeddings"), RotaryEmbedding(head_dim)
    assert far(rope.freqs, g[f"rope.freqs_hd{head_dim}"]) < 1e-7
    assert far(rotate(g[f"rope.in_hd{head_dim}"], rope(15)), g[f"rope.out_hd{head_dim}"]) < 1e-5


def test_rotary_embedding_of_a_bfloat16_model_is_bfloat16_throughout():
    g = golden("embeddings")
    out = rotate(g["rope.in_hd72"].bfloat16(), RotaryEmbedding(72).bfloat16()(15))
    assert out.dtype == torch.bfloat16 and far(out, g["rope.out_hd72_bf16_as_f32"]) == 0


def grid(rows, columns, height, width):
    scale, base = math.sqrt(height * width) / 512, round(math.sqrt(rows * columns))
    return coordinates(rows, scale, base), coordinates(columns, scale, base)


def test_position_embedding_at_several_sizes():
    g = golden("embeddings")
    for places, name in (
        (grid(30, 53, 480, 854), "h30_w53_scale1.250488_base40"),
        (grid(3, 4, 48, 64), "h3_w4_scale0.108253_base3"),
        ((torch.arange(5.0), torch.arange(2.0)), "h5_w2_scale1.000000_baseNone"),
    ):
        assert far(position_embedding(*places, 64, torch.float32), g[f"pos_embed.dim64.{name}"][0]) < 1e-5


def test_position_embedding_of_the_real_size_in_both_dtypes():
    g = golden("embeddings")
    rows = g["pos_embed.dim1152.480x854.rows_index"].long()
    full = position_embedding(*grid(30, 53, 480, 854), 1152, torch.float32)
    assert far(full[rows], g["pos_embed.dim1152.480x854.rows"]) < 1e-5
    rounded = position_embedding(*grid(30, 53, 480, 856), 1152, torch.bfloat16)  # 854 in bfloat16 is 856
    assert far(rounded[rows], g["pos_embed.dim1152.480x854.bf16_model_args.rows_as_f32"]) == 0


def test_time_embedding_and_rms_norm():
    g, model = golden("embeddings"), transformer()
    assert isinstance(model.sinusoid, Timesteps)
    # Up to 1000 rad, where float32 has steps of 6e-5.
    assert far(model.sinusoid(g["timestep_embedding.in"]), g["timestep_embedding.out_dim256"]) < 1e-4
    norm = STDiT3Transformer3DModel(depth=1, hidden_size=32, num_heads=2).transformer_blocks[0].attn.norm_q
    norm.weight.data = g["rmsnorm.weight"]
    assert far(norm(g["rmsnorm.in"]), g["rmsnorm.out"]) < 1e-5


# --- forward passes ------------------------------------------------------------------------------------------------


def test_two_texts_of_different_length_with_every_intermediate_result():
    g, model, seen = golden("stdit3_tiny_forward"), transformer(), {}
    names = {
        "x_embedder": "patch_embed.proj",
        "t_embedder": "time_embed",
        "fps_embedder": "fps_embed",
        "t_block": "time_modulation",
        "y_embedder": "caption_projection",
        "final_layer": "proj_out",
    }
    for i, part in ((i, part) for i in (0, 1) for part in ("", ".attn", ".cross_attn", ".mlp")):
        ours = f"{i}{part}".replace("mlp", "ff")
        names[f"spatial_blocks.{i}{part}"] = f"transformer_blocks.{ours}"
        names[f"temporal_blocks.{i}{part}"] = f"temporal_transformer_blocks.{ours}"
    names = {upstream: ours for upstream, ours in names.items() if f"A.inter.{upstream}" in g}
    handles = [
        model.get_submodule(ours).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        for name, ours in names.items()
    ]
    out = model(**case_a()).sample
    for handle in handles:
        handle.remove()
    seen["x_embedder"] = seen["x_embedder"].flatten(2).transpose(1, 2)
    assert len(seen) == 15 and far(out, g["A.out"]) < 1e-4
    for name, tensor in seen.items():
        assert far(tensor.reshape(g[f"A.inter.{name}"].shape), g[f"A.inter.{name}"]) < 1e-4, name


def test_the_text_keeps_the_tokens_of_each_mask_in_order():
    g, model = golden("stdit3_tiny_forward"), transformer()
    text, mask = pack_text(model.caption_projection(g["A.y"][:, 0]), g["A.mask"])
    assert mask.sum((1, 2, 3)).tolist() == g["A.inter.y_lens"].tolist() == [5, 9]
    assert far(text[mask[:, 0, 0]], g["A.inter.encode_text"][0]) < 1e-5
    holes = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1]])
    text, mask = pack_text(torch.arange(8.0).view(2, 4, 1), holes)
    assert mask is None and text.flatten().tolist() == [1, 3, 4, 7]


def test_other_cases():
    g, model = golden("stdit3_tiny_forward"), transformer()
    null = model.y_embedding.expand_as(g["A.y"][:, 0])
    guided = case_a(
        hidden_states=torch.cat([g["C.z"]] * 2),
        timestep=torch.cat([g["C.timestep_per_prompt"]] * 2),
        encoder_hidden_states=torch.cat([g["A.y"][:, 0], null]),
    )
    for arguments, wanted in (
        (case_a(x_mask=g["A.x_mask_partial"].bool()), g["A.out_x_mask_partial"]),
        (case_a(x_mask=torch.ones(2, 3, dtype=torch.bool)), g["A.out"]),
        (case_a(hidden_states=g["B.x"], height=40, width=56), g["B.out"]),
        (guided, g["C.out"]),
        (case_a(encoder_attention_mask=None), g["E.out_no_mask"]),
        (case_a(hidden_states=g["F.x"], fps=120), g["F.out"]),
    ):
        assert far(model(**arguments).sample, wanted) < 1e-4


# --- for loops and training ----------------------------------------------------------------------------------------


def test_the_forward_pass_is_its_four_parts():
    model, a = transformer(), case_a()
    conditioning = model.condition(
        *(a[n] for n in ("timestep", "encoder_hidden_states", "encoder_attention_mask", "fps"))
    )
    tokens = model.patch_embed(a["hidden_states"], a["height"], a["width"])
    assert tokens.shape == (2, 3, 12, 64)
    out = model.head(model.run_blocks(tokens, conditioning), conditioning, (3, 6, 8))
    assert torch.equal(out, model(**a).sample) and out.dtype == torch.float32


def test_a_row_does_not_depend_on_the_lengths_of_the_others():
    model, a = transformer(), case_a(fps=24)
    together = model(**a).sample
    for row in (0, 1):
        alone = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in a.items()}
        assert far(model(**alone).sample, together[row : row + 1]) < 1e-5


def test_every_weight_is_trained():
    torch.manual_seed(0)
    model = STDiT3Transformer3DModel(depth=1, hidden_size=64, num_heads=4, caption_channels=32, model_max_length=12)
    model(**case_a()).sample.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_bfloat16_model_is_the_same_loaded_or_cast_and_rounds_the_time(tmp_path):
    model = transformer()
    model.save_pretrained(tmp_path)
    loaded = STDiT3Transformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast = STDiT3Transformer3DModel.from_pretrained(tmp_path).to(torch.bfloat16)
    out = loaded(**case_a()).sample
    assert loaded.rope.freqs.dtype == torch.bfloat16 and torch.equal(out, cast(**case_a()).sample)
    rounded = case_a()["timestep"].bfloat16().float()
    assert 0 < far(out, model(**case_a(timestep=rounded)).sample) < 0.1 < far(out, model(**case_a()).sample)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"hidden_states": torch.zeros(2, 3, 3, 6, 8)},
            ("hidden_states", "[2, 3, 3, 6, 8]", "[B, 4,"),
        ),
        ({"encoder_hidden_states": torch.zeros(2, 12, 31)}, ("[2, 12, 31]", "[B, 12, 32]")),
        ({"encoder_hidden_states": torch.zeros(2, 9, 32)}, ("[2, 9, 32]", "[B, 12, 32]")),
        (
            {"encoder_attention_mask": torch.ones(3, 12)},
            ("mask", "[3, 12]", "n dividing 2"),
        ),
        ({"encoder_attention_mask": torch.tensor([[1] * 12, [0] * 12])}, ("row 1",)),
    ],
)
def test_wrong_shapes_are_named(changes, words):
    with refused(*words):
        transformer()(**case_a(**changes))
