"""Several processes: gloo on the CPU, sums and plans bit for bit those of one process, and no hanging."""

import json
import os
import runpy
import subprocess
import sys
import time

import psutil
import pytest
import torch

from conftest import ROOT
from ertacache import UserError
from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.threshold import ThresholdCalibration
from ertacache.utils import parallel
from ertacache.utils.checkpoints import Checkpoints
from ertacache.utils.errors import run_program
from helpers import processes, refused, toy_session
from toy import ToySampler

BATCHES = [1e16, -1e16, 1.0, 0.1, 0.2, 0.3, 3.0, 1.0]  # whose sum depends on the order, in each round of three


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many as the children have: matrix products round differently on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def session(folder, steps, batch_size, sampler=None):
    return toy_session(folder, 8, steps, sampler=sampler, batch_size=batch_size)


def threshold_plan(folder, sampler=None):
    return ThresholdCalibration(session(folder, 10, 3, sampler)).plan(0.3)


def budget_plan(folder, target="reference"):
    calibration = BudgetCalibration(session(folder, 6, 1), target)
    return calibration.plans([3])[3], calibration


# --- one process -------------------------------------------------------------------------------------------------


def test_one_process_is_main_and_talks_to_no_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # of something else: no launcher has given it a rank
    assert (parallel.rank(), parallel.size(), parallel.is_main()) == (0, 1, True)
    assert parallel.gather(7) == [7] and parallel.share(7) == 7 and parallel.mine(3) == [0, 1, 2]
    assert parallel.in_order("abc") == ["a", "b", "c"]
    parallel.barrier()
    assert not torch.distributed.is_initialized()

    def fail():
        raise UserError("2 is wrong: give 3")

    with refused("2 is wrong", "give 3"):
        parallel.run_on_all_ranks(fail)


@pytest.mark.slow
def test_importing_does_not_import_accelerate():
    code = "import sys, ertacache, ertacache.calibration.from_folder; assert 'accelerate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    assert parallel.device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parallel.device() == parallel.device("cuda") == "cuda" and parallel.device("cuda:1") == "cuda:1"
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    state = type("State", (), {"num_processes": 3, "local_process_index": 1})
    monkeypatch.setattr(parallel, "_state", lambda: state)
    assert parallel.device() == parallel.device("cuda") == "cuda:1" and current == [1, 1]
    assert parallel.device("cuda:0") == "cuda:0" and parallel.device("cpu") == "cpu"
    state.local_process_index = 2
    with refused("--num_processes 3", "2 GPUs"):
        parallel.device()


# --- three processes ---------------------------------------------------------------------------------------------


def sums_and_batches(folder, key, batches):
    """The sum of BATCHES, and which of them this process made for it."""
    calls = []

    def sums_of(batch):
        calls.append(batch)
        return {"sum": BATCHES[batch], "list": [batch, 1]}

    checkpoints = Checkpoints(folder, "sums")
    sums = checkpoints.sums(key, batches, sums_of)
    parallel.barrier()  # rank 0 has written the last batch
    return {**sums, "finished": checkpoints.finished(key)}, calls


def everything(folder):
    rank = parallel.rank()
    found = {"gather": parallel.gather({"rank": rank}), "mine": parallel.mine(7), "main": parallel.is_main()}
    found["in_order"] = parallel.in_order([f"batch {i}" for i in parallel.mine(7)])
    found["share"] = parallel.share(rank + 10)
    found["fresh"] = sums_and_batches(folder, "fresh", 5)
    found["resumed"] = sums_and_batches(folder, "begun by one", 8)
    found["threshold"] = threshold_plan(folder)
    for target in ("reference", "exact"):
        found[target], calibration = budget_plan(folder, target)
        found[f"{target} calls"] = calibration.session.pipe.transformer.calls
    found["shift"] = calibration.tuned_shift(4)
    parallel.barrier()
    calibration.finish()
    found["left"] = calibration.checkpoints.folder.exists()
    return found


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    sums_and_batches(folder, "begun by one", 4)
    codes, results, errors = processes(3, everything, folder)
    assert codes == [0, 0, 0], errors
    return folder, results


@pytest.mark.slow
def test_values_come_in_the_order_of_ranks_and_batches(three):
    _, results = three
    assert [r["mine"] for r in results] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [r["main"] for r in results] == [True, False, False]
    for found in results:
        assert found["gather"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert found["in_order"] == [f"batch {i}" for i in range(7)] and found["share"] == 10


@pytest.mark.slow
def test_sums_are_added_in_the_order_of_batches_whichever_process_resumes(three):
    folder, results = three
    assert sum(BATCHES) != sum(reversed(BATCHES))
    for key, count, calls in (("fresh", 5, [[0, 3], [1, 4], [2]]), ("resumed", 8, [[4, 7], [5], [6]])):
        assert [found[key][1] for found in results] == calls
        for total, _ in (found[key] for found in results):
            assert total["sum"] == sum(BATCHES[:count]) and total["finished"] == count
            assert total["list"].tolist() == [sum(range(count)), count]
    total, calls = sums_and_batches(folder, "fresh", 7)
    assert calls == [5, 6] and total["sum"] == sum(BATCHES[:7])


@pytest.mark.slow
def test_plans_are_those_of_one_process(three, tmp_path):
    _, results = three
    wanted = {"threshold": threshold_plan(tmp_path)}
    for target in ("reference", "exact"):
        wanted[target], calibration = budget_plan(tmp_path, target)
        calls = [found[f"{target} calls"] for found in results]
        if target == "reference":  # the exact target also settles its substeps, in main alone
            assert sum(calls) == calibration.session.pipe.transformer.calls and 8 * calls[2] == 2 * sum(calls)
    shift = calibration.tuned_shift(4)
    for found in results:
        assert {name: found[name] for name in wanted} == wanted
        assert found["shift"] == shift and not found["left"]


class Broken(ToySampler):
    """The second batch of prompts (seeds from 3) gives no finite number at step 4."""

    def denoise(self, pipe, inputs, plan=None, on_step=None):
        spoil = torch.equal(inputs.latents, self.prepare(pipe, [], [3, 4, 5], steps=10).latents)

        def watched(i, x, v):
            return on_step(i, x, v * torch.nan if spoil and i == 4 else v)

        return super().denoise(pipe, inputs, plan, watched)


def breaks_in_a_round(folder):
    run_program(lambda: parallel.run_on_all_ranks(lambda: threshold_plan(folder, Broken())))


def breaks_before_the_first(folder):
    def main():
        if parallel.rank() == 1:
            raise UserError("--device cuda:7: no such device")
        threshold_plan(folder)

    run_program(lambda: parallel.run_on_all_ranks(main))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "words"),
    [
        (breaks_in_a_round, ("step 4", "'p3'")),
        (breaks_before_the_first, ("--device cuda:7",)),
    ],
)
def test_an_error_in_one_process_ends_all(tmp_path, work, words):
    codes, results, (message, nothing) = processes(2, work, tmp_path)
    assert codes == [2, 2] and results == [None, None] and nothing == ""
    assert message.startswith("error: ") and message.count("\n") == 1 and all(word in message for word in words)


