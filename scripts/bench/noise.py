"""What plans make of a network that answers with noise: a plan and plainly fewer steps beside another uncached run.

    .venv/bin/python scripts/bench/noise.py ERTACache4FLUX --speedups 2,3,5 --count 32 --batch-size 8

Jumps are fitted on exact velocities and their weights can be large, so noise of the network could come out amplified.
Each line compares latents with those of the uncached run on the same network, for stored plans: PSNR in dB, mean / 10th
percentile / worst.

| network | |
|---|---|
| 1 % noise | each output has noise of 1 % of its root mean square, a function of the output that is as good as random |
| bfloat16 | weights and latents |
| int8 activations | inputs of all linear layers are rounded to 255 levels per token |

"Uncached again" is the uncached run with other noise, or in float32: how closely that run itself is defined.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from ertacache import BudgetPlan, UserError
from ertacache.cli import folder_command
from ertacache.cli.arguments import ArgumentParser, check_counts, parse_list
from ertacache.demos.model_folder import load_model_folder
from ertacache.evaluation import metrics
from ertacache.evaluation.runner import Evaluation
from ertacache.evaluation.table import facts
from ertacache.plans.names import budget_name, budget_of, check_speedups
from ertacache.utils.errors import run_program
from ertacache.utils.tables import markdown

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = (*folder_command.OF_A_RUN, "prompt", "prompts", "fps", "site", "target", "effort", "calibration_prompts")
SHARE = 0.01  # of the output's root mean square
WAVES = 1e4  # radians per root mean square: rounding of the output already gives another value


@contextmanager
def noise(pipe, phase: float) -> Iterator[None]:
    """Add noise to the network's output; phases that differ by π/2 give uncorrelated noise."""

    def disturbed(module, arguments, output):
        v = output[0]
        rms = v.square().mean().sqrt()
        return (v + SHARE * rms * 2**0.5 * torch.sin(WAVES * v / rms + phase), *output[1:])

    handle = pipe.transformer.register_forward_hook(disturbed)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def bfloat16(pipe) -> Iterator[None]:
    """Convert the pipeline, and back."""
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    weights = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    pipe.to(torch.bfloat16)
    try:
        yield
    finally:
        pipe.to(torch.float32)
        for module, values in zip(modules, weights, strict=True):
            module.load_state_dict(values)


@contextmanager
def int8_activations(pipe) -> Iterator[None]:
    """Round the inputs of all linear layers to 255 levels, scaled by the largest value of each token."""

    def rounded(module, arguments):
        x = arguments[0]
        level = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        return ((x / level).round() * level, *arguments[1:])

    with ExitStack() as hooks:
        for module in pipe.transformer.modules():
            if isinstance(module, torch.nn.Linear):
                hooks.callback(module.register_forward_pre_hook(rounded).remove)
        yield


@contextmanager
def exact(pipe) -> Iterator[None]:
    """Leave the network as it is."""
    yield


NETWORKS = {  # the network, and the one that the uncached run is made again on
    "float32": (exact, None),
    "1 % noise": (lambda pipe: noise(pipe, 0), lambda pipe: noise(pipe, np.pi / 2)),
    "bfloat16": (bfloat16, exact),
    "int8 activations": (int8_activations, exact),
}


def rows(evaluation: Evaluation, plans: dict[float, BudgetPlan]) -> Iterator[list[str]]:
    """Yield a line of the table per network and speed-up."""
    pipe = evaluation.pipe

    def latents(network, plan=None, settings=None) -> np.ndarray:
        with network(pipe):
            return evaluation.outcome(evaluation.in_loop(plan, settings), count=False).latents

    for name, (network, other) in NETWORKS.items():
        uncached = latents(network)

        def psnr(found: np.ndarray, uncached=uncached) -> str:
            each = metrics.latent_psnrs(uncached, found)
            return f"{each.mean():.1f} / {np.quantile(each, 0.1):.1f} / {each.min():.1f}"

        again = psnr(latents(other)) if other else "–"
        for speedup, plan in plans.items():
            run = other if name == "1 % noise" else network
            fewer = latents(run, settings={**evaluation.settings, "steps": plan.nfe})
            yield [name, f"{speedup:g}×", psnr(latents(run, plan)), psnr(fewer), again]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="model folder, for example ERTACache4FLUX")
    parser.add_argument("--speedups", metavar="S,S,…", default="2,3,5", help="of the stored plans")
    parser.add_argument("--count", type=int, default=32, help="held-out captions")
    args, rest = parser.parse_known_args()
    check_counts(args, "count")
    sampler, speedups = load_model_folder(args.folder), parse_list(args.speedups, "--speedups", "2,3")
    check_speedups(speedups)
    options = folder_command.parse_arguments(sampler, rest, without=WITHOUT)
    if options.model != "demo":
        raise UserError(f"--model {options.model}: this study samples captions of the demo's grammar, use the demo")
    pipe = folder_command.open_pipeline(sampler, options)
    settings = folder_command.checked_settings(sampler, pipe, options)
    steps = settings["steps"]
    names = {speedup: budget_name("demo", steps, budget_of(steps, speedup)) for speedup in speedups}
    plans = {speedup: BudgetPlan.load(sampler.FOLDER / "cache" / name) for speedup, name in names.items()}
    prompts = sampler.grammar.sample_captions(args.count, seed=100, held_out=True)
    seeds = range(options.seed, options.seed + args.count)
    fixed = {"model": "demo", "batch_size": options.batch_size, "work": ROOT / "runs"}
    evaluation = Evaluation(sampler, pipe, prompts, seeds, settings, **fixed)
    head = ["network", "speed-up", "plan, dB", "fewer steps, dB", "uncached again, dB"]
    print(markdown(head, rows(evaluation, plans)))
    print(f"\n{facts(f'{args.count} held-out captions')}")


if __name__ == "__main__":
    run_program(main)
