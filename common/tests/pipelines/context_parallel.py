"""One of two processes that split a transformer's tokens between them and follow the same plan (test_composition.py).

python context_parallel.py RANK ulysses_degree|ring_degree PLAN MEETING: a plan's path, and a file where they meet.
Prints the largest distance from the latents of a process alone, and the number of computed steps.
"""

import sys

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import ertacache
from tiny_pipelines import flux


def main(rank: int, kind: str, plan: str, meeting: str) -> None:
    gpu = torch.cuda.device_count() > 1
    if not gpu:  # diffusers takes the rank modulo their number, and can do the rest on a CPU
        torch.accelerator.device_count = lambda: 1
    dist.init_process_group("nccl" if gpu else "gloo", f"file://{meeting}", rank=rank, world_size=2)
    device, dtype = (f"cuda:{rank}", torch.bfloat16) if gpu else ("cpu", torch.float32)
    tiny = flux()
    tiny.pipe.to(device, dtype)
    text = tiny.arguments["prompt_embeds"]
    tiny.arguments["prompt_embeds"] = torch.cat([text, text[:, :1]], dim=1)  # 6 tokens, for two processes
    tiny.arguments |= {k: v.to(device, dtype) for k, v in tiny.arguments.items() if torch.is_tensor(v)}
    ertacache.enable(tiny.pipe, plan)
    alone, model = tiny.run(), tiny.pipe.transformer
    if gpu:
        model.set_attention_backend("_native_cudnn")
    model.enable_parallelism(config=ContextParallelConfig(**{kind: 2}))
    with torch.no_grad():
        found = tiny.run()
    print((found - alone).abs().max().item(), ertacache.summary(tiny.pipe).computed)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
