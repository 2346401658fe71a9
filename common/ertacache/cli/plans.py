"""`ertacache plans`: the plans that `ertacache.accelerate` has made and stored."""

from collections.abc import Sequence
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ertacache.cli.inspect import print_plans
from ertacache.plans.store import PlanStore, Stored
from ertacache.utils.errors import UserError, printable
from ertacache.utils.words import counted

SHOWN = ("height", "width", "num_frames", "guidance_scale")  # settings that the list shows, as they are called


def show_all() -> None:
    """Print a table of the stored plans."""
    store = PlanStore()
    plans = store.plans()
    if not plans:
        print(f"no plan in {store.folder}: ertacache.accelerate(pipe) and ertacache generate --speedup make them")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("name", "model", "calls", "settings", "KiB", "last used"):
        table.add_column(head, justify="right" if head == "KiB" else "left", overflow="fold")
    for stored in plans:
        table.add_row(*map(Text, cells(stored)))
    Console(highlight=False).print(table)
    print(f"{sum(stored.size for stored in plans) / 2**20:.1f} MiB in {store.folder}")


def cells(stored: Stored) -> list[str]:
    """Return the cells of a plan's row."""
    plan, used = stored.plan, f"{datetime.fromtimestamp(stored.used):%Y-%m-%d %H:%M}"
    size = f"{stored.size / 1024:.0f}"
    if plan is None:
        return [stored.name, "cannot be read", "", "", size, used]
    settings = plan.requirements.settings
    values = ", ".join(f"{name} {settings[name]}" for name in SHOWN if name in settings)
    texts = [str(plan.provenance.get("model", "")), f"{plan.nfe} of {plan.steps}", values]
    return [stored.name, *map(printable, texts), size, used]


def show(name: str) -> None:
    """Print a stored plan."""
    stored = PlanStore().named(name)
    if stored.plan is None:
        raise UserError(f"{stored.path} cannot be read: ertacache plans delete {stored.name}")
    print_plans([stored.plan])
    print(f"\n{stored.path}")


def delete(names: Sequence[str], everything: bool) -> None:
    """Delete stored plans, by name or all."""
    if bool(names) == everything:
        raise UserError("give the names of plans to delete, or --all")
    store = PlanStore()
    plans = store.plans() if everything else [store.named(name) for name in names]
    for stored in plans:
        store.delete(stored)
    print(f"{counted(len(plans), 'plan')} deleted")
