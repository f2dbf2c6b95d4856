"""The whole chain: the eight scripts, run one after another."""

import re
import shutil

from conure import checkpoint, training
from conure.errors import InputError
from conure.files import save_sealed
from conure.reporting import Results
from conure.vocabulary import read_index

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FILES, STAGES, flags, run_python
from test_scripts import refused

import data_loader
import pruning
from pruning import Stage


def load(folder, task, mode):
    return torch.load(folder / "checkpoints" / f"{mode}_t{task}.pt", weights_only=True)


def results_of(printed: str) -> list[dict[str, str]]:
    lines = [line.split()[1:] for line in printed.splitlines() if line.startswith("RESULT ")]
    return [dict(field.split("=") for field in line) for line in lines]


def test_owned_weights_never_change_and_owners_are_disjoint(chain):
    folder, _ = chain
    owned = {}  # (layer, task) → positions and values when the task was learned
    for task, mode in STAGES:
        state = load(folder, task, mode)["model"]
        layers = [name.removesuffix(".owner") for name in state if name.endswith(".owner")]
        assert len(layers) == 4
        for layer in layers:
            owner, weight = state[f"{layer}.owner"], state[f"{layer}.weight"]
            for earlier in range(1, task):
                mask, values = owned[layer, earlier]
                assert torch.equal(owner == earlier, mask)
                assert torch.equal(weight[mask], values)
            ratios = [0.7, 0.6, 0.7, 0.7][:task]
            assert (owner == task).sum() == pruning.keep_count(owner.numel(), ratios[:-1], ratios[-1])
            owned[layer, task] = owner == task, weight[owner == task]


def test_untrained_weights_never_change(chain):
    """Free weights keep their values through ret. Embedding and layer norms never change after tp of task 1, and what a
    task owns as a whole never after its ret."""
    folder, _ = chain
    first = load(folder, 1, "tp")["model"]
    own = {}  # of tasks 2, 3, 4: name → value after ret of the task
    for task, mode in STAGES:
        content = load(folder, task, mode)
        state = content["model"]
        for name, value in state.items():
            if "embedding" in name or ".ln" in name:
                assert torch.equal(value, first[name]), name
        for name, value in own.items():
            assert torch.equal(state[name], value), name
        if mode == "ret":
            prefixes = tuple(f"{group}.{task}." for group in ("heads", "updates", "readouts") if task > 1)
            own |= {name: state[name] for name in state if name.startswith(prefixes)}
            before = load(folder, task, "tp")["model"]
            for name in (name.removesuffix(".owner") for name in state if name.endswith(".owner")):
                free = state[f"{name}.owner"] == pruning.FREE
                assert torch.equal(state[f"{name}.weight"][free], before[f"{name}.weight"][free])
                same = torch.equal(state[f"{name}.weight"][~free], before[f"{name}.weight"][~free])
                assert same == (content["tasks"][task]["epoch"] == 0)
    assert len(own) >= 3 * (1 + 2 + 3) and all(value.any() for value in own.values())


def test_outputs_of_learned_tasks_are_bit_identical(chain):
    folder, _ = chain
    items = read_index(str(folder / "Data" / "index.csv"))
    data = data_loader.load_examples(str(folder / "Data" / FILES[2]), data_loader.Split(0.2), items)
    inputs = data.batch(data.splits["heldout"][:200]).inputs
    learned = {}
    for task, mode in STAGES:
        model = checkpoint.build_model(load(folder, task, mode))
        with torch.no_grad():
            for earlier in range(1, task):
                assert torch.equal(model.scores(inputs, Stage(earlier, "inference")), learned[earlier])
            learned[task] = model.scores(inputs, Stage(task, "inference"))


def test_evaluate_finds_nothing_forgotten(chain):
    folder, printed = chain
    output = run_python("evaluate.py", "--checkpoint_dir", str(folder / "checkpoints"), "--device", "cpu")
    *_, learned, conclusion, report, _ = output.splitlines()
    assert conclusion.startswith("nothing forgotten") and report.startswith(
        "report: python -m tools.report --checkpoint"
    )
    standings = re.findall(r"^test, (?:pruned|ret): (.*)$", "\n".join(printed[stage] for stage in STAGES), re.MULTILINE)
    expected = (f"task {task} {standing}" for task, standing in enumerate(standings[1::2], start=1))
    assert learned == f"learned, by test scores: {', '.join(expected)}"
    again = results_of(output.replace(" recorded ", "\nrecorded "))
    assert [row["task"] for row in again] == ["1", "2", "3", "4"]
    for row in again:
        learned = results_of(printed[int(row["task"]), "ret"])[-1]
        assert {**row, "seconds": ""} == {**learned, "seconds": ""}


