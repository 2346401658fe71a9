"""The contract of a model folder, held against everything that is passed for one."""

import inspect
from pathlib import Path
from types import FunctionType

import pytest

from conftest import FOLDERS, ROOT
from ertacache.calibration.paused_call import PausedCalls
from ertacache.demos.model_folder import Sampler, StepwiseSampler, load_model_folder
from toy import ToySampler

STEPWISE = {"prepare", "denoise", "velocity", "first_order"}
SAMPLER = STEPWISE | {"settings_of", "open_site", "decode", "load"}
SAMPLERS = {folder: lambda folder=folder: load_model_folder(ROOT / folder) for folder in FOLDERS} | {"toy": ToySampler}


def functions(protocol) -> dict[str, FunctionType]:
    return {n: f for n, f in inspect.getmembers(protocol, inspect.isfunction) if not n.startswith("_")}


def positional(function, skip=0) -> list[tuple]:
    """Names and defaults of the positional parameters, in their order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind in kinds]
    return [(p.name, p.default) for p in parameters][skip:]


def takes_settings(function) -> bool:
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    return bool(kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.KEYWORD_ONLY})


def check(sampler, protocol) -> None:
    for name, function in functions(protocol).items():
        ours, wanted = positional(getattr(sampler, name)), positional(function, skip=1)
        if name == "settings_of":  # its own parameters are the flags of the folder
            assert ours[:1] == wanted and all(default is not inspect.Parameter.empty for _, default in ours[1:])
            continue
        assert ours == wanted, name
        if name == "prepare":
            assert takes_settings(sampler.prepare)


def test_the_protocols_have_the_members_that_are_documented():
    assert set(functions(StepwiseSampler)) == STEPWISE and set(functions(Sampler)) == SAMPLER


@pytest.mark.parametrize("name", SAMPLERS)
def test_model_folders_and_the_toy_keep_the_contract(name):
    sampler = SAMPLERS[name]()
    check(sampler, Sampler)
    assert isinstance(sampler.FOLDER, Path) and "steps" in inspect.signature(sampler.settings_of).parameters


def test_a_paused_pipeline_call_is_a_stepwise_sampler():
    check(PausedCalls(None, {}), StepwiseSampler)
