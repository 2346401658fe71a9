"""`ertacache inspect`: a plan's schedule as blocks, what it is for, and how it was made."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ertacache.plans import BudgetPlan, Plan, ThresholdPlan
from ertacache.plans.names import TARGETS
from ertacache.utils.errors import printable
from ertacache.utils.words import counted

STYLES = {True: "bold cyan", False: "dim"}  # of computed and of skipped steps
WIDEST = 3  # characters per step
FACTS = (  # of a model's or scheduler's config, where it has them
    *("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "in_channels", "patch_size"),
    *("shift", "flow_shift", "use_dynamic_shifting", "solver_order", "prediction_type", "timestep_spacing"),
)
METRIC = "mean squared error of the final latents"  # where a plan does not say which


def show(source: str, as_json: bool) -> None:
    """Print a plan, drawn or as JSON."""
    plans = read(source)
    if as_json:
        values = [as_values(plan) for plan in plans]  # ASCII, so that nothing in it steers a terminal
        print(json.dumps(values if len(plans) > 1 else values[0], indent=1))
    else:
        print_plans(plans)


def print_plans(plans: Sequence[Plan]) -> None:
    """Print plans, drawn."""
    console = Console(highlight=False)
    for number, plan in enumerate(plans):
        if number:
            console.print()
        console.print(drawn(plan, console.width, unicode=console.encoding.startswith("utf")), soft_wrap=False)


def read(source: str) -> list[Plan]:
    """Read a plan from its file; or those of a folder or of the Hub (which imports diffusers, and takes seconds)."""
    if Path(source).expanduser().is_file():
        return [Plan.load(Path(source).expanduser())]
    from ertacache.pipelines.enable import read_plans

    return read_plans(source).members


def as_values(plan: Plan) -> dict[str, Any]:
    """Return the whole plan, arrays included, as JSON values."""
    values = {"kind": plan.kind, "nfe": plan.nfe, "speedup_nfe": plan.speedup, **dataclasses.asdict(plan)}
    return {**values.pop("requirements"), **values}


def drawn(plan: Plan, width: int, unicode: bool = True) -> Group:
    """Return all that is printed of a plan, within so many characters per line."""
    parts = [Text(f"ERTACache {plan.kind} plan: {plan.nfe} of {plan.steps} steps computed", "bold"), Text()]
    parts += [*schedule(plan, width, "█░" if unicode else "#."), Text(), facts(plan)]
    tried = plan.provenance.get("calibration", {}).get("errors")
    if tried:
        parts += [Text(), candidates(tried, plan.provenance["calibration"].get("chosen"))]
    return Group(*parts)


# --- the schedule ------------------------------------------------------------------------------------------------


def schedule(plan: Plan, width: int, blocks: str) -> Iterator[Text]:
    """Yield the steps as blocks, computed and skipped, wrapped at the width, with σ at both ends and numbers above.

    A plan with a grid of its own shows the steps of that grid.
    """
    grid = plan.sigmas or plan.native_sigmas
    steps, left, right = len(grid) - 1, f"σ {grid[0]:.3f}  ", f"  σ {grid[-1]:.3f}"
    computed = set(plan.computed)
    room = max(10, width - len(left) - len(right))
    cell = max(1, min(WIDEST, room // steps))
    across = room // cell // 10 * 10 if steps * cell > room else steps
    for start in range(0, steps, across):
        stop = min(start + across, steps)
        yield Text(" " * len(left) + ruler(start, stop, cell), "dim")
        line = Text(left if start == 0 else " " * len(left))
        for i in range(start, stop):
            line.append(blocks[i not in computed] * max(1, cell - 1), STYLES[i in computed])
            line.append(" " * (cell > 1))
        yield line.append(right if stop == steps else "")
    own = f"; steps of a grid of its own, {steps} in place of {plan.steps}" if steps != plan.steps else ""
    yield Text(f"{blocks[0]} computed  {blocks[1]} skipped{own}", "dim")


def ruler(start: int, stop: int, cell: int) -> str:
    """Return the numbers of every tenth step over their blocks."""
    return "".join(f"{i:<{10 * cell}}" for i in range(start, stop, 10)).rstrip()


# --- tables ------------------------------------------------------------------------------------------------------


def facts(plan: Plan) -> Table:
    """Return what the plan is for, its errors, and its provenance."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    required = plan.requirements
    rows = {
        "model": component(required.model),
        "scheduler": component(required.scheduler),
        "settings": listed(required.settings) or "–",
        "calls": f"N = {plan.nfe} of T = {plan.steps}, {plan.speedup:.2f}× fewer",
        **(budget_facts(plan) if isinstance(plan, BudgetPlan) else threshold_facts(plan)),
        **provenance(plan.provenance),
    }
    for name, value in rows.items():
        table.add_row(name, Text(printable(value)))
    return table


