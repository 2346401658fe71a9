"""Result cache: values, arrays and running sums, by key and identity."""

import numpy as np
import pytest

from ertacache.utils.checkpoints import Checkpoints


def test_values_and_arrays_are_computed_once_per_key_and_identity(tmp_path):
    computed = []
    one, other = Checkpoints(tmp_path, "one"), Checkpoints(tmp_path, "other")
    for checkpoints in (one, one, other):
        assert checkpoints.value(["a", 1], lambda: computed.append("value") or {"x": [1.5, None]}) == {"x": [1.5, None]}
        arrays = checkpoints.arrays("b", lambda: computed.append("arrays") or {"y": np.arange(3)})
        assert np.array_equal(arrays["y"], [0, 1, 2])
    assert computed == ["value", "arrays", "value", "arrays"]


def test_sums_resume_after_the_last_stored_batch(tmp_path):
    checkpoints, batches = Checkpoints(tmp_path, "sums"), []

    def sums_of(batch):
        batches.append(batch)
        if batch == 2 and len(batches) == 3:
            raise KeyboardInterrupt
        return {"total": batch, "pair": [batch, 1]}

    with pytest.raises(KeyboardInterrupt):
        checkpoints.sums("pass", 4, sums_of)
    assert checkpoints.finished("pass") == 2 and checkpoints.finished("another") == 0
    sums = checkpoints.sums("pass", 4, sums_of)
    assert batches == [0, 1, 2, 2, 3] and checkpoints.finished("pass") == 4
    assert sums["total"] == 6 and sums["pair"].tolist() == [6, 4] and sums.keys() == {"total", "pair"}


def test_removal_leaves_other_identities(tmp_path):
    one, other = Checkpoints(tmp_path, "one", "work-", ".partial"), Checkpoints(tmp_path, "other")
    for checkpoints in (one, other):
        checkpoints.value("a", lambda: 1)
    assert one.folder.name.startswith("work-") and one.folder.suffix == ".partial"
    one.remove()
    assert list(tmp_path.iterdir()) == [other.folder]


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"sha256": "0", "value": 2}', b"\xff\0"])
def test_a_damaged_file_is_computed_anew(tmp_path, capsys, content):
    checkpoints, computed = Checkpoints(tmp_path, "damage"), []

    def compute(value):
        computed.append(value)
        return value

    pieces = {
        "value.json": lambda: checkpoints.value("value", lambda: compute([0.1, float("inf")])),
        "of this rank.json": lambda: checkpoints.of_this_rank("of this rank", lambda: compute(["image"])),
        "arrays.safetensors": lambda: [*checkpoints.arrays("arrays", lambda: compute({"y": np.eye(2)[:, 1]}))["y"]],
        "sums.safetensors": lambda: checkpoints.sums("sums", 1, lambda batch: compute({"y": [1, 2]}))["y"].tolist(),
    }
    for name, piece in pieces.items():
        first, (key, suffix) = piece(), name.split(".")
        path = checkpoints.path(key, f".{suffix}")
        path.write_bytes(content)
        assert piece() == piece() == first and len(computed) == 2
        assert capsys.readouterr().err == f"{path} is damaged: what it held is made anew\n"
        computed.clear()
