"""A stock pipeline with plans, as servers call it: requests of one speed-up share a batch."""

import argparse
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

import ertacache
from ertacache import UserError
from ertacache.cli.arguments import ArgumentParser, check_counts
from ertacache.pipelines.load import one_line_errors
from ertacache.plans.names import check_speedups, model_source
from ertacache.utils.checks import check_seed
from ertacache.utils.devices import default_device, dtype_for
from ertacache.utils.errors import shown

LARGEST_COUNT = 1024  # of requests in a batch, and of replicas
LARGEST_PORT = 65535


@dataclass(frozen=True)
class Request:
    """What one client wants.

    Args:
        prompt: A text.
        seed: Of the noise.
        speedup: One of the model's, or None for uncached.
    """

    prompt: str
    seed: int = 0
    speedup: float | None = 2


class Model:
    """A pipeline that makes images at several speeds.

    Args:
        source: A folder or a Hub id.
        speedups: That clients may ask for.
        arguments: Of the pipeline's call, the same for all requests (num_inference_steps, height, …).
    """

    def __init__(self, source: str, speedups: Sequence[float], arguments: dict[str, Any]):
        device, source = default_device(), model_source(source)
        with one_line_errors(source):
            self.pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype_for(device)).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.arguments, self.speedups = arguments, list(speedups)
        ertacache.accelerate(self.pipe, self.speedups, **arguments)

    def problem(self, request: Request) -> str | None:
        """Return why a request cannot be served, for the client."""
        try:
            check_seed(request.seed, "seed")
        except UserError as error:
            return str(error)
        if request.speedup not in (None, *self.speedups):
            return f"speedup {request.speedup:g}: give one of {', '.join(f'{s:g}' for s in self.speedups)}, or null"
        return None if request.prompt.strip() else "prompt: give a text"

    def generate(self, requests: Sequence[Request]) -> list[bytes]:
        """Return a PNG for each request. A plan is static, so that it serves any batch."""
        images: dict[int, bytes] = {}
        for speedup in dict.fromkeys(request.speedup for request in requests):
            numbers = [i for i, request in enumerate(requests) if request.speedup == speedup]
            ertacache.speedup(self.pipe, speedup)
            prompts = [requests[i].prompt for i in numbers]
            generators = [torch.Generator().manual_seed(requests[i].seed) for i in numbers]
            results = self.pipe(prompts, generator=generators, **self.arguments).images
            images |= {i: png(image) for i, image in zip(numbers, results, strict=True)}
        return [images[i] for i in range(len(requests))]

    def summary(self) -> str:
        """Return what the pipeline has done so far."""
        return str(ertacache.summary(self.pipe))


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def options_of(description: str, has_replicas: bool = False) -> argparse.Namespace:
    """Return the options of a server, from the command line.

    Args:
        description: Of the server.
        has_replicas: Whether it has --replicas.

    Raises:
        UserError: A number out of range.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("model", help="a folder or a Hub id")
    parser.add_argument("arguments", nargs="*", type=argument, metavar="NAME=VALUE", help="of the pipeline's call")
    text = "that clients may ask for (default: 2 3)"
    parser.add_argument("--speedups", type=float, nargs="+", default=[2, 3], metavar="S", help=text)
    parser.add_argument("--batch-size", type=int, default=4, help="most requests of a batch")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="likewise")
    if has_replicas:
        parser.add_argument("--replicas", type=int, default=1, help="processes with a model each")
    args = parser.parse_args()
    check_speedups(args.speedups)
    check_counts(args, "batch_size", *(["replicas"] if has_replicas else []), most=LARGEST_COUNT)
    check_counts(args, "port", most=LARGEST_PORT)
    return args


def argument(word: str) -> tuple[str, Any]:
    """Return name and value of NAME=VALUE, where VALUE is JSON."""
    name, _, value = word.partition("=")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{shown(word)}: write NAME=VALUE with a JSON value, height=64") from error
