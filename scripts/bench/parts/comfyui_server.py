"""A ComfyUI that runs on the CPU with the nodes, and what its workflows show."""

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch

MODELS = ("diffusion_models", "controlnet", "loras", "ertacache", "custom_nodes")
RESULTS = ("output", "input", "temp", "user")


@contextlib.contextmanager
def working_folder(path: Path | None = None) -> Iterator[Path]:
    """Yield a folder, a temporary one by default, with the folders of models and empty ones of results."""
    with contextlib.ExitStack() as stack:
        work = path.resolve() if path else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="comfyui-")))
        for folder in RESULTS:
            shutil.rmtree(work / folder, ignore_errors=True)
        for folder in MODELS + RESULTS:
            (work / folder).mkdir(parents=True, exist_ok=True)
        yield work


class Result:
    """What a workflow has shown.

    Attributes:
        calls: Batch of each model call.
        previews: Number of preview images.
        progress: (value, max) of the progress bar.
        texts: Messages below nodes.
        latents: Saved ones.
        error: None where it has run to its end.
    """

    def __init__(self):
        self.calls, self.previews, self.progress, self.texts = [], 0, [], []
        self.latents = self.error = None


class Server:
    """A ComfyUI checkout that runs on the CPU, with the nodes and those of the test.

    Args:
        checkout: Its folder.
        work: Of `working_folder`.
    """

    def __init__(self, checkout: Path, work: Path):
        self.checkout, self.work = checkout.resolve(), work
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.installs = not (self.checkout / "custom_nodes/ertacache").exists()

    def __enter__(self) -> "Server":
        if self.installs:
            self.command("install")
        shutil.copy(Path(__file__).with_name("comfyui_test_nodes.py"), self.work / "custom_nodes")
        config = {"test": {"base_path": str(self.work), **{folder: folder for folder in MODELS}}}
        (self.work / "paths.yaml").write_text(json.dumps(config))  # JSON is YAML
        words = [sys.executable, "main.py", "--cpu", "--force-fp32", "--port", str(self.port), "--disable-auto-launch"]
        words += ["--preview-method", "latent2rgb", "--extra-model-paths-config", str(self.work / "paths.yaml")]
        for folder in RESULTS:
            words += [f"--{folder}-directory", str(self.work / folder)]
        self.log = open(self.work / "log.txt", "w")
        self.process = subprocess.Popen(words, cwd=self.checkout, stdout=self.log, stderr=subprocess.STDOUT)
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
        if self.installs:
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

    def run(self, workflow: dict) -> Result:
        """Run a workflow to its end, over the HTTP interface and the websocket."""
        return asyncio.run(self._run(workflow))

    async def _run(self, workflow: dict) -> Result:
        import aiohttp  # of ComfyUI's environment

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
        result.calls = self.get("test/calls")
        files = sorted(self.work.glob("output/*.latent"), key=lambda path: path.stat().st_mtime)
        if result.error is None and files:
            result.latents = safetensors.torch.load_file(files[-1])["latent_tensor"]
        return result
