"""What the tests of test_compose.py and test_compose_weights.py share."""

import contextlib
import warnings
from dataclasses import replace
from functools import cache

import torch
from test_enable import HALF, budget_plan
from test_rooms import CallCounter
from tiny_pipelines import flux

import ertacache
from ertacache import BudgetPlan
from ertacache.provenance import fingerprint


@cache
def flux_plan() -> BudgetPlan:
    """4 of 8 steps of the tiny FLUX; it knows its weights."""
    tiny = flux()
    return replace(budget_plan(tiny, HALF), provenance={"weights": fingerprint(tiny.pipe)})


@cache
def flux_planned() -> torch.Tensor:
    """The latents that the tiny FLUX makes with it."""
    tiny = flux()
    ertacache.enable(tiny.pipe, flux_plan())
    return tiny.run()


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def counted(tiny, **changes) -> tuple[torch.Tensor, int]:
    """The latents of a run, and how often it calls the transformer."""
    with CallCounter(tiny.pipe.transformer) as calls:
        return tiny.run(**changes), calls.count
