"""Training stages of the demos: resumable, with a learning-rate schedule and averaged weights; how VAEs start."""

import os
import time
from pathlib import Path

import torch
from tqdm import tqdm


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint so that an interrupted write leaves the old file intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def run_stage(name, work, steps, modules, optimizer, loss_of, every=200, learning_rate=1e-3, ema=None, cooldown=0.25):
    """Train modules for a number of steps, resuming from `WORK/NAME.pt`.

    The learning rate rises linearly over 200 steps, stays constant, and falls linearly to zero at the end.

    Args:
        name: Of the stage.
        work: Folder of the checkpoints.
        steps: Training steps in total.
        modules: Modules to train, by name in the checkpoint.
        optimizer: Of their parameters. A parameter group may have a "share", a factor on the learning rate.
        loss_of: loss_of(step) returns the loss. It draws its batch from a generator seeded by the step, so that a
            resumed run sees the same batches.
        every: Steps between two checkpoints.
        learning_rate: The constant rate.
        ema: The moving average to update; None for none.
        cooldown: Share of the steps over which the learning rate falls.
    """
    path, start = work / f"{name}.pt", 0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        start = state["step"]
        for key, module in modules.items():
            module.load_state_dict(state[key])
        if start < steps:
            optimizer.load_state_dict(state["optimizer"])
        if ema:
            ema.load_state_dict(state["ema"])

    def save(step):
        average = {"ema": ema.state_dict()} if ema else {}
        states = {key: module.state_dict() for key, module in modules.items()}
        save_atomically({"step": step, "optimizer": optimizer.state_dict(), **states, **average}, path)

    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10, disable=None)
    mean_loss = None  # exponential moving average
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
        mean_loss = loss.item() if mean_loss is None else 0.99 * mean_loss + 0.01 * loss.item()
        if (step + 1) % every == 0 or step + 1 == steps:
            save(step + 1)
            print(f"{time.strftime('%H:%M:%S')} {name} {step + 1}/{steps} loss {mean_loss:.5f}", flush=True)


def noise_levels(count, generator, shift=1.0):
    """Draw sigmas in (0, 1), [count]: mostly logit-normal around 0.55, a fifth uniform so that both ends are seen.

    Args:
        count: Number of sigmas.
        generator: Random generator of torch.
        shift: Values above 1 move them towards noise as samplers do, s → shift s / (1 + (shift − 1) s).
    """
    sigma = torch.sigmoid(0.2 + torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    sigma = torch.where(torch.rand(count, generator=generator) < 0.2, uniform, sigma)
    return shift * sigma / (1 + (shift - 1) * sigma)


class Ema:
    """Exponential moving average of a module's parameters and buffers.

    Args:
        module: The module.
        decay: Of the average; smaller in the first steps.
    """

    def __init__(self, module, decay=0.999):
        self.module, self.decay = module, decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    def update(self, step):
        """Average the module's current weights in."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in self.module.state_dict().items():
            self.shadow[key].lerp_(value, 1 - decay)

    def state_dict(self):
        """Return the averaged weights."""
        return self.shadow

    def load_state_dict(self, state):
        """Replace the averaged weights."""
        self.shadow = {k: v.clone() for k, v in state.items()}


@torch.no_grad()
def start_straight(vae, *log_variance_biases):
    """Initialise a VAE so that it passes colours through before any training, because training is short here.

    Convolutions on the direct path copy channels at their centre (and newest frame). Where the number of channels
    grows, they carry both signs and a constant, so that normalisation and SiLU lose nothing. Residual branches start
    at zero, and posteriors start narrow.

    Args:
        vae: The VAE.
        log_variance_biases: Biases whose second half is a posterior's log-variance.
    """
    for name, conv in vae.named_modules():
        path = name.split(".")
        if not isinstance(conv, torch.nn.Conv2d | torch.nn.Conv3d) or {"to_qkv", "proj", "conv1"} & set(path):
            continue
        if "conv2" in path:
            for parameter in conv.parameters():
                torch.nn.init.zeros_(parameter)
            continue
        outputs, inputs, *kernel = conv.weight.shape
        if conv.bias is not None:
            constant = 1.0 if "conv_y" in path else 0.0  # CogVideoX's norms: x conv_y(z) + conv_b(z)
            torch.nn.init.constant_(conv.bias, constant)
        conv.weight.mul_(0.2)
        if "conv_y" in path:
            continue
        centre = [size // 2 for size in kernel]
        if len(kernel) == 3:
            centre[0] = kernel[0] - 1
        tap = conv.weight[(slice(None), slice(None), *centre)]
        if outputs == 2 * inputs and "upsamplers" in path:  # Open-Sora: two frames from neighbouring channels
            tap[range(outputs), [k // 2 for k in range(outputs)]] += 1.0
        elif outputs >= 2 * inputs and "time_conv" not in path:
            for k in range(outputs):
                channel = k % (2 * inputs + 1)
                if channel == 2 * inputs:
                    if conv.bias is not None:
                        conv.bias[k] = 1.0
                else:
                    tap[k, channel % inputs] += 1.0 if channel < inputs else -1.0
        elif outputs >= inputs:
            tap[range(outputs), [k % inputs for k in range(outputs)]] += 1.0
        else:
            tap += torch.nn.init.orthogonal_(torch.empty(outputs, inputs))
    for bias in log_variance_biases:
        bias[len(bias) // 2 :] = -6.0
