"""Several processes train and score as one process does."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, chain_settings, flags, run_python

# Runs a script as usual and writes the loss of every step: OUTPUT SCRIPT [--flag …].
LOSS_CURVE = """
import json, os, runpy, sys
from conure.reporting import Progress
_, output, *sys.argv = sys.argv
losses, advance = [], Progress.advance
Progress.advance = lambda progress, loss: [losses.append(loss.item()), advance(progress, loss)]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    json.dump(losses, open(output + os.environ.get("RANK", "0"), "w"))
"""

# Each process computes the gradients of both, and compares the exchanged sums with its own.
SUMS = """
import torch
from conure import processes
from torch import nn

def gradients(process):
    torch.manual_seed(process)
    rows, (first, second) = processes.TABLE // 64, [(1, None), (None, 1)][process]
    few = torch.zeros(rows, 64)
    few[[5, 70 + process, 900 * process]] = torch.randn(3, 64)
    tables = few, torch.randn(rows, 4, 16), torch.randn(processes.TABLE), first and 2 * few, second and 3 * few
    return *tables, torch.randn(3, 2), first and torch.randn(7), second and torch.tensor(1.0)

with processes.group("cpu"):
    of_both = [gradients(process) for process in (0, 1)]
    expected = [sum(each for each in pair if each is not None) for pair in zip(*of_both)]
    parameters = [nn.Parameter(torch.zeros_like(each)) for each in expected]
    for parameter, gradient in zip(parameters, of_both[processes.own_shard().number]):
        parameter.grad = gradient
    processes.sum_gradients(parameters)
    assert all(map(torch.equal, [parameter.grad for parameter in parameters], expected))
"""


def run(processes: int, *command: object) -> str:
    """Runs a Python program in `processes` processes of one thread each; it must succeed."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return run_python(*start, *map(str, command), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))


def results(printed: str) -> list[str]:
    """The RESULT lines without the seconds."""
    return [line.split(" seconds=")[0] for line in printed.splitlines() if line.startswith("RESULT")]


@pytest.mark.parametrize("task, mode", [(1, "tp"), (1, "ret"), (2, "tp"), (4, "ret")])
def test_two_processes_and_one_have_the_same_loss_curve(chain, tmp_path, task, mode):
    """The batch size is odd, so that the shards differ. Steps are few, because rounding errors grow with training.
    Dropout is off, because each process draws its own masks."""
    curves, printed, program = [], [], tmp_path / "loss_curve.py"
    program.write_text(LOSS_CURVE)
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        shutil.copytree(chain[0], folder)
        small = [*chain_settings(task, mode), "--epochs", "1", "--batch_size", "63", "--learning_rate", "1e-4"]
        small += ["--dropout", "0", "--precision", "float32"]
        command = [f"conure_{mode}_t{task}.py", *flags(folder, task), *small, "--overwrite"]
        printed.append(results(run(processes, program, folder / "losses", *command)))
        curves.append(json.loads((folder / "losses0").read_text()))
    assert len(curves[0]) == len(curves[1]) >= 19
    np.testing.assert_allclose(*curves, rtol=0, atol=1e-4)
    one, two = printed
    assert len(one) == len(two) and one[0] == two[0]  # the initial models score the same


def test_gradients_are_summed_over_processes(tmp_path):
    program = tmp_path / "sums.py"
    program.write_text(SUMS)
    run(2, program)


def test_only_the_table_rows_of_a_batch_are_exchanged():
    """Of two tables of 42 MB, a fifth of the rows of one and a few rows of the other are exchanged."""
    printed = run_python("-m", "benchmarks.several_processes", "--items", "41000", "--dilations", "1", "--steps", "1")
    given = {name: float(value) for name, value in re.findall(r"(\w+)_mb=(\S+)", printed)}
    assert given["whole"] > 84 and given["by_rows"] < 0.2 * given["whole"]


def test_a_last_batch_smaller_than_the_number_of_processes(chain_copy):
    small = [*chain_settings(1, "ret"), "--epochs", "1", "--batch_size", "109"]  # 11 * 109 + 1 = 1200 examples
    printed = run(2, "conure_ret_t1.py", *flags(chain_copy, 1), *small, "--overwrite")
    assert " 1,200 train" in printed and "saved" in printed


def test_two_processes_score_as_one(chain):
    folder = str(chain[0] / "checkpoints")
    alone, together = (run(processes, "evaluate.py", "--checkpoint_dir", folder) for processes in (1, 2))
    assert results(alone) == results(together) and len(results(alone)) == 4
    assert "nothing forgotten" in together


def test_two_processes_leave_a_finished_stage_alone(chain):
    printed = run(2, "conure_ret_t4.py", *flags(chain[0], 4), *chain_settings(4, "ret"))
    assert printed.count("is finished") == 1


@pytest.mark.parametrize(
    "left_over",
    [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "two"}, {"RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "1"}],
    ids=str,
)
def test_stray_environment_variables_start_no_process_group(chain, run_here, monkeypatch, left_over):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    code, output, error = run_here("conure_ret_t4.py", *flags(chain[0], 4), *chain_settings(4, "ret"))
    assert (code, output.count("is finished"), error) == (0, 1, "")