def test_evaluate_on_other_splits_checkpoints_and_folders(chain, tmp_path, run_here):
    folder, _ = chain
    file = str(folder / "checkpoints" / "tp_t2.pt")
    code, output, _ = run_here("evaluate.py", "--checkpoint", file, "--split", "heldout")
    assert re.search(r"^learned, by heldout scores: .* ± 0\.\d+$", output, re.MULTILINE), "popularity is known of test"
    assert code == 0 and output.count("RESULT") == 2 and "task=2 state=pruned split=heldout" in output
    tasks = torch.load(file, weights_only=True)["tasks"]
    validation, test, heldout = (tasks[2]["results"]["pruned"][split] for split in ("validation", "test", "heldout"))
    assert heldout["n"] == validation["n"] + test["n"]
    mean = np.average([validation["mrr@5"], test["mrr@5"]], weights=[validation["n"], test["n"]])
    assert heldout["mrr@5"] == pytest.approx(mean)

    shutil.copytree(folder / "Data", tmp_path / "moved")
    code, output, _ = run_here("evaluate.py", "--checkpoint", file, "--data_dir", str(tmp_path / "moved"))
    assert code == 0 and output.count("same") == 2
    assert "--data_dir" in refused(run_here("evaluate.py", "--checkpoint", file, "--data_dir", str(tmp_path)))
    (tmp_path / "moved" / FILES[1]).write_text("1,2,3\n" * 10)
    error = refused(run_here("evaluate.py", "--checkpoint", file, "--data_dir", str(tmp_path / "moved")))
    assert "or has changed: name the folder" in error


def forget(content):
    """Changes a single weight of task 2 by one bit, which does not change a score."""
    weight, owner = (content["model"][f"blocks.0.conv1.{part}"] for part in ("weight", "owner"))
    place = tuple((owner == 2).nonzero()[0])
    weight[place] = torch.nextafter(weight[place], torch.tensor(9.0))


def differ(by):
    """Changes the recorded score of task 2, as another machine might."""

    def change(content):
        content["tasks"][2]["results"]["ret"]["test"]["mrr@5"] += by

    return change


@pytest.mark.parametrize(
    "change, code, verdict, conclusion",
    [
        (forget, 1, "DIFFERS: weights that the task reads have changed", "3 of 4 tasks differ from what was learned"),
        (differ(1e-9), 0, "bit-identical weights; the score differs by 1e-09", "nothing forgotten: the weights that"),
        (differ(0.1), 1, "DIFFERS by 0.1 with bit-identical weights", "1 of 4 tasks differ from what was learned"),
    ],
)
def test_evaluate_distinguishes_changed_weights_from_rounding(
    chain, tmp_path, run_here, change, code, verdict, conclusion
):
    content = load(chain[0], 4, "ret")
    change(content)
    checkpoint.save(str(tmp_path / "ret_t4.pt"), content)
    found, output, _ = run_here("evaluate.py", "--checkpoint_dir", str(tmp_path), "--device", "cpu")
    first, second, *_ = (line for line in output.splitlines() if line.startswith("RESULT"))
    assert found == code and first.endswith(" same") and verdict in second and conclusion in output


def test_evaluate_refuses_other_files_in_one_line(chain, tmp_path, run_here):
    content = load(chain[0], 1, "tp")
    path = str(tmp_path / "serving_t1.pt")
    save_sealed(path, {"format": 1, "task": 1, "conv": {}})
    assert f"{path} is another kind of file, no checkpoint" in refused(run_here("evaluate.py", "--checkpoint", path))
    path = str(tmp_path / "tp_t1.snapshot.pt")
    checkpoint.save(path, {"identity": content["identity"], "overwrite": False, "device": "cpu", "state": {}})
    assert f"{path} is a snapshot, no checkpoint" in refused(run_here("evaluate.py", "--checkpoint", path))


