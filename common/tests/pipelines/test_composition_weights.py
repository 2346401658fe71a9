"""Plans with quantised transformers, LoRA and IP-adapters. See docs/works-with.md."""

import pytest
import torch
from diffusers import FluxPipeline

import ertacache
from helpers import calibrate, counted, flux_plan, flux_planned, no_warning, with_prompts
from tiny_pipelines import flux


@pytest.fixture
def plan():
    return flux_plan()


@pytest.fixture
def planned():
    return flux_planned()


def int8_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def bitsandbytes(layer, **options):
    def quantise(model):
        make = getattr(pytest.importorskip("bitsandbytes").nn, layer)
        for name, old in list(model.named_modules()):
            if type(old) is torch.nn.Linear:
                new = make(old.in_features, old.out_features, old.bias is not None, **options)
                new.load_state_dict(old.state_dict())
                model.set_submodule(name, new.to("cpu"))

    return quantise


@pytest.mark.parametrize(
    "quantise",
    [int8_torchao, bitsandbytes("Linear8bitLt", has_fp16_weights=False), bitsandbytes("Linear4bit", quant_type="nf4")],
    ids=["torchao", "bitsandbytes int8", "bitsandbytes nf4"],
)
def test_a_quantised_transformer_follows_with_a_warning(quantise, plan, planned, tmp_path):
    tiny = flux()
    quantise(tiny.pipe.transformer)
    with pytest.warns(UserWarning, match="calibrated on other weights"):
        ertacache.enable(tiny.pipe, plan)
    found, calls = counted(tiny)
    assert calls == plan.nfe and 0 < (found - planned).abs().max() < 0.5
    with no_warning():
        ertacache.enable(tiny.pipe, calibrate(with_prompts(tiny), work=tmp_path)[2])


@pytest.fixture
def lora(tmp_path):
    """A folder with a LoRA of rank 2 for the tiny FLUX."""
    peft = pytest.importorskip("peft")
    model = flux().pipe.transformer
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(5))
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=peft.get_peft_model_state_dict(model))
    return tmp_path


@pytest.mark.parametrize("first", ["enable", "load"])
def test_a_lora_before_or_after(first, lora, plan, planned):
    tiny = flux()
    plain = tiny.run()
    if first == "enable":
        with no_warning():
            ertacache.enable(tiny.pipe, plan)
        tiny.pipe.load_lora_weights(lora)
    else:
        tiny.pipe.load_lora_weights(lora)
        with pytest.warns(UserWarning, match="calibrated on other weights"):
            ertacache.enable(tiny.pipe, plan)
    found, calls = counted(tiny)
    assert calls == plan.nfe and not torch.allclose(found, planned, atol=1e-3)
    tiny.pipe.fuse_lora()
    assert torch.allclose(tiny.run(), found, atol=1e-4)
    tiny.pipe.unfuse_lora()
    tiny.pipe.set_adapters(["default_0"], [0.0])
    assert torch.allclose(tiny.run(), planned, atol=1e-4)
    ertacache.disable(tiny.pipe)
    tiny.pipe.unload_lora_weights()
    assert torch.allclose(tiny.run(), plain, atol=1e-4)


@pytest.mark.slow
def test_a_plan_calibrated_with_a_lora_knows_it(lora, plan, planned, tmp_path):
    tiny = flux()
    tiny.pipe.load_lora_weights(lora)
    made = calibrate(with_prompts(tiny), work=tmp_path)[2]
    del tiny.pipe.encode_prompt
    with no_warning():
        ertacache.enable(tiny.pipe, made)
    tiny.pipe.unload_lora_weights()
    with pytest.warns(UserWarning, match="calibrated on other weights"):
        ertacache.enable(tiny.pipe, made)
    with no_warning():
        ertacache.enable(tiny.pipe, plan)
    assert torch.equal(tiny.run(), planned)  # nothing of the LoRA has stayed


def test_an_ip_adapter(plan, planned):
    tiny, r = flux(), torch.Generator().manual_seed(7)
    inner, text = tiny.pipe.transformer.inner_dim, tiny.pipe.transformer.config.joint_attention_dim
    sizes = {f"0.to_{k}_ip.{p}": (inner, text)[: 2 - (p == "bias")] for k in "kv" for p in ("weight", "bias")}
    projection = {"proj.weight": (4 * text, 8), "proj.bias": (4 * text,), "norm.weight": (text,), "norm.bias": (text,)}
    state = {
        "image_proj": {name: torch.randn(size, generator=r) for name, size in projection.items()},
        "ip_adapter": {name: torch.randn(size, generator=r) for name, size in sizes.items()},
    }
    tiny.pipe.load_ip_adapter(state, None, subfolder=None, image_encoder_pretrained_model_name_or_path=None)
    with pytest.warns(UserWarning, match="calibrated on other weights"):
        ertacache.enable(tiny.pipe, plan)
    image = torch.randn(1, 1, 8, generator=r)
    images = {"ip_adapter_image_embeds": [image], "negative_ip_adapter_image_embeds": [0 * image]}
    found, calls = counted(tiny, **images)
    assert calls == plan.nfe and not torch.allclose(found, planned, atol=1e-3)
    tiny.pipe.set_ip_adapter_scale(0.0)
    assert torch.allclose(tiny.run(**images), planned, atol=1e-5)
