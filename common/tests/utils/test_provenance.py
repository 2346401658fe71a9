"""What a number was measured with, on every system."""

import os

from ertacache.utils import provenance


def test_the_number_of_cores_is_known_on_systems_that_do_not_say_which_are_usable(monkeypatch):
    """macOS and Windows have no os.sched_getaffinity."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(provenance.torch.cuda, "is_available", lambda: False)
    assert provenance.machine().endswith(f" CPU, {os.cpu_count()} cores")
    assert provenance.machine() in provenance.measured_with()
