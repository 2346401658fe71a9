"""Run the nodes in a real ComfyUI on the CPU, with small random models, and compare with the diffusers pipelines.

    python scripts/bench/comfyui.py PATH_TO_COMFYUI --work runs/comfyui

Run it with ComfyUI's Python, which has ertacache installed. The nodes are installed into the checkout by `ertacache
comfyui install` and removed at the end, unless they are there already; all else is written to --work.
The models are those of `parts/comfyui_models.py`. Of three of them ComfyUI's loader knows the published width alone
(FLUX, Qwen-Image, SDXL); nodes of the test, `parts/comfyui_test_nodes.py`, have it read the width off the weights. A
node makes random conditioning, and latents are saved: text encoders and VAE are left out.
"""

import json
import sys
from datetime import date
from pathlib import Path

import safetensors.torch
import torch

import ertacache
from ertacache.cli.arguments import ArgumentParser
from ertacache.cli.comfyui import node_folder
from ertacache.utils.errors import run_program
from ertacache.utils.provenance import measured_with
from parts.comfyui_models import FRAMES, MODELS, SIDE, Small
from parts.comfyui_server import Result, Server, working_folder

WORKFLOWS = Path(__file__).resolve().parents[2] / "common/ertacache/comfyui/workflows"
STEPS, CALLS = 12, 4  # T, N
DENOISE = 0.85
PROMPTS = 4  # of a plan's calibration
IMAGES, EXTRA = 4, 24  # of Learn plan
TOLERANCE = 1e-4


class Checks:
    """Prints each check, and remembers whether all have passed."""

    passed = True

    def __call__(self, what: str, holds: bool, shown: object) -> None:
        self.passed &= bool(holds)
        print(f"{'ok  ' if holds else 'FAIL'} {what}: {shown}", flush=True)

    def counts(self, what: str, result: Result, calls: int, batch: int) -> None:
        """Compare what a workflow has counted with the calls of its plan."""
        shown = f"{len(result.calls)}" + (f", each of a batch of {batch}" if batch > 1 else "")
        self(f"{what}, model calls", result.calls == [batch] * calls, result.error or shown)
        seen = list(dict.fromkeys(step for step in result.progress if step[0]))
        whole = f"{len(seen)} of {seen[-1][1] if seen else 0}"
        self(f"{what}, progress bar", seen == [(i + 1, calls) for i in range(calls)], whole)
        self(f"{what}, previews", result.previews == calls, result.previews)


# --- workflows -----------------------------------------------------------------------------------------------------


def shipped(name: str) -> dict:
    """Return an example workflow in API form, with titles as ids."""
    api = json.loads((WORKFLOWS / f"{name}-api.json").read_text("utf-8"))
    titles = {id: node["_meta"]["title"] for id, node in api.items()}
    for node in api.values():
        links = {key: [titles[v[0]], v[1]] for key, v in node["inputs"].items() if isinstance(v, list)}
        node["inputs"] |= links
    return {titles[id]: node for id, node in api.items()}


def workflow(small: Small, name: str = "text-to-image", text: str = "a lighthouse", seed: int = 0, **changes) -> dict:
    """Return an example workflow with a small model: no text encoders and no VAE; latents are saved.

    Args:
        small: The model; one with a `cfg` has the guider of the workflow wan-video.
        name: Of the workflow.
        text: The prompt.
        seed: Of the noise.
        **changes: Inputs to set, by the title of their node.
    """
    nodes, model = shipped(name), small.model
    if model.cfg is not None:
        nodes |= {title: shipped("wan-video")[title] for title in ("guidance", "guider")}
        nodes["guider"]["inputs"]["cfg"] = model.cfg
    for title, prompt in (("text", text), ("guidance", "")):
        if nodes[title]["class_type"] == "CLIPTextEncode":
            file, parts = f"{small.name}-{prompt}.safetensors", small.embeddings(prompt)
            safetensors.torch.save_file({key: parts[key] for key in ("text", "pooled")}, small.work / "input" / file)
            nodes[title] = {"class_type": "TestConditioning", "inputs": {"file": file}}
    inputs = {"samples": ["sample", 0], "filename_prefix": "result"}
    nodes["save"] = {"class_type": "SaveLatent", "inputs": inputs}
    if name == "image-to-image":
        nodes["latent"] = {"class_type": "LoadLatent", "inputs": {"latent": f"{small.name}.latent"}}
    else:
        inputs = {"width": 8 * SIDE, "height": 8 * SIDE, "batch_size": 1, "length": 4 * FRAMES - 3}
        nodes["latent"] = {"class_type": model.latents[1], "inputs": inputs}
    nodes["model"]["inputs"]["unet_name"] = small.file
    nodes["noise"]["inputs"]["noise_seed"] = seed
    for title, values in changes.items():
        nodes[title]["inputs"] |= values
    return {title: node for title, node in nodes.items() if title not in ("clip", "vae", "decode", "image", "video")}


