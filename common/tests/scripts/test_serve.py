"""The servers under scripts/serve, on the FLUX demo over real HTTP, four requests at once."""

import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

import ertacache
from conftest import ROOT, open_model_folder
from ertacache.calibration.accelerate import find_plans

CALL = {"num_inference_steps": 6, "height": 64, "width": 64, "guidance_scale": 3.5, "max_sequence_length": 16}
REQUESTS = [("a red apple", 2, 2), ("a rocket", 3, 2), ("a fruit", 4, 3), ("a sailing boat", 5, None)]


def post(port, body) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/generate", json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, timeout=300) as answer:
        return answer.read()


@pytest.mark.parametrize("script, library", [("fastapi_server.py", "fastapi"), ("ray_server.py", "starlette")])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "0"], "--batch-size 0: give a whole number from 1 to 1024"),
        (["--batch-size", "-3"], "--batch-size -3: give a whole number from 1 to 1024"),
        (["--batch-size", "1025"], "--batch-size 1025: give a whole number from 1 to 1024"),
        (["--batch-size", "many"], "argument --batch-size: invalid int value: 'many' (see --help)"),
        (["--replicas", "0"], "--replicas 0: give a whole number from 1 to 1024"),
        (["--replicas", "-1"], "--replicas -1: give a whole number from 1 to 1024"),
        (["--replicas", "9" * 200], "--replicas 9999"),
        (["--replicas", "2.5"], "argument --replicas: invalid int value: '2.5' (see --help)"),
        (["--port", "65536"], "--port 65536: give a whole number from 1 to 65535"),
        (["--speedups", "2", "nan"], "--speedups nan: a speed-up is a number of at least 1"),
        (["height"], "'height': write NAME=VALUE with a JSON value, height=64"),
        ([], "no model 'gone': give a folder"),
    ],
)
def test_options_that_cannot_be_are_one_line_and_exit_code_2(script, library, words, message, monkeypatch, capsys):
    pytest.importorskip(library)
    if script == "fastapi_server.py" and "--replicas" in words:
        message = "unrecognized arguments: --replicas"
    if script == "ray_server.py":
        if not words:
            pytest.skip("the model is loaded by a replica")
        monkeypatch.setitem(sys.modules, "ray", MagicMock())
        monkeypatch.setattr(signal, "sigwait", lambda _: None)
    folder = ROOT / "scripts" / "serve"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", [script, "gone", *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(folder / script), run_name="__main__")
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ERTACACHE_HOME", str(tmp_path / "home"))
    return tmp_path


def started(script, port, home):
    """Start a server and wait until it answers."""
    words = [f"{name}={value}" for name, value in CALL.items()]
    command = [sys.executable, str(ROOT / "scripts" / "serve" / script), str(ROOT / "ERTACache4FLUX" / "demo"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "common")}
    log = (home / "log").open("w")
    process = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=log, stderr=subprocess.STDOUT)
    for _ in range(400):
        assert process.poll() is None, (home / "log").read_text()
        try:
            post(port, {"prompt": ""})
        except urllib.error.HTTPError as error:
            if error.code == 422:
                return process
        except OSError:
            pass
        time.sleep(0.5)
    process.kill()
    raise AssertionError((home / "log").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("script, library", [("fastapi_server.py", "fastapi"), ("ray_server.py", "ray")])
def test_four_requests_at_once_give_what_direct_calls_give(script, library, home):
    pytest.importorskip(library)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = started(script, port, home)
    try:
        bodies = [{"prompt": prompt, "seed": seed, "speedup": speedup} for prompt, seed, speedup in REQUESTS]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda body: post(port, body), bodies))
        wrong = [({"prompt": "a fox", "speedup": 7}, "give one of 2, 3, or null"), ({"prompt": " "}, "give a text")]
        wrong += [({"prompt": "a fox", "seed": seed}, f"seed {seed}: give a whole number") for seed in (-1, 2**70)]
        for body, words in wrong:
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(port, body)
            assert refused.value.code == 422 and words in refused.value.read().decode()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    pipe = open_model_folder("flux").pipe
    try:
        ertacache.enable(pipe, find_plans(pipe, [2, 3], call_kwargs=CALL))
        for (prompt, seed, speedup), answer in zip(REQUESTS, answers, strict=True):
            ertacache.speedup(pipe, speedup)
            wanted = pipe(prompt, generator=torch.Generator().manual_seed(seed), **CALL).images[0]
            found = np.asarray(Image.open(io.BytesIO(answer))).astype(int)
            assert np.abs(found - np.asarray(wanted).astype(int)).max() <= 1, prompt
    finally:
        ertacache.disable(pipe)
