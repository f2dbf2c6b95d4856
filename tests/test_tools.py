"""The tools: the comparisons and the capacity of a model, on the demo data with tiny models."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import log, sqrt
from pathlib import Path

from conure import checkpoint

import numpy as np
import pandas as pd
import pytest
from conftest import FILES, ROOT, run_python
from test_scripts import refused

import data_loader
import pruning
from tools import baselines
from tools.comparisons import counting

SMALL = ["--first_epochs", "3", "--epochs", "2", "--channels", "8", "--dilations", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def compared(demo, tmp_path_factory) -> tuple[list[str], pd.DataFrame, str]:
    """The flags of a finished comparison, its rows, and what it printed."""
    folder = tmp_path_factory.mktemp("baselines")
    flags = ["--data_dir", str(demo / "Data"), "--output_dir", str(folder), "--seeds", "2", *SMALL]
    printed = run_python("-m", "tools.baselines", *flags)
    return flags, pd.read_csv(folder / "baselines.csv"), printed


def test_every_method_is_compared_on_every_task(compared):
    _, table, printed = compared
    counts = table.groupby("method")["task"].agg(["count", "nunique"])
    assert set(counts.index) == {*baselines.METHODS, "popular", "counting"}
    assert (counts["count"] == 2 * counts["nunique"]).all(), "two seeds"
    assert counts["nunique"].to_dict() == dict.fromkeys(counts.index, 4) | {"no_task_2": 2}
    for method in counts.index:
        assert f"| {method} | " in printed


def test_only_what_protects_its_weights_remembers(compared):
    _, _, printed = compared
    rows = [line.strip("| ").split(" | ") for line in printed.split("After learning further tasks:")[1].splitlines()]
    kept = {(row[0], row[1]): len(set(filter(None, map(str.strip, row[2:])))) == 1 for row in rows if len(row) > 2}
    assert all(kept["Conure", task] for task in "1234")
    assert not all(kept["SinMoAll", task] for task in "123")


def test_a_benchmark_adds_rows_to_its_own_tables_alone(tmp_path, run_here):
    own, other = tmp_path / "own.csv", tmp_path / "task.csv"
    other.write_text("1,2,3,,4\n")
    measure = ["benchmarks.evaluate", "--rows", "10", "--items", "9", "--channels", "8", "--dilations", "1", "--output"]
    assert [run_here(*measure, str(path))[0] for path in (own, own, other)] == [0, 0, 2]
    assert len(pd.read_csv(own)) == 2 and other.read_text() == "1,2,3,,4\n"


def test_what_it_takes_to_serve_all_tasks(compared):
    _, table, _ = compared
    taken = table[table["seed"] == 10].groupby("method")["bytes_all_tasks"].max()
    trained = table[(table["seed"] == 10) & (table["task"] == 4)].set_index("method")["trained"]
    weights = 2 * 3 * 8 * 8  # of the only block
    assert taken["FineHead"] < taken["PeterRec"] < taken["FineAll"] < taken["SinMo"] + 1
    assert taken["Conure"] == taken["FineHead"] + weights  # a byte each for the owner map
    head = trained["FineHead"]
    assert head == 3 * 8 + 3 and trained["PeterRec"] == head + 2 * (2 * 8 * 2 + 2 + 8)
    assert head < trained["Conure"] < head + 0.35 * weights < trained["FineAll"], "0.7 ** 3 of the weights are free"


def test_a_second_run_trains_nothing_and_finds_the_same(compared, run_here):
    flags, _, printed = compared
    folder = Path(flags[3])
    assert "baselines.csv exists: --overwrite replaces it" in refused(run_here("tools.baselines", *flags))
    (folder / "baselines.csv").unlink()
    assert "baselines.md exists: --overwrite replaces it" in refused(run_here("tools.baselines", *flags))
    trained = {path: path.read_bytes() for path in folder.rglob("*.pt")}
    again = run_python("-m", "tools.baselines", *flags, "--overwrite")
    assert again[again.index("Test scores") :] == printed[printed.index("Test scores") :]
    assert trained == {path: path.read_bytes() for path in folder.rglob("*.pt")}
    assert (folder / "baselines.csv").exists()


def test_one_method_alone(demo, tmp_path):
    flags = ["--data_dir", str(demo / "Data"), "--output_dir", str(tmp_path), "--seeds", "1", *SMALL]
    run_python("-m", "tools.baselines", *flags, "--only", "FineHead")
    assert {path.parent.name for path in tmp_path.rglob("*.pt")} == {"SinMo", "FineHead"}
    assert set(pd.read_csv(tmp_path / "baselines_FineHead.csv")["method"]) == {"FineHead"}


@pytest.fixture
def tiny(tmp_path) -> tuple[data_loader.TaskData, data_loader.TaskData]:
    """Data of task 1 and of a later task, with padding, repeats and an unknown item."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "1.csv").write_text("0,0,a,b,c\na,b,c,a,b\n0,c,b,a,c\nb,a,c,a,b\n0,0,0,b,a\na,a,b,c,c\n")
    (folder / "2.csv").write_text("0,a,b,b,,x,y,z\na,b,c,new,,x\n0,0,c,a,,y,z,x\n0,0,0,b,,z\n0,c,b,c,,y,x\n")
    first = data_loader.load_sequences(str(folder / "1.csv"), data_loader.Split(0.4))
    return first, data_loader.load_examples(str(folder / "2.csv"), data_loader.Split(0.3), first.items)


