"""tools.baselines and tools.capacity, on the demo data with tiny models."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from conure import checkpoint

import pandas as pd
import pytest
import torch
from conftest import FILES, ROOT, run_python
from test_scripts import refused

import data_loader
import pruning
from nextitnet import NextItNet
from tools import baselines
from tools.comparisons import counting

SMALL = ["--first_epochs", "3", "--epochs", "2", "--channels", "8", "--dilations", "1", "--device", "cpu"]
SMALL += ["--first_ret_epochs", "3", "--ret_epochs", "2", "--class_epochs", "2", "--class_ret_epochs", "2"]


@pytest.fixture(scope="module")
def compared(demo, tmp_path_factory) -> tuple[list[str], pd.DataFrame, str]:
    """The flags of a finished comparison, its rows and its output."""
    folder = tmp_path_factory.mktemp("baselines")
    flags = ["--data_dir", str(demo / "Data"), "--output_dir", str(folder), "--seeds", "2", *SMALL]
    printed = run_python("-m", "tools.baselines", *flags)
    return flags, pd.read_csv(folder / "baselines.csv"), printed


def test_every_method_is_compared_on_every_task(compared):
    _, table, printed = compared
    counts = table.groupby("method")["task"].agg(["count", "nunique"])
    assert table["method"].unique().tolist() == ["popular", "counting", *baselines.METHODS]
    assert (counts["count"] == 2 * counts["nunique"]).all(), "two seeds"
    assert counts["nunique"].to_dict() == dict.fromkeys(counts.index, 4) | {"no_task_2": 2, "zero_shot": 2}
    for method in counts.index:
        assert f"| {method} | " in printed
    scores, *_, ratios = re.findall(r"^\| popular \| ([\d.]+) .*", printed, re.MULTILINE)
    ours = re.search(r"^\| Conure \| ([\d.]+) ", printed, re.MULTILINE)[1]
    assert float(ratios) == pytest.approx(float(ours) / float(scores), rel=0.01), "Conure over popular on task 1"


def test_conure_forgets_nothing_and_fine_tuning_forgets(compared):
    _, _, printed = compared
    rows = [line.strip("| ").split(" | ") for line in printed.split("After learning further tasks:")[1].splitlines()]
    kept = {(row[0], row[1]): len(set(filter(None, map(str.strip, row[2:])))) == 1 for row in rows if len(row) > 2}
    assert all(kept["Conure", task] for task in "1234")
    assert not all(kept["SinMoAll", task] for task in "123")
    assert {method for method, _ in kept} == {"method", "SinMoAll", "LwF", "replay", "Conure"}


def load(flags: list[str], *place: str) -> dict:
    """The content of a checkpoint, by its path in the folder of seed 10."""
    return checkpoint.load(str(Path(flags[3], "seed_10", *place)))[0]


@pytest.mark.parametrize("method", ["FineAll", "SASRec", "random_backbone", "FineHead", "PeterRec", "SinMoAll", "LwF"])
def test_the_better_initial_head_by_validation_counts(compared, method):
    flags, table, _ = compared
    chosen = table[(table["seed"] == 10) & (table["method"] == method)].set_index("task")
    one_model, before = method in baselines.FORGETTING, None
    for task in (2, 3, 4):
        contents = [load(flags, method, f"{head}_t{task}", f"tp_t{task}.pt") for head in ("informed", "random")]
        records = [content["tasks"][task] for content in contents]
        flag = [record["hyperparameters"]["tp"]["informed_head"] for record in records]
        assert flag == ["True", "False"], "what was trained"
        scores = [next(iter(record["results"]["tp"]["validation"].values())) for record in records]
        better = int(scores[1] > scores[0])
        assert chosen["seconds"][task] == pytest.approx(records[better]["seconds"])
        if not one_model:
            score = next(iter(records[better]["results"]["tp"]["test"].values()))
            assert chosen["score"][task] == pytest.approx(score)
        elif before:
            assert all(content["tasks"][task - 1]["fingerprint"] == before for content in contents)
        before = one_model and records[better]["fingerprint"]


def test_joint_training_uses_the_optimiser_settings_of_task_1(compared):
    flags, _, _ = compared
    first = load(flags, "SinMo", "tp_t1.pt")["tasks"][1]["hyperparameters"]["tp"]
    for task in (2, 3, 4):
        own = load(flags, "MTL", f"tp_t{task}.pt")["tasks"][task]["hyperparameters"]["tp"]
        assert [own[name] for name in ("table_rate", "dropout", "decay")] == ["10.0", "0.3", "True"]
        assert [first[name] for name in ("table_rate", "dropout", "decay")] == ["10.0", "0.3", "True"]


@pytest.mark.parametrize(
    "l2_sp, methods",
    [(0.005, ("SASRec", "PeterRec", "no_readout")), (0.001, ("FineAll", "FineHead", "frozen_embedding", "Conure"))],
)
def test_three_methods_hold_their_heads_harder_to_the_start(demo, tmp_path, monkeypatch, l2_sp, methods):
    hp, seen = baselines.Hyperparameters(data_dir=str(demo / "Data"), output_dir=str(tmp_path)), []
    comparison = baselines.Comparison(hp, seed=10)
    monkeypatch.setattr(comparison, "learn", lambda *given: seen.append(given[4].l2_sp))  # the loss
    steps = [step for method in methods for step in comparison.steps(method) if step.task == 3]
    for step in steps:
        comparison.run(step)
    assert seen == [l2_sp] * len(steps)


def test_a_random_backbone_is_never_trained(compared):
    flags, _, _ = compared
    places = [
        ["tp_t1.pt"],
        *([f"{head}_t{task}", f"tp_t{task}.pt"] for head in ("informed", "random") for task in (2, 3)),
    ]
    contents = [load(flags, "random_backbone", *place) for place in places]
    torch.manual_seed(10)
    untouched = NextItNet(**contents[0]["architecture"]).state_dict()
    for content in contents:
        backbone = {name for name in content["model"] if not name.startswith("heads.")}
        assert all(torch.equal(content["model"][name], untouched[name]) for name in backbone)
        assert not torch.equal(content["model"]["heads.1.weight"], untouched["heads.1.weight"])


def test_a_benchmark_adds_rows_only_to_tables_of_benchmarks(tmp_path, run_here):
    own, other = tmp_path / "own.csv", tmp_path / "task.csv"
    other.write_text("1,2,3,,4\n")
    measure = ["benchmarks.evaluate", "--rows", "10", "--items", "9", "--channels", "8", "--dilations", "1", "--output"]
    assert [run_here(*measure, str(path))[0] for path in (own, own, other)] == [0, 0, 2]
    assert len(pd.read_csv(own)) == 2 and other.read_text() == "1,2,3,,4\n"


def test_bytes_to_serve_and_trained_parameters(compared):
    _, table, _ = compared
    taken = table[table["seed"] == 10].groupby("method")["bytes_all_tasks"].max()
    trained = table[(table["seed"] == 10) & (table["task"] == 4)].set_index("method")["trained"]
    weights, low_rank = 2 * 3 * 8 * 8, (402 + 8) * 8  # of the only block; of a table of 402 tokens, with rank 8
    assert taken["FineHead"] < taken["PeterRec"] < taken["FineAll"] < taken["SinMo"] + 1
    assert taken["SinMoAll"] < taken["FineAll"] and taken["random_backbone"] < taken["FineAll"]
    # The owner map takes a byte per weight. FineHead keeps a head's bias if it helped, random_head has none.
    # Nor have its readouts scales other than 1, which count once.
    bare = taken["random_head"] - 6 * 4 * low_rank - 4
    assert bare <= taken["FineHead"] + weights <= taken["no_readout"] - 3 * 4 * low_rank
    assert taken["frozen_embedding"] + 3 * 4 * low_rank == taken["Conure"] == taken["frozen_head"]
    assert 0 < taken["Conure"] - 3 * 4 * low_rank - taken["no_readout"] <= 12, "the readouts' scales"
    head = 3 * 8  # of three classes, <UNK> among them; plus a bias each unless the head starts at random
    assert {trained["FineHead"], trained["PeterRec"] - 2 * (2 * 8 * 2 + 2 + 8)} <= {head, head + 3}
    unmoved = trained["frozen_embedding"] - low_rank
    assert head + 3 < unmoved < head + 0.35 * weights < trained["FineAll"], "0.7 ** 3 of the weights are free"
    assert trained["random_head"] + 3 == trained["frozen_head"] == trained["Conure"] == unmoved + 2 * low_rank
    assert trained["no_readout"] == unmoved + low_rank


def test_a_second_run_trains_nothing_and_prints_the_same(compared, run_here):
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


def test_some_methods_alone(demo, tmp_path):
    flags = ["--data_dir", str(demo / "Data"), "--output_dir", str(tmp_path), "--seeds", "1", *SMALL]
    few = run_python("-m", "tools.baselines", *flags, "--only", "popular", "--only", "zero_shot")
    assert set(pd.read_csv(tmp_path / "baselines_popular_zero_shot.csv")["method"]) == {"popular", "zero_shot"}
    assert "Conure" not in few
    printed = run_python("-m", "tools.baselines", *flags, "--only", "FineHead")
    output = tmp_path / "baselines_FineHead"
    assert printed.endswith(f"\nwrote {output}.csv\nwrote {output}.md\n")
    trained = {path.relative_to(tmp_path / "seed_10").parts[0] for path in tmp_path.rglob("*.pt")}
    assert trained == {"Conure", "SinMo", "FineHead"}, "zero_shot is task 1 of Conure"
    assert set(pd.read_csv(tmp_path / "baselines_FineHead.csv")["method"]) == {"FineHead"}


def test_replay_keeps_a_tenth_of_the_training_examples(demo, tmp_path):
    hp = baselines.Hyperparameters(data_dir=str(demo / "Data"), output_dir=str(tmp_path))
    for task in (1, 2):
        kept = [baselines.Comparison(hp, seed).memory(task, baselines.KEPT) for seed in (10, 10, 11)]
        train = kept[0].data.splits["train"]
        assert set(kept[0].examples) < set(train) and len(set(kept[0].examples)) == -(-len(train) // 10)
        assert kept[0].examples.tolist() == kept[1].examples.tolist() != kept[2].examples.tolist()


def test_data_too_large_for_counting_is_left_out(demo, tmp_path, run_here, monkeypatch):
    flags = ["--data_dir", str(demo / "Data"), "--output_dir", str(tmp_path), "--seeds", "1", "--only", "counting"]
    monkeypatch.setattr(counting, "MAX_PAIRS", 0)
    assert refused(run_here("tools.baselines", *flags)).startswith("error: every task was left out")
    first = data_loader.load_sequences(str(demo / "Data" / FILES[1]), data_loader.Split(0.2))
    monkeypatch.setattr(counting, "MAX_PAIRS", len(first.splits["train"]) * first.rows.shape[1] * 10 - 1)
    code, output, _ = run_here("tools.baselines", *flags)
    assert code == 0 and f"task 1 is left out: {first.path}: too large for `counting`" in output
    assert set(pd.read_csv(tmp_path / "baselines_counting.csv")["task"]) == {2, 3, 4}


@pytest.fixture
def endless(demo, tmp_path) -> Iterator[subprocess.Popen]:
    """A comparison that never ends, as soon as it trains two seeds in parallel."""
    flags = ["--data_dir", str(demo / "Data"), "--output_dir", str(tmp_path), "--only", "SinMo", *SMALL]
    command = [sys.executable, "-m", "tools.baselines", *flags, "--first_epochs", "100000"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # A shell's background jobs, these tests among them, ignore SIGINT; in a terminal it is not ignored.
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=heeded, env=environment, **streams)
    while len(list(tmp_path.rglob("*.snapshot.pt"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    yield process
    process.kill()


def workers(process: subprocess.Popen) -> list[int]:
    """The ids of the worker processes, one per seed."""
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


def test_tasks_without_a_file_are_left_out(demo, tmp_path, run_here):
    data = tmp_path / "Data"
    data.mkdir()
    flags = ["--data_dir", str(data), "--output_dir", str(tmp_path), "--seeds", "1", *SMALL]
    assert f"{FILES[1]} does not exist" in refused(run_here("tools.baselines", *flags, "--only", "no_retraining"))
    for task in (1, 2, 4):
        (data / FILES[task]).symlink_to(demo / "Data" / FILES[task])
    assert run_here("tools.baselines", *flags, "--only", "no_retraining")[0] == 0
    assert set(pd.read_csv(tmp_path / "baselines_no_retraining.csv")["task"]) == {1, 2}


def test_an_unknown_method_is_refused(run_here):
    error = refused(run_here("tools.baselines", "--only", "BERT4Rec"))
    assert error.startswith("error: --only BERT4Rec is no method: give one of popular, counting, SinMo, ")


def test_capacity_learns_a_task_at_every_depth(demo, tmp_path, run_here):
    flags = ["--data_dir", str(demo / "Data"), "--output_dir", str(tmp_path), "--seeds", "1", *SMALL]
    printed = run_python("-m", "tools.capacity", *flags, "--percents", "50,90", "--depths", "1,3")
    assert f"\nwrote {tmp_path}/capacity.csv\n" in printed
    assert (tmp_path / "capacity.png").exists() == (f"\nwrote {tmp_path}/capacity.png\n" in printed)
    table = pd.read_csv(tmp_path / "capacity.csv")
    assert table[["prune_ratio", "task", "learned_before"]].to_numpy().tolist() == [
        [ratio, *place] for ratio in (0.5, 0.9) for place in ((1, 0), (3, 1), (3, 1), (3, 3), (3, 3))
    ]
    assert [place for place, free in enumerate(table["free"]) if free == 0] == [2, 4, 7, 9], "the controls"
    for percent, share in ((50, 0.5), (90, 0.9)):
        for path in (tmp_path / "seed_10" / f"ratio_{percent}").glob("*_t1.pt"):
            code, output, _ = run_here("evaluate.py", "--checkpoint", str(path), "--device", "cpu")
            assert code == 0 and "every task scores exactly as when it was learned" in output
        content, _ = checkpoint.load(str(tmp_path / "seed_10" / f"ratio_{percent}" / "ret_t3.pt"))
        free = pruning.shares(checkpoint.build_model(content))[pruning.FREE]
        assert free == pytest.approx(share**3, abs=0.02)
        alone, _ = checkpoint.load(str(tmp_path / "seed_10" / f"ratio_{percent}" / "control_3" / "tp_t4.pt"))
        for name, owner in content["model"].items():
            if name.endswith(".owner"):
                weight = name.replace("owner", "weight")
                owned = torch.where(owner == pruning.FREE, 0.0, content["model"][weight])
                assert torch.equal(alone["model"][weight], owned)
        for table in ("updates.4", "readouts.4.table"):
            assert alone["model"][f"{table}.rows"].any(), "the control has all but conv weights"
    assert "capacity.csv exists: --overwrite replaces it" in refused(run_here("tools.capacity", *flags))
