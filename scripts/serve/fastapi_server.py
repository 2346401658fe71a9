"""A stock pipeline behind HTTP, one process and one GPU: requests that arrive together share a batch.

    .venv/bin/pip install fastapi uvicorn
    .venv/bin/python scripts/serve/fastapi_server.py ERTACache4FLUX/demo num_inference_steps=30 height=64 width=64 \\
        max_sequence_length=16
    curl localhost:8000/generate -H "content-type: application/json" -o rocket.png \\
        -d '{"prompt": "a rocket", "seed": 0, "speedup": 2}'

The first start calibrates; later ones find the plans. Each request has its own speed-up, or null for uncached.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel

from ertacache.utils.errors import run_program
from server_parts.model import Model, Request, options_of

WAIT = 0.05  # seconds that a request waits for others


class Body(BaseModel):
    prompt: str
    seed: int = 0
    speedup: float | None = 2


class Batches:
    """Collects requests and hands them to the model, one batch at a time.

    Args:
        model: Theirs.
        size: Most requests of a batch.
    """

    def __init__(self, model: Model, size: int):
        self.model, self.size, self.waiting = model, size, asyncio.Queue()
        self.thread = ThreadPoolExecutor(max_workers=1)

    async def serve(self) -> None:
        """Run for ever."""
        while True:
            batch = [await self.waiting.get()]
            await asyncio.sleep(WAIT)
            while len(batch) < self.size and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            requests, futures = zip(*batch, strict=True)
            try:
                images = await asyncio.get_running_loop().run_in_executor(self.thread, self.model.generate, requests)
            except Exception as error:  # of whatever kind: these clients hear of it, and the server goes on
                logging.exception("a batch failed")
                for future in futures:
                    future.set_exception(HTTPException(500, str(error)))
                continue
            for future, image in zip(futures, images, strict=True):
                if not future.cancelled():
                    future.set_result(image)

    async def result(self, request: Request) -> bytes:
        """Return a request's image when its batch is done."""
        future = asyncio.get_running_loop().create_future()
        await self.waiting.put((request, future))
        return await future


def app_of(model: Model, size: int) -> FastAPI:
    """Return the application: POST /generate, GET /summary."""
    batches: list[Batches] = []

    @asynccontextmanager
    async def running(_):
        batches.append(Batches(model, size))
        task = asyncio.create_task(batches[0].serve())
        yield
        task.cancel()

    app = FastAPI(title="ERTACache", lifespan=running)

    @app.post("/generate", response_class=Response)
    async def generate(body: Body) -> Response:
        request = Request(**body.model_dump())
        problem = model.problem(request)
        if problem:
            raise HTTPException(422, problem)
        return Response(await batches[0].result(request), media_type="image/png")

    @app.get("/summary")
    def summary() -> dict[str, str]:
        return {"summary": model.summary()}

    return app


def main() -> None:
    args = options_of(__doc__)
    logging.basicConfig(level=logging.INFO)  # each call's computed and skipped steps
    model = Model(args.model, args.speedups, dict(args.arguments))
    uvicorn.run(app_of(model, args.batch_size), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    run_program(main)
