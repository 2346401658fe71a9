"""Run the nodes in a real ComfyUI on the CPU, with a small random FLUX, and compare with the diffusers pipeline.

    python scripts/bench/comfyui.py PATH_TO_COMFYUI --work runs/comfyui

Run it with ComfyUI's Python, which has ertacache installed. The nodes are installed into the checkout by `ertacache
comfyui install` and removed at the end, unless they are there already; all else is written to --work, where the next
run finds weights and plan again.
ComfyUI's loader of FLUX knows one width, 3072; with two blocks that takes 0.5 billion parameters, 2 GB on disk and 8 GB
of memory. With any other --width (default 256) a test node has the loader read the width off the weights. Text encoders
and VAE are left out: a node makes random conditioning, and latents are saved.
"""

import argparse
import contextlib
import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).resolve().parents[2] / "common/ertacache/comfyui/workflows"
STEPS, CALLS, SIDE, TOKENS = 12, 4, 8, 8  # T, N, height and width of the latents, tokens of the prompt
STRENGTH = 0.6
PROMPTS = 4  # of the plan's calibration
IMAGES, EXTRA = 4, 24  # of Learn plan
TOLERANCE = 1e-4
WIDTH, HEAD = 3072, 128  # of FLUX: hidden size, and of a head
FLUX = {
    **{"num_layers": 1, "num_single_layers": 1, "attention_head_dim": HEAD},
    **{"in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True},
}
SHIFT, SCALE = 0.1159, 0.3611  # of FLUX's latents in its VAE
TEST_NODES = """
import comfy.model_detection
import torch
from aiohttp import web
from comfy.ldm.flux.model import Flux
from server import PromptServer

detect = comfy.model_detection.detect_unet_config


def detect_with_width(state_dict, key_prefix, *args, **kwargs):
    config = detect(state_dict, key_prefix, *args, **kwargs)
    if config and config.get("image_model") == "flux":
        width = len(state_dict[key_prefix + "img_in.weight"])
        config |= {"hidden_size": width, "num_heads": width // 128}
    return config


comfy.model_detection.detect_unet_config = detect_with_width
CALLS = []  # batch sizes of the model calls


def count(module, inputs):
    if type(module) is Flux:
        CALLS.append(len(inputs[0]))


torch.nn.modules.module.register_module_forward_pre_hook(count)


@PromptServer.instance.routes.get("/test/calls")
async def calls(request):
    made = list(CALLS)
    CALLS.clear()
    return web.json_response(made)


class Conditioning:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {})}}

    def make(self, text):
        from comfyui_bench import conditioning

        text, pooled = conditioning(text)
        return ([[text, {"pooled_output": pooled}]],)


NODE_CLASS_MAPPINGS = {"TestConditioning": Conditioning}
"""
CONVERT = """
import sys
import torch
from safetensors.torch import load_file, save_file

import comfy.options

sys.argv = sys.argv[:1] + ["--cpu"]
comfy.options.enable_args_parsing()
import comfy.model_detection
import comfy.ops
from comfy.ldm.flux.controlnet import ControlNetFlux

work = {work!r}
native = comfy.model_detection.convert_diffusers_mmdit(load_file(work + "/diffusers.safetensors"), "")
save_file({{key: value.contiguous() for key, value in native.items()}}, work + "/diffusion_models/flux.safetensors")
config = comfy.model_detection.detect_unet_config(native, "")
width = len(native["img_in.weight"])
config |= {{"depth": 1, "depth_single_blocks": 0, "hidden_size": width, "num_heads": width // 128}}
torch.manual_seed(1)
control = ControlNetFlux(operations=comfy.ops.disable_weight_init, dtype=torch.float32, device="cpu", **config)
weights = {{key: torch.randn(value.shape) * 0.02 for key, value in control.state_dict().items()}}
save_file(weights, work + "/controlnet/flux.safetensors")
lora = {{}}
for name, shape in (("img_attn.proj", (width, width)), ("txt_attn.proj", (width, width))):
    key = "diffusion_model.double_blocks.0." + name
    lora[key + ".lora_up.weight"] = torch.randn(shape[0], 4) * 0.1
    lora[key + ".lora_down.weight"] = torch.randn(4, shape[1]) * 0.1
save_file(lora, work + "/loras/flux.safetensors")
"""


def conditioning(text: str):
    """Return random embeddings of a prompt, [1, TOKENS, 4096] and [1, 768]."""
    import torch

    generator = torch.Generator().manual_seed(sum(text.encode()))
    return torch.randn(1, TOKENS, 4096, generator=generator), torch.randn(1, 768, generator=generator)


# --- ComfyUI's process ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def working_folder(path: Path | None = None) -> Iterator[Path]:
    """Yield a folder, a temporary one by default, with the folders of models and results."""
    with contextlib.ExitStack() as stack:
        name = path.resolve() if path else stack.enter_context(tempfile.TemporaryDirectory(prefix="comfyui-"))
        for folder in ("diffusion_models", "controlnet", "loras", "ertacache", "custom_nodes/test_nodes"):
            Path(name, folder).mkdir(parents=True, exist_ok=True)
        for folder in ("output", "input", "temp", "user"):
            shutil.rmtree(Path(name, folder), ignore_errors=True)
            Path(name, folder).mkdir()
        yield Path(name)


class Server:
    """A ComfyUI checkout that runs on the CPU, with the nodes.

    Args:
        checkout: Its folder.
        work: Of `working_folder`.
    """

    def __init__(self, checkout: Path, work: Path):
        self.checkout, self.work = checkout.resolve(), work
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.installed = not (self.checkout / "custom_nodes/ertacache").exists()

    def __enter__(self) -> "Server":
        if self.installed:
            self.command("install")
        config = {"test": {"base_path": str(self.work)}}
        for folder in ("diffusion_models", "controlnet", "loras", "ertacache", "custom_nodes"):
            config["test"][folder] = folder
        (self.work / "paths.yaml").write_text(json.dumps(config))  # JSON is YAML
        nodes = self.work / "custom_nodes/test_nodes"
        nodes.mkdir(exist_ok=True)
        (nodes / "__init__.py").write_text(TEST_NODES)
        shutil.copy(__file__, self.work / "comfyui_bench.py")
        words = [sys.executable, "main.py", "--cpu", "--force-fp32", "--port", str(self.port), "--disable-auto-launch"]
        words += ["--preview-method", "latent2rgb", "--extra-model-paths-config", str(self.work / "paths.yaml")]
        for folder in ("output", "input", "temp", "user"):
            words += [f"--{folder}-directory", str(self.work / folder)]
        paths = os.pathsep.join([str(self.work), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.log = open(self.work / "log.txt", "w")
        options = {"cwd": self.checkout, "stdout": self.log, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(words, **options, env={**os.environ, "PYTHONPATH": paths})
        return self

    def wait(self) -> None:
        """Wait until it answers."""
        while True:
            time.sleep(1)
            if self.process.poll() is not None:
                raise SystemExit(f"ComfyUI did not start:\n{(self.work / 'log.txt').read_text()[-3000:]}")
            with contextlib.suppress(OSError):
                self.get("system_stats")
                return

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()
        if self.installed:
            self.command("remove")

    def command(self, word: str) -> None:
        subprocess.run([sys.executable, "-m", "ertacache", "comfyui", word, self.checkout], check=True)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}") as answer:
            return json.load(answer)

    def queue(self, workflow: dict, client: str) -> str:
        """Queue a workflow in API form. Returns its id."""
        body = json.dumps({"prompt": workflow, "client_id": client}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/prompt", body)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["prompt_id"]

    def run(self, workflow: dict) -> "Result":
        """Run a workflow to its end, over the HTTP interface and the websocket."""
        import asyncio

        return asyncio.run(self._run(workflow))

    async def _run(self, workflow: dict) -> "Result":
        import aiohttp

        sampling = next((id for id, node in workflow.items() if node["class_type"] == "SamplerCustomAdvanced"), None)
        result, client = Result(), "test"
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"ws://127.0.0.1:{self.port}/ws?clientId={client}", max_msg_size=0) as socket,
        ):
            self.get("test/calls")
            try:
                prompt = self.queue(workflow, client)
            except urllib.error.HTTPError as error:
                refused = json.load(error)["node_errors"].values()
                result.error = "; ".join(one["details"] for node in refused for one in node["errors"])
                return result
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    kind = int.from_bytes(message.data[:4], "big")
                    result.previews += kind == 1
                    if kind == 3:
                        length = int.from_bytes(message.data[4:8], "big")
                        result.texts.append(message.data[8 + length :].decode())
                    continue
                event = json.loads(message.data)
                data = event.get("data", {})
                if event["type"] == "progress" and data["node"] == sampling:
                    result.progress.append((data["value"], data["max"]))
                elif event["type"] == "execution_error":
                    result.error = data["exception_message"]
                    break
                elif event["type"] == "execution_success" and data["prompt_id"] == prompt:
                    break
        result.calls = len(self.get("test/calls"))
        files = sorted(self.work.glob("output/*.latent"), key=lambda path: path.stat().st_mtime)
        if result.error is None and files:
            import safetensors.torch

            result.latents = (safetensors.torch.load_file(files[-1])["latent_tensor"] - SHIFT) * SCALE
        return result


class Result:
    """What a workflow has shown.

    Attributes:
        calls: Of the diffusion model.
        previews: Number of preview images.
        progress: (value, max) of the progress bar.
        texts: Messages below nodes.
        latents: As the model has them, [B, 16, H, W].
        error: None where it has run to its end.
    """

    def __init__(self):
        self.calls, self.previews, self.progress, self.texts = 0, 0, [], []
        self.latents = self.error = None


# --- diffusers' side ------------------------------------------------------------------------------------------------


def pipelines(weights: Path, width: int):
    """Yield FLUX pipelines for text to image and image to image, whose prompts have random embeddings.

    Args:
        weights: Their file, made where there is none.
        width: Hidden size.
    """
    import safetensors.torch
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline, FluxTransformer2DModel

    def encode_prompt(self, prompt, prompt_2=None, prompt_embeds=None, pooled_prompt_embeds=None, **_):
        text, pooled = conditioning(prompt)
        return text, pooled, torch.zeros(TOKENS, 3)

    config = {**FLUX, "num_attention_heads": width // HEAD}
    if not weights.exists():
        torch.manual_seed(0)
        state = FluxTransformer2DModel(**config).state_dict()
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**config).eval()
    transformer.load_state_dict(safetensors.torch.load_file(weights), assign=True)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    for kind in (FluxPipeline, FluxImg2ImgPipeline):
        named = type(kind.__name__, (kind,), {"encode_prompt": encode_prompt, "check_inputs": lambda *_, **__: None})
        pipe = named(transformer=transformer, scheduler=copy.deepcopy(scheduler), **parts)
        pipe.set_progress_bar_config(disable=True)
        yield pipe


def noise_of(seed: int):
    """Return ComfyUI's noise for a seed, [1, 16, SIDE, SIDE]."""
    import torch

    return torch.randn(1, 16, SIDE, SIDE, generator=torch.manual_seed(seed))


def packed(pipe, latents):
    return pipe._pack_latents(latents, 1, 16, SIDE, SIDE)


def unpacked(pipe, latents):
    return pipe._unpack_latents(latents, 8 * SIDE, 8 * SIDE, 8)


# --- workflows ------------------------------------------------------------------------------------------------------


def shipped(name: str, text: str = "a lighthouse", seed: int = 0, **changes: dict) -> dict:
    """Return an example workflow with the test's models: no text encoders and no VAE; latents are saved.

    Args:
        name: Of the workflow.
        text: The prompt.
        seed: Of the noise.
        **changes: Inputs to set, by the title of their node.
    """
    api = json.loads((WORKFLOWS / f"{name}-api.json").read_text("utf-8"))
    ids = {node["_meta"]["title"]: id for id, node in api.items()}
    for gone in ("clip", "vae", "decode", "image"):
        if gone in ids:
            del api[ids[gone]]
    api[ids["text"]] = {"class_type": "TestConditioning", "inputs": {"text": text}}
    inputs = {"samples": [ids["sample"], 0], "filename_prefix": "result"}
    api[ids["save"]] = {"class_type": "SaveLatent", "inputs": inputs}
    if name == "image-to-image":
        api[ids["latent"]] = {"class_type": "LoadLatent", "inputs": {"latent": "image.latent"}}
    else:
        api[ids["latent"]]["inputs"] |= {"width": 8 * SIDE, "height": 8 * SIDE}
    api[ids["model"]]["inputs"]["unet_name"] = "flux.safetensors"
    api[ids["noise"]]["inputs"]["noise_seed"] = seed
    for title, values in changes.items():
        api[ids[title]]["inputs"] |= values
    return api


def with_lora(api: dict) -> dict:
    """Return a workflow with a LoRA between the model's loader and all that takes it."""
    model = next(id for id, node in api.items() if node["class_type"] == "UNETLoader")
    for node in api.values():
        node["inputs"] = {k: ["lora", 0] if v == [model, 0] else v for k, v in node["inputs"].items()}
    inputs = {"model": [model, 0], "lora_name": "flux.safetensors", "strength_model": 1.0}
    return api | {"lora": {"class_type": "LoraLoaderModelOnly", "inputs": inputs}}


def with_controlnet(api: dict) -> dict:
    """Return a workflow with a ControlNet on the conditioning."""
    guider = next(id for id, node in api.items() if node["class_type"] == "BasicGuider")
    positive = api[guider]["inputs"]["conditioning"]
    api[guider]["inputs"]["conditioning"] = ["control", 0]
    loader = {"class_type": "ControlNetLoader", "inputs": {"control_net_name": "flux.safetensors"}}
    image = {"width": 8 * SIDE, "height": 8 * SIDE, "batch_size": 1, "color": 8421504}
    inputs = {"positive": positive, "negative": positive, "control_net": ["loader", 0], "image": ["grey", 0]}
    inputs |= {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    return api | {
        "loader": loader,
        "grey": {"class_type": "EmptyImage", "inputs": image},
        "control": {"class_type": "ControlNetApplyAdvanced", "inputs": inputs},
    }


# --- the checks -----------------------------------------------------------------------------------------------------


class Checks:
    """Prints each check, and remembers whether all have passed."""

    passed = True

    def __call__(self, what: str, holds: bool, shown: object) -> None:
        self.passed &= bool(holds)
        print(f"{'ok  ' if holds else 'FAIL'} {what}: {shown}", flush=True)


def count_checks(check: Checks, what: str, result: Result, calls: int) -> None:
    check(f"{what}, calls", result.error is None and result.calls == calls, result.error or result.calls)
    bar = [(i + 1, calls) for i in range(calls)]
    seen = list(dict.fromkeys(step for step in result.progress if step[0]))
    check(f"{what}, progress bar", seen == bar, f"{len(seen)} of {seen[-1][1] if seen else 0}")
    check(f"{what}, previews", result.previews == calls, result.previews)


def error_of(a, b) -> float:
    return (a - b).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, metavar="PATH_TO_COMFYUI")
    parser.add_argument("--work", type=Path, help="folder for weights, plans and results; default: a temporary one")
    parser.add_argument(
        "--width", type=int, default=256, help=f"of the FLUX, a multiple of {HEAD}; the true one: {WIDTH}"
    )
    given = parser.parse_args()
    with working_folder(given.work) as work, Server(given.checkout, work) as server:
        run(given.checkout.resolve(), work, server, given.width)


def run(checkout: Path, work: Path, server: Server, width: int) -> None:
    """Make the models, which ComfyUI starts beside, and run all checks."""
    import safetensors.torch
    import torch

    import ertacache
    from ertacache.utils.provenance import measured_with

    (work / "ertacache/learned.json").unlink(missing_ok=True)
    text, image = pipelines(work / "diffusers.safetensors", width)
    converting = None
    if not (work / "loras/flux.safetensors").exists():
        paths = os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])
        options = {"cwd": checkout, "env": {**os.environ, "PYTHONPATH": paths}}
        converting = subprocess.Popen([sys.executable, "-c", CONVERT.format(work=str(work))], **options)
    call = {"num_inference_steps": STEPS, "height": 8 * SIDE, "width": 8 * SIDE, "guidance_scale": 3.5}
    if not (work / "ertacache/flux.json").exists():
        prompts = [f"prompt {i}" for i in range(PROMPTS)]
        options = {"effort": "quick", "work": work / "calibration", "progress": False}
        made = ertacache.calibrate(text, prompts, [STEPS / CALLS], **options, **call)
        made[STEPS / CALLS].save(work / "ertacache/flux.json")
    plan = ertacache.Plan.load(work / "ertacache/flux.json")
    picture = 0.5 * noise_of(77)  # latents of an image, as the model has them
    stored = {"latent_tensor": picture / SCALE + SHIFT, "latent_format_version_0": torch.tensor([])}
    safetensors.torch.save_file(stored, work / "input/image.latent")

    check = Checks()
    version = (checkout / "comfyui_version.py").read_text("utf-8").split('"')[-2]
    print(f"ComfyUI {version}; {measured_with()}; {date.today().isoformat()}")
    size = sum(p.numel() for p in text.transformer.parameters()) / 1e6
    print(f"FLUX of width {width} with {size:.1f} million random parameters, 2 blocks, latents of {SIDE} × {SIDE}")
    print(f"T = {STEPS}, N = {CALLS}, computed steps {list(plan.computed)}")
    if converting and converting.wait():
        raise SystemExit("the weights could not be converted to ComfyUI's format")
    server.wait()
    by_plan = {"plan": {"source": "flux.json"}}

    def shown(text: str | None) -> str:
        return (text or "nothing").strip().replace(str(work), "WORK")

    def expected(seed: int, planned: bool = True):
        ertacache.enable(text, plan, on_drift="ignore") if planned else ertacache.disable(text)
        latents = packed(text, noise_of(seed))
        return unpacked(text, text("a lighthouse", latents=latents, output_type="latent", **call).images)

    plain = result = server.run(shipped("text-to-image", seed=5, **by_plan))
    count_checks(check, "text to image", result, CALLS)
    own, uncached = expected(5), expected(5, planned=False)
    error = error_of(result.latents, own)
    check("text to image, largest difference from diffusers with the plan", error < TOLERANCE, f"{error:.1e}")
    print(f"     its largest difference from the uncached run: {error_of(own, uncached):.1e}")

    changes = by_plan | {"sigmas": {"denoise": STRENGTH}}
    result = server.run(shipped("image-to-image", seed=6, **changes))
    begin = int(max(STEPS - STEPS * STRENGTH, 0))
    count_checks(check, "image to image", result, 1 + sum(step > begin for step in plan.computed))
    ertacache.enable(image, plan, on_drift="ignore")
    sigma = plan.native_sigmas[begin]
    latents = packed(image, (1 - sigma) * picture + sigma * noise_of(6))
    latents = {"image": picture, "latents": latents, "strength": STRENGTH}
    own = unpacked(image, image("a lighthouse", **latents, output_type="latent", **call).images)
    error = error_of(result.latents, own)
    check("image to image, largest difference from diffusers with the plan", error < TOLERANCE, f"{error:.1e}")

    for what, change in (("LoRA", with_lora), ("ControlNet", with_controlnet)):
        result = server.run(change(shipped("text-to-image", seed=5, **by_plan)))
        count_checks(check, f"with {what}", result, CALLS)
        if result.latents is not None:
            change = error_of(result.latents, plain.latents)
            check(f"with {what}, the image is another", change > 1e-3, f"largest difference {change:.1e}")

    for what, workflow, words in (
        ("another grid", shipped("text-to-image", **by_plan), f"{STEPS} steps"),
        ("no such plan", shipped("text-to-image", plan={"source": "none.json"}), "no plan file"),
        (
            "a speed-up that the plan lacks",
            shipped("text-to-image", plan={"source": "flux.json", "speedup": 7.0}),
            "speedup",
        ),
    ):
        if what == "another grid":
            id = next(id for id, node in workflow.items() if node["class_type"] == "ERTACacheSigmas")
            inputs = {
                "model": workflow[id]["inputs"]["model"],
                "scheduler": "simple",
                "steps": STEPS,
                "denoise": 1.0,
            }
            workflow[id] = {"class_type": "BasicScheduler", "inputs": inputs}
        result = server.run(workflow)
        check(f"refused: {what}", result.error is not None and words in result.error, shown(result.error))

    options = {"name": "learned", "speedup": STEPS / CALLS, "images": IMAGES, "extra_calls": EXTRA}
    calls, sigmas, texts = [], {"steps": STEPS}, []
    for seed in range(100, 130):
        workflow = shipped("learn-a-plan", f"prompt {seed}", seed, sampler=options, sigmas=sigmas)
        result = server.run(workflow)
        if result.error is not None:
            break
        calls.append(result.calls)
        texts += result.texts
        bar = result.progress[-1]
        if calls[-1] == CALLS:
            break
    stated = [STEPS] * (IMAGES - 1) + [STEPS + EXTRA] * (len(calls) - IMAGES - 1)
    check("learning, calls of each image", calls[: len(stated)] == stated and calls[-1] == CALLS, calls)
    check("learning, progress bar at the end", bar == (CALLS, CALLS), bar)
    check("learning, said", any("followed from now on" in text for text in texts), shown(texts[-1] if texts else None))
    check("learning, saved", (work / "ertacache/learned.json").exists(), "learned.json")
    euler = shipped("learn-a-plan", "a lighthouse", 5, sigmas=sigmas)
    id = next(id for id, node in euler.items() if node["class_type"] == "ERTACacheLearnPlan")
    euler[id] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    uncached = server.run(euler)
    first = shipped("learn-a-plan", "a lighthouse", 5, sampler=options | {"name": "new"}, sigmas=sigmas)
    teaching = server.run(first)
    same = torch.equal(teaching.latents, uncached.latents)
    check("learning, the image is that of ComfyUI's euler, bit for bit", same, uncached.calls)
    planned = server.run(shipped("learn-a-plan", "a lighthouse", 5, sampler=options, sigmas=sigmas))
    count_checks(check, "the learned plan", planned, CALLS)
    print(f"     its largest difference from the uncached run: {error_of(planned.latents, uncached.latents):.1e}")
    print("all passed" if check.passed else "some have failed")
    sys.exit(not check.passed)


if __name__ == "__main__":
    main()