def test_a_copied_project_reads_its_own_data(chain, chain_copy, run_here):
    """If the data files were copied with the checkpoints, those are read; else the old ones, and a line says so."""
    where = ["--checkpoint", str(chain_copy / "checkpoints" / "ret_t1.pt")]
    code, output, _ = run_here("evaluate.py", *where)
    assert code == 0 and "was not copied" not in output
    data = chain_copy / "Data" / FILES[1]
    data.write_text("1,2,3\n" * 10)
    assert f"{data} is not the file that task 1 was learned from" in refused(run_here("evaluate.py", *where))
    data.unlink()
    code, output, _ = run_here("evaluate.py", *where)
    told = f"the data of task 1 was not copied with the checkpoint: reading {chain[0] / 'Data' / FILES[1]}\n"
    assert code == 0 and told in output


def test_the_best_state_by_validation_is_kept(chain):
    folder, _ = chain
    table = pd.read_csv(folder / "checkpoints" / "results.csv", float_precision="round_trip")
    best_was_not_last = 0
    for task, mode in STAGES:
        metric = {1: "mrr@5_all", 4: "accuracy"}.get(task, "mrr@5")
        rows = table[(table["task"] == task) & (table["state"] == mode)]
        candidates = rows[(rows["split"] == "validation") & ((rows["epoch"] > 0) | (mode == "ret"))]
        best = candidates.loc[candidates[metric].idxmax()]  # of equal ones the first
        record = load(folder, task, mode)["tasks"][task]
        assert record["epoch"] == best["epoch"]
        assert record["results"][mode]["validation"][metric] == best[metric]
        assert rows[rows["split"] == "test"]["epoch"].tolist() == [best["epoch"]]
        best_was_not_last += best["epoch"] < candidates["epoch"].max()
    assert best_was_not_last, "all best states were the last ones, so this test has seen nothing"


