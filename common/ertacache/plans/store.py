"""The user's own plans: a folder that finds them again by model, scheduler, steps and settings.

    HOME/plans/MODEL/CONDITIONS/budget-N.json     MODEL: fingerprint of the weights; CONDITIONS: hash of all else

HOME is ~/.cache/ertacache, or what the system has for caches in its place, or the environment's ERTACACHE_HOME. Plans
are small, and the least recently used ones go where all together exceed LIMIT.
"""

import contextlib
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from ertacache.plans.plan import Plan
from ertacache.plans.requirements import Requirements
from ertacache.utils.checkpoints import digest
from ertacache.utils.errors import PlanError, UserError

LIMIT = 2**26  # bytes of all plans together: thousands
ABANDONED = 30 * 24 * 3600  # seconds after which the work of an interrupted calibration goes
WORK, DAMAGED = "work", ".damaged"


@dataclass(frozen=True)
class Stored:
    """A plan in the store.

    Attributes:
        path: Of its JSON file.
        plan: It; None where it cannot be read.
        size: Of its files, bytes.
        used: When it was last made or followed, seconds since 1970.
    """

    path: Path
    plan: Plan | None
    size: int
    used: float

    @property
    def name(self) -> str:
        """How a person refers to it: the first digits of its conditions' hash, and N."""
        return f"{self.path.parent.name[:8]}-{self.path.stem.removeprefix('budget-')}"


class PlanStore:
    """A folder of plans.

    Args:
        home: By default the user's.
    """

    def __init__(self, home: str | Path | None = None):
        home = home or os.environ.get("ERTACACHE_HOME") or user_cache_path("ertacache")
        self.folder = Path(home).expanduser() / "plans"

    def entry(self, requirements: Requirements, weights: str) -> Path:
        """Return the folder of the plans for a run. weights: what tells the model's weights apart."""
        conditions = [requirements.steps, requirements.model, requirements.scheduler, requirements.settings]
        return self.folder / weights / digest(conditions)[:16]

    def find(self, entry: Path, budget: int) -> Plan | None:
        """Return the plan that computes so many steps; None where there is none. A damaged one is set aside."""
        path = self.path(entry, budget)
        if not path.exists():
            return None
        try:
            plan = Plan.load(path)
        except PlanError as error:
            warnings.warn(f"{error}; it is set aside, and made anew", stacklevel=2)
            self._set_aside(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return plan

    def add(self, entry: Path, plan: Plan) -> Path:
        """Store a plan, in place of one that computes as many steps, and let the oldest go. Returns its path."""
        path = plan.save(self.path(entry, plan.nfe))
        self.trim()
        return path

    @staticmethod
    def path(entry: Path, budget: int) -> Path:
        """Return the path of the plan that computes so many steps."""
        return entry / f"budget-{budget}.json"

    def plans(self) -> list[Stored]:
        """Return all plans, those last used first."""
        return sorted(self._plans(), key=lambda stored: -stored.used)

    def named(self, name: str) -> Stored:
        """Return the plan of a name that `plans` shows, or of its beginning."""
        found = [stored for stored in self.plans() if stored.name.startswith(name)]
        if len(found) != 1:
            problem = "several plans begin so" if found else "no such plan"
            raise UserError(f"{name!r}: {problem}, `ertacache plans` lists them")
        return found[0]

    def delete(self, stored: Stored) -> None:
        """Delete a plan, and its folder where nothing else is in it."""
        for path in _files_of(stored.path):
            path.unlink(missing_ok=True)
        for folder in (stored.path.parent, stored.path.parent.parent):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()

    def trim(self) -> None:
        """Delete the least recently used plans beyond LIMIT, and the work of calibrations long given up."""
        total = 0
        for stored in self.plans():
            total += stored.size
            if total > LIMIT:
                self.delete(stored)
        for work in self.folder.glob(f"*/*/{WORK}"):
            newest = max((path.stat().st_mtime for path in work.rglob("*")), default=0.0)
            if newest < time.time() - ABANDONED:
                shutil.rmtree(work, ignore_errors=True)

    def _plans(self) -> Iterator[Stored]:
        for path in self.folder.glob("*/*/budget-*.json"):
            plan = None
            with contextlib.suppress(PlanError):
                plan = Plan.load(path)
            with contextlib.suppress(FileNotFoundError):  # deleted by another process
                size = sum(file.stat().st_size for file in _files_of(path) if file.exists())
                yield Stored(path, plan, size, path.stat().st_mtime)

    @staticmethod
    def _set_aside(path: Path) -> None:
        for file in _files_of(path):
            with contextlib.suppress(OSError):
                file.replace(file.with_name(file.name + DAMAGED))


def _files_of(path: Path) -> tuple[Path, Path]:
    return path, path.with_suffix(".safetensors")
