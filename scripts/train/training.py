"""Resumable training stages for the demos: checkpoints, learning rate, moving average."""

import os
import time
from pathlib import Path

import torch
from tqdm import tqdm


def save_atomically(state: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def run_stage(name, work, steps, parts, optimizer, loss_of, every=200, learning_rate=1e-3, ema=None, cooldown=0.25):
    """Train `parts` (name → module) for `steps`, resuming from `<work>/<name>.pt`.

    Learning rate: linear warm-up over 200 steps, constant, linear decay to zero over the last `cooldown` share; a
    parameter group may have a "share" of it.
    `loss_of(step)` draws its batch from a generator seeded by the step, so a resumed run sees the same batches.
    """
    path, start = work / f"{name}.pt", 0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        start = state["step"]
        for key, part in parts.items():
            part.load_state_dict(state[key])
        if start < steps:
            optimizer.load_state_dict(state["optimizer"])
        if ema:
            ema.load_state_dict(state["ema"])

    def save(step):
        extra = {"ema": ema.state_dict()} if ema else {}
        states = {key: part.state_dict() for key, part in parts.items()}
        save_atomically({"step": step, "optimizer": optimizer.state_dict(), **states, **extra}, path)

    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10, disable=None)
    average = None
    for step in bar:
        scale = min((step + 1) / 200, (steps - step) / max(cooldown * steps, 1), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale * group.get("share", 1.0)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update(step)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        if (step + 1) % every == 0 or step + 1 == steps:
            save(step + 1)
            print(f"{time.strftime('%H:%M:%S')} {name} {step + 1}/{steps} loss {average:.5f}", flush=True)


def noise_levels(count, generator, shift=1.0):
    """Sigmas in (0, 1): mostly logit-normal around 0.55, a fifth uniform so that both ends are seen.

    shift > 1 moves them towards noise, s → shift s / (1 + (shift − 1) s), as samplers do.
    """
    sigma = torch.sigmoid(0.2 + torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    sigma = torch.where(torch.rand(count, generator=generator) < 0.2, uniform, sigma)
    return shift * sigma / (1 + (shift - 1) * sigma)


class Ema:
    """Exponential moving average of a module's parameters, in float32, with a warm-up of the decay."""

    def __init__(self, module, decay=0.999):
        self.module, self.decay = module, decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in self.module.state_dict().items():
            self.shadow[key].lerp_(value, 1 - decay)

    def state_dict(self):
        return self.shadow

    def load_state_dict(self, state):
        self.shadow = {k: v.clone() for k, v in state.items()}