def test_a_stage_that_only_gets_worse_keeps_its_initial_weights(chain_copy, run_here):
    worse = ["--learning_rate", "100", "--epochs", "2", "--overwrite"]
    assert run_here("conure_ret_t4.py", *flags(chain_copy, 4), *worse)[0] == 0
    before, after = (load(chain_copy, 4, mode)["model"] for mode in ("tp", "ret"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_same_seed_gives_bit_identical_weights(demo, tmp_path):
    """The tensors are so large that torch uses several threads, whose order of summation could differ."""
    shape, folders = ["--channels", "64", "--dilations", "1"], (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        data = flags(demo, 1)[:2]
        run_python("conure_tp_t1.py", *flags(folder, 1), *data, *shape, "--epochs", "3", "--batch_size", "256")
    a, b = (load(folder, 1, "tp")["model"] for folder in folders)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_results_csv_holds_every_result_line(chain):
    folder, printed = chain
    table = pd.read_csv(folder / "checkpoints" / "results.csv")
    lines = [row for stage in STAGES for row in results_of(printed[stage])]
    assert len(table) == len(lines)
    for (_, row), line in zip(table.iterrows(), lines):
        for name, value in line.items():
            if name in ("state", "split"):
                assert row[name] == value
            else:
                assert row[name] == pytest.approx(float(value), abs=6e-2 if name == "seconds" else 1e-4)


@pytest.mark.parametrize("order", [(1, 4), (4, 1)])
def test_rows_of_results_csv_stay_in_their_columns(tmp_path, order):
    path, scores = str(tmp_path / "results.csv"), {1: {"mrr@5": 0.5, "hr@5": 0.75}, 4: {"accuracy": 0.25}}
    for task in order:
        results = Results(path, Stage(task, "tp"))
        results.add("tp", "test", 1.0, {**scores[task], "n": 8}, 2.0)
    table = pd.read_csv(path).set_index("task")
    assert (table[["n", "seconds"]] == [8, 2.0]).all(axis=None)
    for task in order:
        assert table.loc[task, ["mrr@5", "hr@5", "accuracy"]].dropna().to_dict() == scores[task]


HEADER = "task,state,split,epoch,n,seconds,mrr@5"


@pytest.mark.parametrize(
    "text, reason",
    [
        (
            "task,state,split,epoch,n,seconds,mrr@5\n1,tp,test,1,8,2,0.1\n4,tp,test,0.5\n",
            "line 3 has another number of fields than the header",
        ),
        (
            "task,state,split,epoch,n,seconds,mrr@5\n4,tp,test,0.5\n1,tp,test,0.5\n",
            "line 2 has another number of fields than the header",
        ),
        ("task,stage,split\n1,tp,test\n", "its column `stage` is called `state` now"),
        ("", "it has no column `state`"),
        ("task,state,split,mrr@5,n,seconds\n1,tp,test,0.5,8,2.0\n", "it has no column `epoch`"),
        ("task,state,split,epoch,n,seconds\n1,tp,test,1,8,2.0\n", "it has no column of scores"),
        ("\xff\xfe\n\0", ""),
    ],
)
def test_a_results_csv_of_another_layout_is_refused(tmp_path, text, reason):
    path = tmp_path / "results.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="move it away and run again") as error:
        Results(str(path), Stage(2, "tp"))
    assert reason in str(error.value) and path.read_text(encoding="latin-1") == text


def test_what_a_run_prints(chain):
    _, printed = chain
    output = printed[2, "tp"]
    for expected in (
        r"^settings: index_path=.*\n(.*\n)*.* prune_ratio=0\.6 ",
        r"^test, tp: mrr@5 0\.\d{3} ± 0\.\d{3} \(popularity 0\.\d{3}\)\n(.*\n)+test, pruned: mrr@5 ",
        r"^data: .*\n  1,500 rows of 21; 40\d item ids; \d+ target ids\n  [\d,]+ examples: [\d,]+ train, ",
        r"^parameters: [\d,]+, of which this stage trains [\d,]+$",
        r"^device: cpu, \d+ threads; (float32|bfloat16)\nversions: python 3\.\d+\.\d+, torch ",
        r"^  task 1 owns: 30\.0\d% of the conv weights\n  task 2 owns: 28\.0\d% .*\n  free: 41\.9\d% ",
        r"^saved .*tp_t2\.pt \(\d\.\d MB\)\nnext: python conure_ret_t2\.py --checkpoint_dir .* --index_path ",
    ):
        assert re.search(expected, output, re.MULTILINE), expected
    steps = [float(row["epoch"]) * 10 for row in results_of(printed[4, "tp"]) if row["state"] == "tp"][:-1]
    assert steps == pytest.approx([*range(0, 60, 5), 60]), "1,200 examples in batches of 128 are 10 steps an epoch"
    stages = [(row["state"], row["split"]) for row in results_of(output)]
    ends = [("tp", "test"), ("pruned", "validation"), ("pruned", "test")]
    assert stages == [("tp", "validation")] * 7 + ends
    assert "next: python evaluate.py" in printed[4, "ret"]


@pytest.mark.parametrize("task, factor, margin", [(1, 5, 0), (2, 2, 0), (3, 2, 0), (4, 1, 0.15)])
def test_a_task_beats_the_most_frequent_targets(chain, task, factor, margin):
    folder, printed = chain
    load_task = data_loader.load_sequences if task == 1 else data_loader.load_examples
    items = read_index(str(folder / "Data" / "index.csv"))
    data = load_task(str(folder / "Data" / FILES[task]), data_loader.Split(0.2), items)
    train, test = (data.targets[data.splits[split]] for split in ("train", "test"))
    k, metric = (1, "accuracy") if task == 4 else (5, "mrr@5")
    popular = np.argsort(-np.bincount(train), kind="stable")[:k]
    popularity = sum((test == item).mean() / place for place, item in enumerate(popular, start=1))
    record = load(folder, task, "ret")["tasks"][task]
    if task > 1:  # which counts the items at all positions
        assert record["popular"] == pytest.approx(popularity, abs=0.03), "but for what is left out, and for ties"
    learned = float(results_of(printed[task, "ret"])[-1][metric])
    assert learned > factor * popularity + margin, f"{learned:.4f} against {popularity:.4f}"


@pytest.mark.parametrize("recurring, told", [(1, "tied to the item embedding"), (60, "a table of its own")])
def test_the_head_of_task_1_is_tied_unless_items_recur(tmp_path, run_here, recurring, told):
    (tmp_path / "Data").mkdir()
    lines = [f"a{user},b,{'b' if user < recurring else 'c'}\n" for user in range(200)]
    (tmp_path / "Data" / FILES[1]).write_text("".join(lines))
    small = ["--epochs", "1", "--channels", "4", "--dilations", "1"]
    code, output, _ = run_here("conure_tp_t1.py", *flags(tmp_path, 1), *small)
    assert code == 0 and f"head of task 1: {told}\n" in output
    content = load(tmp_path, 1, "tp")
    embedding, head = (content["model"][name] for name in ("embedding.weight", "heads.1.weight"))
    assert torch.equal(embedding, head) == content["architecture"]["tied"] == (recurring == 1)
    assert ("ranks: among all but the row's items" if recurring == 1 else "ranks: among all\n") in output


@pytest.mark.parametrize("same_things", [True, False])
def test_a_head_starts_from_task_1s_only_if_it_ranks_better(chain_copy, same_things, run_here, monkeypatch):
    """All targets have tokens of items. They are the next items, or are permuted, so that tokens mean other things.

    In both stages a head that starts so is held to its start.
    """
    folder, held = chain_copy, []
    lines = [line.rsplit(",", 1) for line in (folder / "Data" / FILES[1]).read_text().splitlines()]
    tokens = sorted({target for _, target in lines})
    meant = dict(zip(tokens, tokens if same_things else np.random.default_rng(1).permutation(tokens)))
    (folder / "Data" / FILES[2]).write_text("".join(f"{row},,{meant[target]}\n" for row, target in lines))
    untrained = ["--epochs", "1", "--learning_rate", "1e-30", "--overwrite"]
    output = run_python("conure_tp_t2.py", *flags(folder, 2), *untrained)
    found, of_task_1 = f"({len(tokens)} of {len(tokens)} targets are items of task 1", "initialised from task 1's rows"
    start = of_task_1 if same_things else "random, bias from target frequencies"
    assert f"head: {start} {found}" in output
    model = load(folder, 2, "tp")["model"]
    items = read_index(str(folder / "Data" / "index.csv"))
    data = data_loader.load_examples(str(folder / "Data" / FILES[2]), data_loader.Split(0.2), items)
    ids = torch.from_numpy(items.look_up(data.target_vocabulary.tokens)).long()
    assert torch.equal(model["heads.2.weight"][1:], model["heads.1.weight"][ids][1:]) == same_things
    assert ("heads.2.bias" in model) != same_things
    assert (model["readouts.2.scale"] != 1) == same_things, "of the size that task 1's rows expect"
    if not same_things:
        frequency = np.bincount(data.targets[data.splits["train"]], minlength=len(ids)) + 1
        expected = torch.from_numpy(np.log(frequency) - np.log(frequency.mean())).float()
        torch.testing.assert_close(model["heads.2.bias"], expected)

    def see(run, loss):
        held.append(list(run.model.anchors))
        run.files.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Run, "train", see)
    for mode in ("tp", "ret"):
        assert run_here(f"conure_{mode}_t2.py", *flags(folder, 2), "--overwrite")[0] == 130
    assert held == ([[2], [2]] if same_things else [[], []])


def test_a_chain_without_free_weights_is_refused_before_training(demo, tmp_path, run_here):
    """A layer has 48 weights: task 1 keeps 46 of them, and task 2 the other two."""
    shutil.copytree(demo / "Data", tmp_path / "Data")
    for task, mode in STAGES[:4]:
        shape = ["--channels", "4", "--dilations", "1"] if (task, mode) == (1, "tp") else []
        ratio = ["--prune_ratio", "0.05"] if mode == "tp" else []
        arguments = [*flags(tmp_path, task), *shape, *ratio, "--epochs", "1"]
        code, output, error = run_here(f"conure_{mode}_t{task}.py", *arguments)
        assert code == 0, error
        expected = "capacity: 4 of 96 conv weights are free (4.17%); after pruning, task 2 keeps 4 of them"
        assert (expected in output) == ((task, mode) == (2, "tp"))
    code, output, error = run_here("conure_tp_t3.py", *flags(tmp_path, 3), "--epochs", "1")
    assert code == 2 and "RESULT" not in output
    assert error.startswith(
        "error: no free weights are left for task 3 in 2 of 2 conv layers: start again at task 1 in another "
        "--checkpoint_dir, with --prune_ratio 0.67 or more, or more --channels"
    )