def budget_facts(plan: BudgetPlan) -> dict[str, str]:
    errors = {"calibration": plan.predicted_error, "held-out prompts": plan.held_out_error}
    errors = ", ".join(f"{name} {value:.2e}" for name, value in errors.items() if value is not None)
    calibration = plan.provenance.get("calibration", {})
    facts = {
        "target": f"{plan.target}: {TARGETS[plan.target]}",
        "history": f"H = {plan.history_length} velocities per jump",
        "error": f"{errors} ({metric_of(calibration)})" if errors else "–",
    }
    if {"noise_gain", "noise_gain_uncached"} <= calibration.keys():
        gains = f"{calibration['noise_gain']:.2f}, of the uncached run {calibration['noise_gain_uncached']:.2f}"
        facts["noise gain"] = gains
    if not calibration.get("finished", True):
        rollouts = calibration.get("rollouts", "some")
        facts["unfinished"] = f"the best of {counted(rollouts, 'rollout')}; the command that made it goes on"
    return facts


def threshold_facts(plan: ThresholdPlan) -> dict[str, str]:
    calibration = plan.provenance.get("calibration", {})
    error = calibration.get("errors", {}).get(calibration.get("chosen"))
    return {
        "threshold": f"λ = {plan.threshold:g}",
        "site": plan.site,
        "parts": f"time adjustment φ: {plan.phi_definition}, rectified: {'yes' if plan.rectified else 'no'}",
        "error": "–" if error is None else f"calibration {error:.2e} ({metric_of(calibration)})",
    }


def metric_of(calibration: Mapping[str, Any]) -> str:
    """Return what the errors of a plan measure."""
    return calibration.get("error_metric", calibration.get("metric", METRIC))


def provenance(recorded: Mapping[str, Any]) -> dict[str, str]:
    """Return where the plan comes from; what it does not record is left out."""
    prompts = dict(recorded.get("prompts", {}))
    fitted = f" ({prompts['fitted']} fitted, the others held out)" if "fitted" in prompts else ""
    texts = {
        "model": f"{recorded.get('model')}, weights {recorded.get('weights')}",
        "prompts": f"{counted(prompts.get('count'), 'prompt')}{fitted}",
        "seeds": f"seeds {ranges(recorded.get('seeds', ()))}",
        "batch_size": f"{recorded.get('batch_size')} per call",
    }
    source = "; ".join(text for name, text in texts.items() if name in recorded)
    rows = {"calibrated on": source, "date": recorded.get("date"), "with": listed(recorded.get("libraries", {}))}
    return {name: value for name, value in rows.items() if value}


def candidates(errors: Mapping[str, float], chosen: str | None) -> Table:
    """Return what calibration tried, the best first."""
    table = Table("tried in calibration", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("")
    for name, error in sorted(errors.items(), key=lambda item: item[1]):
        table.add_row(Text(printable(name)), f"{error:.2e}", "chosen" if name == chosen else "")
    return table


def component(config: Mapping[str, Any]) -> str:
    """Return class and main facts of a model or scheduler."""
    main = listed({name: config[name] for name in FACTS if config.get(name) is not None})
    return f"{config.get('class', '–')}" + (f" ({main})" if main else "")


def listed(values: Mapping[str, Any]) -> str:
    """Return names and values, joined."""
    return ", ".join(f"{name} {json.dumps(v, ensure_ascii=False) if v == '' else v}" for name, v in values.items())


def ranges(numbers: Sequence[int]) -> str:
    """Return 0, 1, 2, 5 as 0–2, 5."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda item: item[1] - item[0])]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