def with_lora(nodes: dict) -> dict:
    """Return a workflow with a LoRA between the model's loader and all that takes it."""
    for node in nodes.values():
        node["inputs"] = {key: ["lora", 0] if v == ["model", 0] else v for key, v in node["inputs"].items()}
    inputs = {"model": ["model", 0], "lora_name": "flux.safetensors", "strength_model": 1.0}
    return nodes | {"lora": {"class_type": "LoraLoaderModelOnly", "inputs": inputs}}


def with_controlnet(nodes: dict) -> dict:
    """Return a workflow with a ControlNet on the conditioning."""
    positive = nodes["guider"]["inputs"]["conditioning"]
    nodes["guider"]["inputs"]["conditioning"] = ["control", 0]
    image = {"width": 8 * SIDE, "height": 8 * SIDE, "batch_size": 1, "color": 8421504}
    inputs = {"positive": positive, "negative": positive, "control_net": ["loader", 0], "image": ["grey", 0]}
    inputs |= {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    return nodes | {
        "loader": {"class_type": "ControlNetLoader", "inputs": {"control_net_name": "flux.safetensors"}},
        "grey": {"class_type": "EmptyImage", "inputs": image},
        "control": {"class_type": "ControlNetApplyAdvanced", "inputs": inputs},
    }


def make_additions(small: Small) -> None:
    """Write a random ControlNet and a random LoRA of FLUX, in ComfyUI's formats."""
    import comfy.ops
    from comfy.ldm.flux.controlnet import ControlNetFlux
    from comfy.model_detection import detect_unet_config

    state = safetensors.torch.load_file(small.work / "diffusion_models" / small.file)
    width = len(state["img_in.weight"])
    config = detect_unet_config(state, "") | {"depth": 1, "depth_single_blocks": 0}
    config |= {"hidden_size": width, "num_heads": width // 128}
    torch.manual_seed(1)
    control = ControlNetFlux(operations=comfy.ops.disable_weight_init, dtype=torch.float32, device="cpu", **config)
    weights = {name: torch.randn(value.shape) * 0.02 for name, value in control.state_dict().items()}
    safetensors.torch.save_file(weights, small.work / "controlnet/flux.safetensors")
    names = [f"diffusion_model.double_blocks.0.{part}_attn.proj" for part in ("img", "txt")]
    lora = {f"{name}.lora_up.weight": torch.randn(width, 4) * 0.1 for name in names}
    lora |= {f"{name}.lora_down.weight": torch.randn(4, width) * 0.1 for name in names}
    safetensors.torch.save_file(lora, small.work / "loras/flux.safetensors")


# --- checks --------------------------------------------------------------------------------------------------------


def error_of(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def calibrated(small: Small) -> ertacache.Plan:
    """Return the plan of the diffusers pipeline, saved where Load plan finds it."""
    prompts = [f"prompt {i}" for i in range(PROMPTS)]
    options = {"effort": "quick", "work": small.work / f"calibration-{small.name}", "progress": False}
    pipe, speedup = small.pipelines[0], STEPS / CALLS
    plan = ertacache.calibrate(pipe, prompts, [speedup], **options, num_inference_steps=STEPS, **small.call)[speedup]
    plan.save(small.work / f"ertacache/{small.name}.json")
    return plan


def check_plan(check: Checks, server: Server, small: Small) -> None:
    """Follow a plan from noise and from an image, and compare with diffusers."""
    plan, batch, title = calibrated(small), small.model.batch, small.model.title
    sizes = " × ".join(map(str, small.model.latents[2]))
    print(f"\n{title}: {small.millions:.1f} million parameters, latents of {sizes}")
    print(f"T = {STEPS}, N = {CALLS}, computed steps {list(plan.computed)}", flush=True)
    load, pipe = {"plan": {"source": f"{small.name}.json"}}, small.pipelines[0]

    def compare(what: str, result: Result, expected: torch.Tensor) -> None:
        if result.latents is not None:
            error = error_of(small.format.process_in(result.latents).reshape(expected.shape), expected)
            check(f"{what}, largest difference from diffusers with the plan", error < TOLERANCE, f"{error:.1e}")

    result = server.run(workflow(small, seed=5, **load))
    check.counts(f"{title} from noise", result, CALLS, batch)
    uncached = small.run(pipe, 5, num_inference_steps=STEPS)
    ertacache.enable(pipe, plan, on_drift="ignore")
    expected = small.run(pipe, 5, num_inference_steps=STEPS)
    compare(f"{title} from noise", result, expected)
    print(f"     its largest difference from the uncached run: {error_of(expected, uncached):.1e}")

    for pipe in small.pipelines[1:]:
        image = 0.5 * small.noise(77)
        small.save_latents(image, small.work / f"input/{small.name}.latent")
        result = server.run(workflow(small, "image-to-image", seed=6, **load, sigmas={"denoise": DENOISE}))
        begin = int(STEPS - STEPS * DENOISE)
        check.counts(f"{title} from an image", result, 1 + sum(step > begin for step in plan.computed), batch)
        ertacache.enable(pipe, plan, on_drift="ignore")
        late = {"image": image.reshape(1, -1, SIDE, SIDE), "strength": 1 - begin / STEPS, "num_inference_steps": STEPS}
        compare(f"{title} from an image", result, small.run(pipe, 6, **late))


def check_learning(check: Checks, server: Server, small: Small) -> None:
    """Learn a plan with a workflow, and follow it."""
    title, batch, file = small.model.title, small.model.batch, small.work / f"ertacache/learned-{small.name}.json"
    file.unlink(missing_ok=True)
    options = {"name": file.name, "speedup": STEPS / CALLS, "images": IMAGES, "extra_calls": EXTRA}

    def learn(text: str = "a lighthouse", seed: int = 5, **changes) -> dict:
        return workflow(small, "learn-a-plan", text, seed, sampler=options | changes, sigmas={"steps": STEPS})

    results = []
    for seed in range(100, 130):
        results.append(server.run(learn(f"prompt {seed}", seed)))
        if results[-1].error or len(results[-1].calls) == CALLS:
            break
    calls, texts = [len(result.calls) for result in results], [text for result in results for text in result.texts]
    stated = [STEPS] * (IMAGES - 1) + [STEPS + EXTRA] * (len(calls) - IMAGES - 1)
    check(f"{title} learned, model calls of each image", calls[: len(stated)] == stated and calls[-1] == CALLS, calls)
    text = (results[-1].error or texts[-1]).strip().replace(str(small.work), "WORK")
    check(f"{title} learned", file.exists() and "followed from now on" in text, text)
    euler = learn()
    euler["sampler"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    uncached, teaching = server.run(euler), server.run(learn(name=f"new-{small.name}"))
    same = torch.equal(teaching.latents, uncached.latents)
    check(f"{title} learned, the result is that of ComfyUI's euler, bit for bit", same, len(uncached.calls))
    planned = server.run(learn())
    check.counts(f"{title} with the learned plan", planned, CALLS, batch)
    loaded = server.run(workflow(small, seed=5, plan={"source": file.name}))
    same = torch.equal(loaded.latents, planned.latents)
    check(f"{title} with the learned plan, Load plan gives the same, bit for bit", same, len(loaded.calls))
    difference = error_of(*(small.format.process_in(result.latents) for result in (planned, uncached)))
    print(f"     its largest difference from the uncached run: {difference:.1e}")


def check_additions(check: Checks, server: Server, small: Small) -> None:
    """Follow a plan with a LoRA and with a ControlNet."""
    load = {"plan": {"source": f"{small.name}.json"}}
    plain = server.run(workflow(small, seed=5, **load))
    for what, change in (("LoRA", with_lora), ("ControlNet", with_controlnet)):
        result = server.run(change(workflow(small, seed=5, **load)))
        check.counts(f"{small.model.title} with {what}", result, CALLS, 1)
        if result.latents is not None:
            difference = small.format.scale_factor * error_of(result.latents, plain.latents)
            shown = f"largest difference {difference:.1e}"
            check(f"{small.model.title} with {what}, the image is another", difference > 1e-3, shown)


def check_refusals(check: Checks, server: Server, smalls: dict[str, Small]) -> None:
    """Give what does not fit, and read what the node says."""
    small = next(iter(smalls.values()))
    load = {"source": f"{small.name}.json"}
    grid = workflow(small, plan=load)
    inputs = {"model": ["model", 0], "scheduler": "simple", "steps": STEPS, "denoise": 1.0}
    grid["sigmas"] = {"class_type": "BasicScheduler", "inputs": inputs}
    cases = [
        ("another grid", grid, f"{STEPS} steps"),
        ("no such plan", workflow(small, plan={"source": "none.json"}), "no plan file"),
        ("a speed-up that the plan lacks", workflow(small, plan=load | {"speedup": 7.0}), "speedup"),
    ]
    for other in smalls.values():
        if other.model.denoiser != small.model.denoiser:
            what = f"a plan of {small.model.title} for {other.model.title}"
            cases.append((what, workflow(other, plan=load), "plan is for"))
    for what, nodes, words in cases:
        said = server.run(nodes).error or "nothing"
        check(f"refused: {what}", words in said, said.strip().replace(str(small.work), "WORK"))


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, metavar="PATH_TO_COMFYUI")
    parser.add_argument("--models", default=",".join(MODELS), help="those to run, with commas between; default: all")
    parser.add_argument("--work", type=Path, help="folder for weights, plans and results; default: a temporary one")
    given = parser.parse_args()
    node_folder(given.checkout)
    check, checkout = Checks(), given.checkout.resolve()
    version = (checkout / "comfyui_version.py").read_text("utf-8").split('"')[-2]
    print(f"ComfyUI {version}; {measured_with()}; {date.today().isoformat()}")
    with working_folder(given.work) as work, Server(checkout, work) as server:
        smalls = {name: Small(name, work, checkout) for name in given.models.split(",")}
        if "flux" in smalls:
            make_additions(smalls["flux"])
        server.wait()
        for name, small in smalls.items():
            check_plan(check, server, small)
            if name == "flux":
                check_additions(check, server, small)
            check_learning(check, server, small)
        print()
        check_refusals(check, server, smalls)
    print("all passed" if check.passed else "some have failed")
    sys.exit(not check.passed)


if __name__ == "__main__":
    run_program(main)
