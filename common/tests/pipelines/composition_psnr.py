"""Prints the measured tables of common/docs/results/flux.md: the FLUX demo with shipped plans against itself uncached.

python common/tests/pipelines/composition_psnr.py [--captions 16]
What needs torchao, bitsandbytes or peft is left out without it.
"""

import argparse
import importlib.util
import warnings

import numpy as np
import torch

import ertacache
from conftest import ROOT, ModelFolder
from ertacache import Plan
from ertacache.demos.emoji import sample_captions
from ertacache.evaluation.metrics import psnr
from ertacache.evaluation.table import facts

STEPS, BUDGETS = 30, (15, 10)


def torchao(config: str):
    def apply(pipe):
        from torchao import quantization

        quantization.quantize_(pipe.transformer, getattr(quantization, config)())

    return apply


def bitsandbytes(layer: str, **options):
    def apply(pipe):
        import bitsandbytes

        make = getattr(bitsandbytes.nn, layer)
        for name, old in list(pipe.transformer.named_modules()):
            if type(old) is torch.nn.Linear:
                new = make(old.in_features, old.out_features, old.bias is not None, **options)
                new.load_state_dict(old.state_dict())
                pipe.transformer.set_submodule(name, new.to("cpu"))

    return apply


def lora(std: float):
    """Random LoRA of rank 4 on the attention, both factors from N(0, std²)."""

    def apply(pipe):
        from peft import LoraConfig

        pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        torch.manual_seed(0)
        for name, parameter in pipe.transformer.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=std)

    return apply


VARIANTS = {  # name → the package that it needs, and what it does to the pipeline
    "float32": ("torch", lambda pipe: None),
    "bfloat16": ("torch", lambda pipe: pipe.to(torch.bfloat16)),
    "torch.compile, inductor": ("torch", lambda pipe: pipe.transformer.compile(fullgraph=True)),
    "int8 weights (torchao)": ("torchao", torchao("Int8WeightOnlyConfig")),
    "int8 weights and activations (torchao)": ("torchao", torchao("Int8DynamicActivationInt8WeightConfig")),
    "int8 (bitsandbytes)": ("bitsandbytes", bitsandbytes("Linear8bitLt", has_fp16_weights=False)),
    "nf4 (bitsandbytes)": ("bitsandbytes", bitsandbytes("Linear4bit", quant_type="nf4")),
    "LoRA, std 0.02": ("peft", lora(0.02)),
    "LoRA, std 0.05": ("peft", lora(0.05)),
}


def psnrs(references: np.ndarray, images: np.ndarray) -> str:
    """Mean / 10th percentile / worst of the images, in dB."""
    found = [psnr(*pair) for pair in zip(references, images, strict=True)]
    return f"{np.mean(found):.1f} / {np.quantile(found, 0.1):.1f} / {min(found):.1f}"


def plan_of(budget: int) -> Plan:
    return Plan.load(ROOT / f"ERTACache4FLUX/cache/demo-30-budget-{budget}.json")


def variants(captions: list[str], open_demo) -> None:
    """Prints a row each."""
    print("| variant | uncached, to float32 | 15 of 30 | 10 of 30 |\n| --- | --- | --- | --- |")
    truth = None
    for name, (package, apply) in VARIANTS.items():
        if not importlib.util.find_spec(package):
            continue
        model_folder = open_demo()
        apply(model_folder.pipe)
        uncached, found = model_folder.stock(model_folder.pipe, captions, range(len(captions)), STEPS, "np"), []
        for plan in map(plan_of, BUDGETS):
            ertacache.enable(model_folder.pipe, plan)
            images = model_folder.stock(model_folder.pipe, captions, range(len(captions)), STEPS, "np")
            found.append(psnrs(uncached, images))
            ertacache.disable(model_folder.pipe)
        distance = "–" if truth is None else psnrs(truth, uncached)
        truth = uncached if truth is None else truth
        print(f"| {name} | {distance} | {' | '.join(found)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=16, help="held-out captions (seeds 0, 1, …)")
    captions = sample_captions(parser.parse_args().captions, seed=0, held_out=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def open_demo() -> ModelFolder:
        return ModelFolder("ERTACache4FLUX", captions, 3.5, height=64, width=64)

    variants(captions, open_demo)
    print(f"\n{facts(f'{len(captions)} held-out captions; one thread')}")


if __name__ == "__main__":
    main()