def real_items(data: data_loader.TaskData, row: int) -> list[int]:
    return [item for item in data.rows[row].tolist() if item not in (0, data.padding_id)]


def training_examples(data: data_loader.TaskData) -> list[tuple[int, int]]:
    return [(int(data.users[example]), int(data.targets[example])) for example in data.splits["train"]]


def check_scores(scorer: counting.Scorer, data: data_loader.TaskData, score: Callable[[int, int], float]) -> None:
    """`score(row, target)` is what the scorer gives, for all rows and all targets but <UNK>."""
    targets = range(1, len(data.target_vocabulary))
    expected = [[score(row, target) for target in targets] for row in range(len(data.rows))]
    assert np.ptp(expected) > 0
    for row, scores in enumerate(expected):
        assert scorer(row)[1:] == pytest.approx(scores, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("places", [10, 2])
def test_a_markov_chain_counts_what_follows(tiny, monkeypatch, places):
    data, _ = tiny
    monkeypatch.setattr(counting, "PLACES", places)
    follows = np.zeros((len(data.items), len(data.items)))
    for row, target in training_examples(data):
        items = [*real_items(data, row), target]
        for j in range(len(items)):
            for i in range(max(0, j - places), j):
                follows[items[i], items[j]] += 1 / (j - i)

    def score(row: int, target: int) -> float:
        last = list(enumerate(reversed(real_items(data, row)), start=1))[:places]
        return sum(follows[i, target] / follows[i].sum() / k for k, i in last if follows[i].any())

    check_scores(counting.markov(data), data, score)


def test_a_cosine_leaves_out_the_examples_of_the_row(tiny):
    _, data = tiny
    train = training_examples(data)

    def count(item: int | None, target: int | None, but: int | None = None) -> int:
        return sum(
            item in (None, *real_items(data, row)) and target in (None, own) and row != but for row, own in train
        )

    def score(row: int, target: int) -> float:
        items = {item for item in real_items(data, row) if count(item, target)}
        return sum(count(i, target, row) / sqrt(count(i, None) * count(None, target)) for i in items)

    check_scores(counting.cosine(data), data, score)


def test_naive_bayes_smooths_what_it_counts(tiny):
    _, data = tiny
    train = training_examples(data)

    def score(row: int, target: int) -> float:
        seen = [item for other, own in train if own == target for item in set(real_items(data, other))]
        kinds = len(data.items) - 2  # neither <UNK> nor padding
        likelihoods = [(seen.count(item) + 1) / (len(seen) + kinds) for item in set(real_items(data, row))]
        return log(sum(own == target for _, own in train) + 1) + sum(map(log, likelihoods))

    check_scores(counting.naive_bayes(data), data, score)


def test_counting_ranks_each_target_by_the_scores_of_its_row(tiny, monkeypatch):
    _, data = tiny
    scores = {row: np.array([9.0, *np.roll([3.0, 2.0, 1.0], row)]) for row in range(len(data.rows))}
    examples = np.arange(len(data.targets))
    own = [scores[row][target] for row, target in zip(data.users, data.targets)]
    expected = [4 - int(score) for score in own]
    for at_once in (1 << 26, 8):
        monkeypatch.setattr(counting.metrics, "SCORES_AT_ONCE", at_once)
        assert counting.ranks(scores.__getitem__, data, examples).tolist() == expected


def test_data_too_large_for_counting_is_left_out(demo, tmp_path, run_here, monkeypatch):
    flags = ["--data_dir", str(demo / "Data"), "--output_dir", str(tmp_path), "--seeds", "1", "--only", "counting"]
    monkeypatch.setattr(counting, "MAX_PAIRS", 0)
    assert refused(run_here("tools.baselines", *flags)) == "error: every task was left out\n"
    first = data_loader.load_sequences(str(demo / "Data" / FILES[1]), data_loader.Split(0.2))
    monkeypatch.setattr(counting, "MAX_PAIRS", len(first.splits["train"]) * first.rows.shape[1] * 10 - 1)
    code, output, _ = run_here("tools.baselines", *flags)
    assert code == 0 and f"task 1 is left out: {first.path}: too large for `counting`" in output
    assert set(pd.read_csv(tmp_path / "baselines_counting.csv")["task"]) == {2, 3, 4}


@pytest.fixture
def endless(demo, tmp_path) -> Iterator[subprocess.Popen]:
    """A comparison that would go on for ever, once two seeds are being learned at a time."""
    flags = ["--data_dir", str(demo / "Data"), "--output_dir", str(tmp_path), "--only", "SinMo", *SMALL]
    command = [sys.executable, "-m", "tools.baselines", *flags, "--first_epochs", "100000"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # As in a terminal, where it is not ignored; a shell's background jobs, these tests among them, ignore it.
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=heeded, env=environment, **streams)
    while len(list(tmp_path.rglob("*.snapshot.pt"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    yield process
    process.kill()


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that learn a seed each."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True)
    return [int(number) for number in listed.stdout.split()]


def wait_for_the_end_of(numbers: list[int]) -> None:
    while any(Path(f"/proc/{number}").exists() for number in numbers):
        time.sleep(0.05)


def test_ctrl_c_leaves_a_run_unfinished(endless, tmp_path):
    numbers = workers(endless)
    for number in (endless.pid, *numbers):  # as a terminal does
        os.kill(number, signal.SIGINT)
    _, error = endless.communicate(timeout=120)
    assert endless.returncode == 130 and "resume from the last snapshot" in error and "Traceback" not in error
    wait_for_the_end_of(numbers)
    assert {path.name for path in tmp_path.rglob("*.pt")} == {"tp_t1.snapshot.pt"}


def test_a_seed_whose_process_is_killed_ends_the_others_with_one_line(endless):
    numbers = workers(endless)
    assert len(numbers) == 2
    os.kill(numbers[0], signal.SIGKILL)
    _, error = endless.communicate(timeout=120)
    assert endless.returncode == 2 and error.startswith("error: a seed's process was killed")
    wait_for_the_end_of(numbers)


def test_the_seeds_end_with_the_process_that_started_them(endless):
    numbers = workers(endless)
    endless.kill()
    wait_for_the_end_of(numbers)


def test_an_unknown_method_is_refused(run_here):
    error = refused(run_here("tools.baselines", "--only", "SASRec"))
    assert error.startswith("error: --only SASRec is none of Conure, no_retraining, ")


def test_capacity_learns_a_task_at_every_depth(demo, tmp_path, run_here):
    flags = ["--data_dir", str(demo / "Data"), "--output_dir", str(tmp_path), "--seeds", "1", *SMALL]
    run_python("-m", "tools.capacity", *flags, "--percents", "50,90", "--depths", "1,3")
    table = pd.read_csv(tmp_path / "capacity.csv")
    assert table[["prune_ratio", "task", "learned_before"]].to_numpy().tolist() == [
        [ratio, *place] for ratio in (0.5, 0.9) for place in ((1, 0), (3, 1), (3, 3))
    ]
    for percent, share in ((50, 0.5), (90, 0.9)):
        for path in (tmp_path / "seed_10" / f"ratio_{percent}").glob("*_t1.pt"):
            code, output, _ = run_here("evaluate.py", "--checkpoint", str(path), "--device", "cpu")
            assert code == 0 and "every task scores exactly as when it was learned" in output
        content, _ = checkpoint.load(str(tmp_path / "seed_10" / f"ratio_{percent}" / "ret_t3.pt"))
        free = pruning.shares(checkpoint.build_model(content))[pruning.FREE]
        assert free == pytest.approx(share**3, abs=0.02)
    assert "capacity.csv exists: --overwrite replaces it" in refused(run_here("tools.capacity", *flags))
