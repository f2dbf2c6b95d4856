"""tools.compare: paired differences of two chains."""

import os
import re

from conure import checkpoint

import pytest
from conftest import chain_settings, flags
from test_scripts import refused


def test_two_folders_are_compared_example_by_example(chain, chain_copy, run_here):
    """The copy differs in task 4 alone, of which it gets nothing right."""
    content, _ = checkpoint.load(str(chain_copy / "checkpoints" / "ret_t4.pt"))
    accuracy = content["tasks"][4]["results"]["ret"]["test"]["accuracy"]
    content["tasks"][4]["ranks"]["ranks"].fill_(2)
    checkpoint.save(str(chain_copy / "checkpoints" / "ret_t4.pt"), content)
    folders = [str(folder / "checkpoints") for folder in (chain[0], chain_copy)]
    for order, sign, verdict in ((folders, -1, "a is better"), (folders[::-1], 1, "b is better")):
        code, output, _ = run_here("tools.compare", *order)
        lines = [re.search(r"b - a (\S+) \[(\S+), (\S+)\], (.*) users: (.*)", line) for line in output.splitlines()]
        assert code == 0 and len(lines) == 4
        for line in lines[:3]:
            assert line.groups()[:3] == ("+0.0000",) * 3 and line[5] == "no difference that this test part shows"
        difference, low, high = map(float, lines[3].groups()[:3])
        assert difference == pytest.approx(sign * accuracy, abs=1e-4) and low < difference < high
        assert lines[3].groups()[3:] == ("150", verdict)


def test_chains_with_different_leave_out_are_compared_by_raw_ranks(chain, chain_copy, run_here):
    folders = [str(folder / "checkpoints") for folder in (chain[0], chain_copy)]
    for stage in ("ret_t2", "tp_t3", "ret_t3", "tp_t4", "ret_t4"):
        os.remove(f"{folders[1]}/{stage}.pt")
    redo = [*flags(chain_copy, 2), *chain_settings(2, "ret"), "--leave_out", "nothing"]
    assert run_here("conure_ret_t2.py", *redo)[0] == 0
    code, output, _ = run_here("tools.compare", *folders)
    records = [checkpoint.load(checkpoint.newest(folder))[0]["tasks"][2] for folder in folders]
    raw = [record["results"]["ret"]["test"]["mrr@5_raw"] for record in records]
    first, second = output.splitlines()
    assert code == 0 and first.startswith("task 1, mrr@5_all: ") and "b - a +0.0000 [" in first
    assert second.startswith(f"task 2, mrr@5_raw: a {raw[0]:.4f}, b {raw[1]:.4f}, ")


def test_tasks_with_different_metrics_are_not_compared(chain, chain_copy, run_here):
    folders = [str(folder / "checkpoints") for folder in (chain[0], chain_copy)]
    redo = [*chain_settings(4, "ret"), "--top_k", "2", "--overwrite"]
    assert run_here("conure_ret_t4.py", *flags(chain_copy, 4), *redo)[0] == 0
    error = refused(run_here("tools.compare", *folders))
    assert error.startswith("error: task 4: the two folders differ in values of top_k (1 and 2): ")
    error = refused(run_here("tools.compare", folders[0]))
    assert error == "error: the following arguments are required: B (--help lists the flags)\n"
