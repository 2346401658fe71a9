"""Whatever a plan's files hold: it is refused in one line, or makes a plan that can be shown and saved again."""

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from rich.console import Console
from safetensors.numpy import load_file, save

from conftest import ROOT
from ertacache import Plan, PlanError
from ertacache.cli.inspect import drawn
from ertacache.plans import plan as plan_module
from helpers import refused

SHIPPED = ("demo-30-budget-6", "demo-30-budget-10-exact", "demo-30-0.1-blocks")
CACHE = ROOT / "ERTACache4FLUX" / "cache"
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**63, 10**400, 1e308, 30, 29]))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(), st.sampled_from(["\x1b[2J", "\ud800", "<b>", "`"]))
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=6) | st.dictionaries(st.text(), v, max_size=4), max_leaves=8
)
SHAPES = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=40)
DTYPES = st.sampled_from([np.float64, np.float64, np.float32, np.int64, np.bool_])
ARRAYS = DTYPES.flatmap(lambda dtype: npst.arrays(dtype, SHAPES))
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def fields_and_arrays(name):
    return json.loads((CACHE / f"{name}.json").read_text("utf-8")), load_file(CACHE / f"{name}.safetensors")


def forged(folder, fields, arrays=None, tensors=None) -> Path:
    """Files with a valid checksum."""
    if tensors is None:
        tensors = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    fields = {name: value for name, value in fields.items() if name != "checksum"}
    fields["checksum"] = plan_module._checksum(json.loads(json.dumps(fields)), tensors)
    path = Path(folder) / "plan.json"
    path.write_text(json.dumps(fields), "utf-8")
    path.with_suffix(".safetensors").write_bytes(tensors)
    return path


def is_refused_or_whole(path):
    try:
        plan = Plan.load(path)
    except PlanError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 1100
        return
    out = io.StringIO()
    Console(file=out, width=80).print(drawn(plan, 80))
    assert all(line.isprintable() for line in out.getvalue().splitlines())
    plan.generate_model_card(repo_id="someone/plan")
    assert Plan.load(plan.save(path)) == plan or "nan" in str(plan.requirements)


@pytest.mark.parametrize("name", SHIPPED)
@given(data=st.data())
@FEW
def test_any_value_of_any_field(name, data):
    fields, arrays = fields_and_arrays(name)
    whole = data.draw(st.sampled_from([fields, fields["provenance"], fields["provenance"]["calibration"]]))
    key = data.draw(st.sampled_from(sorted(whole)))
    with tempfile.TemporaryDirectory() as folder:
        whole[key] = data.draw(VALUES)
        is_refused_or_whole(forged(folder, fields, arrays))


@pytest.mark.parametrize("name", SHIPPED)
@given(data=st.data())
@FEW
def test_any_array(name, data):
    fields, arrays = fields_and_arrays(name)
    with tempfile.TemporaryDirectory() as folder:
        arrays[data.draw(st.sampled_from(sorted(arrays)))] = data.draw(ARRAYS)
        is_refused_or_whole(forged(folder, fields, arrays))


def test_an_array_without_bytes_takes_no_memory(tmp_path):
    """3·10⁸ empty rows would be a list of gigabytes."""
    fields, arrays = fields_and_arrays("demo-30-budget-6")
    tensors = save({**arrays, "prediction_errors": np.zeros((3, 0))})
    size = int.from_bytes(tensors[:8], "little")
    header = tensors[8 : 8 + size].replace(b"[3,0]", b"[300000000,0]").rstrip()
    path = forged(tmp_path, fields, tensors=len(header).to_bytes(8, "little") + header + tensors[8 + size :])
    with refused(path, "prediction_errors", "float64", error=PlanError):
        Plan.load(path)


@pytest.mark.parametrize(("suffix", "size"), [(".json", 2**20), (".safetensors", 2**24)])
def test_large_files_are_not_read(tmp_path, suffix, size):
    path = Plan.load(CACHE / "demo-30-0.17.json").save(tmp_path / "plan.json")
    with open(path.with_suffix(suffix), "r+b") as file:
        file.truncate(2**33)  # sparse: takes no room on the disk
    with refused(path.with_suffix(suffix), f"{size // 2**20} MiB", error=PlanError):
        Plan.load(path)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_names_are_the_known_ones(tmp_path, change):
    fields, arrays = fields_and_arrays("demo-30-budget-6")
    for whole, name in ((fields, "settings"), (arrays, "scale")):
        kept = dict(whole)
        if change == "missing":
            del whole[name]
        else:
            whole["extra"] = whole[name]
        with refused(name if change == "missing" else "extra", error=PlanError):
            Plan.load(forged(tmp_path, fields, arrays))
        whole.clear()
        whole.update(kept)
