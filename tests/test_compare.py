"""tools.compare: two chains, paired."""

import re

from conure import checkpoint

import pytest
from conftest import chain_settings, flags
from test_scripts import refused


def test_two_folders_are_compared_example_by_example(chain, chain_copy, run_here):
    """Of two chains that differ in ret of task 4 alone; the interval is of the differences that users see."""
    other = ["--seed", "11", "--learning_rate", "1e-2", "--overwrite"]
    assert run_here("conure_ret_t4.py", *flags(chain_copy, 4), *chain_settings(4, "ret")[:4], *other)[0] == 0
    folders = [str(folder / "checkpoints") for folder in (chain[0], chain_copy)]
    code, output, _ = run_here("tools.compare", *folders)
    lines = [re.search(r"b - a (\S+) \[(\S+), (\S+)\], (.*) users: (.*)", line) for line in output.splitlines()]
    assert code == 0 and len(lines) == 4
    for line in lines[:3]:
        assert line.groups()[:3] == ("+0.0000",) * 3 and line[5] == "no difference that this test part shows"
    records = [checkpoint.load(f"{folder}/ret_t4.pt")[0]["tasks"][4] for folder in folders]
    scores = [record["results"]["ret"]["test"]["accuracy"] for record in records]
    difference, low, high = map(float, lines[3].groups()[:3])
    assert difference == pytest.approx(scores[1] - scores[0], abs=1e-4) and difference != 0
    assert low < difference < high and lines[3][4] == "150"
    assert low <= 0 <= high or ("better" in lines[3][5])
    code, output, _ = run_here("tools.compare", *folders[::-1])
    back = re.search(r"task 4.* b - a (\S+) ", output)
    assert float(back[1]) == -difference


def test_only_what_was_scored_alike_is_compared(chain, chain_copy, run_here):
    folders = [str(folder / "checkpoints") for folder in (chain[0], chain_copy)]
    redo = [*chain_settings(4, "ret"), "--top_k", "2", "--overwrite"]
    assert run_here("conure_ret_t4.py", *flags(chain_copy, 4), *redo)[0] == 0
    error = refused(run_here("tools.compare", *folders))
    assert error.startswith("error: task 4 has other protocols in the two folders ({'metric': 'accuracy', 'top_k': 1")
    error = refused(run_here("tools.compare", folders[0]))
    assert error == "error: the following arguments are required: B (--help lists the flags)\n"
