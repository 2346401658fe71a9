"""What ends a program: one line and an exit code, whatever has happened."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT

PROGRAM = "from ertacache.utils.errors import run_program\n\ndef main():\n    {}\n\nrun_program(main)"


def ended(body, **options):
    """A program with this body: its exit code, and what it says on stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "common")}
    options = {"env": environment, "stderr": subprocess.PIPE, "text": True, **options}
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(body)], **options)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise KeyboardInterrupt('go on')", 130, "interrupted; go on\n"),
        (
            "raise MemoryError('Unable to allocate 1 EiB')",
            2,
            "error: not enough memory (Unable to allocate 1 EiB): give",
        ),
        ("raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')", 2, "error: not enough memory (Default"),
        ("raise type('OutOfMemoryError', (RuntimeError,), {})('CUDA')", 2, "error: not enough memory (CUDA): give"),
        ("open('a' * 5000)", 2, "error: 'aaaaaaaaa"),
        (
            "raise PermissionError(13, 'Permission denied', '/x')",
            2,
            "error: '/x': Permission denied, give another path",
        ),
    ],
)
def test_what_is_wrong_is_one_line(body, code, said):
    found, line = ended(body)
    assert found == code and line.startswith(said) and line.count("\n") == 1 and len(line) < 300


@pytest.mark.parametrize("body", ["raise RuntimeError('a fault of ours')", "raise KeyError(1)", "open('gone')"])
def test_a_fault_of_ours_keeps_its_traceback(body):
    assert "Traceback" in ended(body)[1]


def test_a_reader_that_goes_ends_it_without_a_word():
    read, write = os.pipe()
    os.close(read)
    assert ended("print('x' * 100_000)", stdout=write) == (141, "")
    os.close(write)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
def test_an_output_that_is_full_is_one_line():
    with open("/dev/full", "w") as full:
        said = "error: cannot write the output (No space left on device)\n"
        assert ended("print('x')", stdout=full) == (2, said)
