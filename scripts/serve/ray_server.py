"""A stock pipeline on Ray Serve: replicas, one per GPU, whose requests share batches.

    .venv/bin/pip install "ray[serve]"
    .venv/bin/python scripts/serve/ray_server.py ERTACache4FLUX/demo num_inference_steps=30 height=64 width=64 \\
        max_sequence_length=16
    curl localhost:8000/generate -d '{"prompt": "a rocket", "seed": 0, "speedup": 2}' -o rocket.png

The first replica to start calibrates; the others wait for its plans, as later starts find them.
"""

import logging
import os
import signal
from pathlib import Path

import ray
import torch
from ray import serve
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ertacache.utils.errors import run_program
from server_parts.model import options_of

HERE = Path(__file__).resolve().parent


@serve.deployment
class Server:
    """A replica.

    Args:
        source, speedups, arguments: Of the model.
        size: Most requests of a batch.
    """

    def __init__(self, source: str, speedups: list[float], arguments: dict, size: int):
        from server_parts.model import Model  # in the replica's process, which has the weights

        logging.getLogger("ertacache").setLevel(logging.INFO)
        self.model = Model(source, speedups, arguments)
        self.generate.set_max_batch_size(size)

    @serve.batch(batch_wait_timeout_s=0.05)
    async def generate(self, requests: list) -> list[bytes]:
        return self.model.generate(requests)

    async def __call__(self, http: HttpRequest) -> Response:
        from server_parts.model import Request

        try:
            request = Request(**await http.json())
            problem = self.model.problem(request)
        except (ValueError, TypeError, AttributeError) as error:
            problem = f"give JSON with prompt, seed and speedup ({error})"
        if problem:
            return JSONResponse({"detail": problem}, 422)
        return Response(await self.generate(request), media_type="image/png")


def main() -> None:
    args = options_of(__doc__, has_replicas=True)
    source = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}}
    ray.init(include_dashboard=False, runtime_env=environment)
    serve.start(http_options={"host": args.host, "port": args.port})
    options = {"num_gpus": 1 if torch.cuda.is_available() else 0}
    deployment = Server.options(num_replicas=args.replicas, ray_actor_options=options)
    server = deployment.bind(source, args.speedups, dict(args.arguments), args.batch_size)
    serve.run(server, route_prefix="/generate")
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    serve.shutdown()


if __name__ == "__main__":
    run_program(main)