# --- scripts/calibrate.py, launched by accelerate ----------------------------------------------------------------

LAUNCHER = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]


def command(out):
    """scripts/calibrate.py on the FLUX demo with three prompts, one a batch."""
    out.mkdir(exist_ok=True)
    prompts = out.parent / "prompts.txt"
    prompts.write_text("".join(f"a small {c} star in the centre\n" for c in ("red", "blue", "green")))
    options = {"out": out, "calibration-prompts": prompts, "batch-size": 1, "steps": 6, "device": "cpu"}
    options |= {"thresholds": 0.3, "speedups": 2}
    words = [ROOT / "scripts/calibrate.py", ROOT / "ERTACache4FLUX", *(f"--{k}={v}" for k, v in options.items())]
    return [str(word) for word in words]


def calibrate(out):
    """By one process, this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command(out))
        runpy.run_path(sys.argv[0], run_name="__main__")
    return plans(out)


def launch(words):
    """By two processes, which are started and not waited for."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *LAUNCHER, *words], env=environment, **pipes)


def plans(folder):
    """The files of the plans without the day they were made, by name."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in found:
        if name.endswith(".json"):
            lines = found[name].decode().splitlines()
            found[name] = [line for line in lines if '"date"' not in line and '"checksum"' not in line]
            assert len(lines) == len(found[name]) + 2
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory, one_thread):
    return calibrate(tmp_path_factory.mktemp("alone") / "plans")


@pytest.mark.slow
def test_two_processes_write_the_plans_of_one(alone, tmp_path):
    output, errors = (launched := launch(command(tmp_path / "plans"))).communicate(timeout=200)
    assert launched.returncode == 0, errors
    names = {"demo-6-0.3.json", "demo-6-0.3.safetensors", "demo-6-budget-3.json", "demo-6-budget-3.safetensors"}
    assert alone.keys() == names and plans(tmp_path / "plans") == alone
    lines = output.splitlines()
    assert len(lines) == 2 and lines[0].startswith("lambda=0.3: ") and lines[1].startswith("2x: 3 of 6 calls")


@pytest.mark.slow
def test_one_process_resumes_where_two_were_killed(alone, tmp_path):
    launched = launch(command(out := tmp_path / "plans"))
    while launched.poll() is None and not list(out.glob("*.partial/" + "[0-9a-f]" * 32 + ".safetensors")):
        time.sleep(0.005)
    workers = psutil.Process(launched.pid).children()
    workers = [process for process in workers if any("calibrate.py" in word for word in process.cmdline())]
    assert len(workers) == 2
    workers[1].kill()
    launched.communicate(timeout=60)
    assert launched.returncode != 0 and not any(process.is_running() for process in workers)
    assert len(list(out.glob("*.partial"))) == 1 and not list(out.glob("*.json"))
    assert calibrate(out) == alone


# --- scripts/evaluate.py -----------------------------------------------------------------------------------------


def evaluation(out):
    """scripts/evaluate.py on the FLUX demo with three prompts, one a batch; its plan is calibrated first."""
    options = {"methods": "fewer-steps,budget", "speedups": 2, "count": 3, "batch-size": 1, "steps": 6}
    options |= {"calibration-prompts": out.parent / "prompts.txt", "latency-repeats": 0, "device": "cpu"}
    options |= {"work": out / "work", "plans": out / "plans", "json": out / "rows.json"}
    flags = ["--no-exact", *(f"--{k}={v}" for k, v in options.items())]
    words = [ROOT / "scripts/evaluate.py", ROOT / "ERTACache4FLUX", *flags]
    return [str(word) for word in words]


@pytest.mark.slow
def test_two_processes_print_the_table_of_one(tmp_path):
    command(tmp_path / "plans")  # writes the prompts
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    alone = [sys.executable, *evaluation(tmp_path / "alone")]
    one = subprocess.run(alone, env=environment, capture_output=True, text=True, timeout=200)
    output, errors = (launched := launch(evaluation(tmp_path / "both"))).communicate(timeout=200)
    assert one.returncode == 0 and launched.returncode == 0, one.stderr + errors
    rows, again = (json.loads((tmp_path / name / "rows.json").read_text()) for name in ("alone", "both"))
    assert rows == again and [row["method"] for row in rows] == ["none", "fewer-steps", "budget"]
    assert output == one.stdout and rows[2]["psnr"] > rows[1]["psnr"]
