"""The report: a self-contained page, and what it says of a chain."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

from conure import checkpoint, metrics
from conure.errors import InputError
from conure.metrics import Protocol

import pandas as pd
import pytest
import torch
from conftest import ROOT, STAGES, run_python
from test_scripts import refused

import pruning
from nextitnet import NextItNet
from tools.report import __main__ as report
from tools.report import chain as chains
from tools.report import history

VOID = {"meta", "img", "source", "wbr", "br"}
CPU = torch.device("cpu")
draws = pytest.mark.skipif(find_spec("matplotlib") is None, reason="the report draws with matplotlib")


class Page(HTMLParser):
    """Fails on a tag left open; `tables` by name, as rows of cells; `marked`: the texts of cells of class changed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text, self.css, self.marked = [], [], "", "", []
        self.tables: dict[str, list[list[str]]] = {}  # in the page's order
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))
        if dict(attributes).get("role") == "region":
            self.rows = self.tables.setdefault(dict(attributes)["aria-label"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "style":
            self.css += data
        elif self.open:
            self.text += data
        if self.open and self.open[-1][0] in ("td", "th"):
            self.rows[-1][-1] += data
            if self.open[-1][1].get("class") == "changed":
                self.marked.append(data)

    def column(self, table: str, name: str) -> list[str]:
        head, *rows = self.tables[table]
        return [row[head.index(name)] for row in rows]


def made(folder: Path, output: Path, **settings: object) -> Page:
    report.main(report.Hyperparameters(str(folder), str(output), device="cpu", **settings))
    return Page((output / "report.html").read_text(encoding="utf-8"))


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def written(chain, tmp_path_factory) -> tuple[Path, Path, str]:
    """The checkpoints of a finished chain, the folder of its report, and what the tool printed."""
    checkpoints, folder = chain[0] / "checkpoints", tmp_path_factory.mktemp("report")
    flags = ["--checkpoint_dir", str(checkpoints), "--output_dir", str(folder), "--device", "cpu"]
    return checkpoints, folder, run_python("-m", "tools.report", *flags)


def change(path: Path, how) -> None:
    """Rewrites a checkpoint after `how` has changed its model."""
    content, _ = checkpoint.load(str(path))
    model = checkpoint.build_model(content)
    with torch.no_grad():
        how(model)
    checkpoint.save(str(path), content | {"model": model.state_dict()})


def zero_owned_by(owner: int):
    def change_model(model: NextItNet) -> None:
        for layer in pruning.owned_weights(model):
            layer.weight[layer.owner == owner] = 0.0

    return change_model


def break_weights(model: NextItNet) -> None:
    """Breaks weights of task 1, which all tasks read: one channel's at the newest tap of the second convolution."""
    _, layer, *_ = pruning.owned_weights(model)
    layer.weight[4, -1][layer.owner[4, -1] == 1] = 1e4


@draws
def test_the_page_needs_no_other_file(written):
    _, folder, printed = written
    *wrote, last = printed.splitlines()
    assert last == f"next: open {folder / 'report.html'} in a browser"
    assert wrote == [f"wrote {folder / 'report.html'}"]
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    attributes = [item for _, attributes in page.tags for item in attributes.items()]
    given = [value for name, value in attributes if name in ("src", "srcset", "href")]
    assert len(given) == 4 * 2 + 4 and all(value.startswith("data:image/svg+xml;base64,") for value in given)
    assert not re.search(r"https?://|url\(|@import", text)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1 and headings.count(1) == 1 and set(headings) == {1, 2, 3}


@draws
def test_every_task_stands_after_every_stage_with_the_score_that_was_recorded(written):
    checkpoints, folder, _ = written
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    head, *rows = [[plain(cell) for cell in row] for row in page.tables["Scores by task and stage"]]
    assert head == ["task", *(f"{mode} {task}" for task, mode in STAGES)]
    results = pd.read_csv(checkpoints / "results.csv").query("split == 'test'").set_index(["task", "state"])
    for task in (1, 2, 3, 4):
        name = {1: "mrr@5_all", 4: "accuracy"}.get(task, "mrr@5")
        pruned, ret = (f"{results.loc[(task, mode), name]:.4f}" for mode in ("pruned", "ret"))
        expected = ["–" if at < task else pruned if (at, mode) == (task, "tp") else ret for at, mode in STAGES]
        assert rows[task - 1] == [f"task {task}, {name}", *expected]
    assert page.column("Averages by metric", "forgetting") == ["0", "0", "–"]
    assert page.marked == [] and "forgotten nothing: tasks 1 to 3 score exactly as when learned" in page.text
    assert "scored again from its data (0 of these scores)" in page.text


@draws
def test_scores_with_intervals_come_first(written):
    checkpoints, folder, _ = written
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert next(iter(page.tables)) == "Scores" and page.text.index("Look here first") < page.text.index("Every task")
    records = checkpoint.load(str(checkpoints / "ret_t4.pt"))[0]["tasks"]
    for (_, learned, interval, now, popular, examples, *_), record in zip(page.tables["Scores"][1:], records.values()):
        score, *_ = record["results"]["ret"]["test"].values()
        values, users = metrics.first_values(
            metrics.Ranks.from_tensors(record["ranks"]), Protocol(**record["protocol"])
        )
        low, high = metrics.interval([(values, users)])
        assert learned == now == f"{score:.4f}" == f"{values.mean():.4f}" and low <= score <= high
        assert popular == f"{record['popular']:.4f}"
        assert interval == f"[{low:.3f}, {high:.3f}]" and examples == str(record["results"]["ret"]["test"]["n"])


@draws
def test_every_table_that_scrolls_says_so(written):
    """Each table is in a .table of its own, whose ::after a browser shows only if the table overflows."""
    page = Page((written[1] / "report.html").read_text(encoding="utf-8"))
    classes = [attributes.get("class") for tag, attributes in page.tags if tag == "div"]
    assert classes.count("scroll") == len(page.tables) == classes.count("table")
    assert all(classes[at - 1] == "table" for at, name in enumerate(classes) if name == "scroll")
    assert re.search(r'\.table::after \{\s+content: "This table scrolls sideways →"', page.css)


@draws
def test_every_axis_has_a_unit(chain):
    from matplotlib.figure import Figure

    from tools.report import pictures

    checkpoints = str(chain[0] / "checkpoints")
    for each in history.histories(checkpoints):
        axes = Figure().subplots()
        pictures.draw_history(axes, each, pictures.LIGHT)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epochs of tp, then of ret", f"{each.name} (0 to 1)")
    figure = Figure()
    pictures.draw_ownership(figure, chains.read(checkpoints, "", CPU).layers, pictures.LIGHT)
    assert figure.axes[0].get_xlabel() == "% of the layer's weights"


@draws
def test_a_broken_weight_is_seen_and_counted(chain_copy, tmp_path, run_here):
    copy = chain_copy / "checkpoints"
    change(copy / "ret_t4.pt", break_weights)
    page = made(copy, tmp_path / "report")
    code, printed, _ = run_here("evaluate.py", "--checkpoint_dir", str(copy), "--device", "cpu")
    found = re.findall(r"RESULT .*?(?:mrr@5_all|mrr@5|accuracy)=(\S+) .* recorded", printed)
    scores = list(map(float, found))
    _, *rows = page.tables["Scores by task and stage"]
    learned = [float(row[2 * task]) for task, row in enumerate(rows, 1)]
    assert code == 1 and scores[0] < learned[0]
    for row in (1, 2, 3):  # each of them reads what task 1 owns
        *before, last = page.tables["Scores by task and stage"][row][2 * row :]
        assert set(before) == {f"{learned[row - 1]:.4f}"}
        assert last.split()[-1] == f"{scores[row - 1]:.4f}" and (last in page.marked) == (last[0] in "▼▲")
    assert page.tables["Scores by task and stage"][1][-1].startswith("▼")
    lost = [before - now for before, now in zip(learned[:3], scores[:3])]
    *forgetting, none = page.column("Averages by metric", "forgetting")
    assert none == "–" and lost[0] > 0
    assert list(map(float, forgetting)) == pytest.approx([lost[0], sum(lost[1:]) / 2], abs=1e-4)
    assert re.search(r"learned 4 tasks; tasks? 1\b.* no longer scores? as when learned; ", page.text)
    assert [row[3] for row in page.tables["Scores"][1:]] == [row[-1] for row in rows]


def test_only_what_a_task_reads_is_compared(chain, chain_copy):
    copy = chain_copy / "checkpoints"

    def source(harm) -> list[str]:
        change(copy / "ret_t4.pt", harm)
        after = chains.read(str(copy), "", CPU).cells
        shutil.copy(chain[0] / "checkpoints" / "ret_t4.pt", copy)
        return [after[task, (4, "ret")].source for task in (1, 2, 3)]

    def moved(model: NextItNet) -> None:  # one of task 2's, to the place behind it, which was free
        layer = next(pruning.owned_weights(model))
        owner, weight = layer.owner.view(-1), layer.weight.view(-1)
        place = ((owner[:-1] == 2) & (owner[1:] == 0)).nonzero()[0].item()
        weight[place + 1] = weight[place]
        owner[place : place + 2] = torch.tensor([0, 2])

    def normalised(model: NextItNet) -> None:
        model.blocks[0].ln1.bias[0] += 1

    def head(model: NextItNet) -> None:
        model.head(2).weight[0] += 1

    def update(model: NextItNet) -> None:
        model.updates["2"].rows[0, 0] += 1

    def readout(model: NextItNet) -> None:
        model.readouts["2"].scale *= 2

    assert source(lambda model: None) == ["same"] * 3
    assert source(zero_owned_by(pruning.FREE)) == ["same"] * 3
    assert source(zero_owned_by(4)) == ["same"] * 3
    assert source(zero_owned_by(3)) == ["same", "same", "scored"]
    assert source(moved) == ["same", "scored", "scored"]
    assert source(normalised) == ["scored"] * 3
    assert source(head) == ["same", "scored", "same"]
    assert source(update) == ["same", "scored", "scored"]
    assert source(readout) == ["same", "scored", "same"]


def test_transfer_against_numbers_by_hand():
    after = {1: {1: 0.5}, 2: {1: 0.6, 2: 0.3}, 3: {1: 0.4, 2: 0.3, 3: 0.9}, 4: {1: 0.2, 2: 0.4, 3: 0.9, 4: 0.7}}
    # Averages of 0.2, 0.4, 0.7; of 0.2 - 0.5 and 0.4 - 0.3; of 0.6 - 0.2 and 0.3 - 0.4.
    assert chains.transfer(after, [1, 2, 4]) == pytest.approx((1.3 / 3, -0.1, 0.15))
    assert chains.transfer(after, [3]) == pytest.approx((0.9, 0, 0))
    assert chains.transfer(after, [4]) == (0.7, None, None)
    assert chains.transfer({1: {1: 0.5}}, [1]) == (0.5, None, None)


def test_room_is_what_pruning_would_do(chain):
    content, _ = checkpoint.load(str(chain[0] / "checkpoints" / "ret_t4.pt"))
    model, ratios = checkpoint.build_model(content), [0.7, 0.6, 0.7, 0.7]
    rooms = chains.room(list(chains.layers_of(model)), ratios)
    assert len(rooms) > 9
    for room in rooms:
        ratios.append(0.7)
        pruning.prune(model, room.task, ratios)
        owners = torch.cat([layer.owner.flatten() for layer in pruning.owned_weights(model)])
        assert (room.kept, room.free) == ((owners == room.task).sum(), (owners == pruning.FREE).sum())
    with pytest.raises(ValueError, match="no free weights are left"):
        pruning.prune(model, room.task + 1, [*ratios, 0.7])
    assert chains.room([chains.Layer("one", {0: 100_000})], [0.999])[-1].task == pruning.MAX_TASKS


def test_a_history_is_the_way_of_the_state_that_was_kept(chain):
    first, *_, last = history.histories(str(chain[0] / "checkpoints"))
    results = pd.read_csv(chain[0] / "checkpoints" / "results.csv", float_precision="round_trip")
    results = results.query("task == 1 and split == 'validation'")
    tp, pruned, ret = (results[results["state"] == state]["mrr@5_all"].tolist() for state in ("tp", "pruned", "ret"))
    assert first.curves == {"tp": list(zip(range(11), tp)), "ret": list(zip(range(10, 16), ret))}
    assert first.kept["tp"] == (tp.index(max(tp)), max(tp)) and first.pruned == (10, *pruned)
    assert first.kept["ret"] == (10 + ret.index(max(ret)), max(ret)) and ret[0] == pruned[0]
    assert first.test.keys() == {"tp", "pruned", "ret"} and first.test["ret"][0] == first.kept["ret"][0]
    assert (first.name, last.name) == ("mrr@5_all", "accuracy")


def test_a_history_without_its_beginning(chain, tmp_path):
    results = pd.read_csv(chain[0] / "checkpoints" / "results.csv", dtype=str)
    results.query("task == '1' and state == 'ret'").to_csv(tmp_path / "results.csv", index=False)
    [only] = history.histories(str(tmp_path))
    assert only.curves.keys() == {"ret"} and only.curves["ret"][0][0] == 0 and only.pruned is None
    assert only.kept["ret"] == max(only.curves["ret"], key=lambda point: point[1])


@pytest.fixture
def begun(chain, tmp_path) -> Path:
    """The checkpoint folder of a chain after its first script."""
    folder = tmp_path / "begun"
    folder.mkdir()
    shutil.copy(chain[0] / "checkpoints" / "tp_t1.pt", folder)
    results = pd.read_csv(chain[0] / "checkpoints" / "results.csv", dtype=str)
    results.query("task == '1' and state != 'ret'").to_csv(folder / "results.csv", index=False)
    return folder


@draws
def test_what_no_report_wrote_is_replaced_only_if_asked(begun, tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "report.html").write_text("theirs")
    with pytest.raises(InputError, match=r"report\.html exists: --overwrite replaces it"):
        made(begun, folder)
    assert [path.read_text() for path in folder.iterdir()] == ["theirs"]
    made(begun, folder, overwrite=True)
    made(begun, folder)  # over its own


@draws
def test_an_unfinished_chain(begun, tmp_path):
    page = made(begun, tmp_path / "report")
    assert [plain(cell) for cell in page.tables["Scores by task and stage"][0]] == ["task", "tp 1"]
    assert "1 task; task 1 is not retrained yet; 70.0 %" in plain(page.text)
    assert page.column("Averages by metric", "forgetting") == ["–"]


@draws
def test_what_comes_from_files_is_escaped(begun, tmp_path):
    content, _ = checkpoint.load(str(begun / "tp_t1.pt"))
    record, evil = content["tasks"][1], '"><script src=x>&amp;'
    record["data_path"] = record["hyperparameters"]["tp"]["device"] = content["versions"]["torch"] = evil
    scores = record["results"]["pruned"]["test"]
    record["results"]["pruned"]["test"] = {evil: scores["mrr@5"]} | scores
    checkpoint.save(str(begun / "tp_t1.pt"), content)
    results = (begun / "results.csv").read_text()
    (begun / "results.csv").write_text(results.replace("mrr@5_all", "mrr@5<img src=x>$\\frac$", 1))
    page = made(begun, tmp_path / "report")
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) == 6  # file, hyperparameter, version; and the score's name, in each of three tables
    assert "Task 1, mrr@5<img src=x>$\\frac$ on test" in page.text


@draws
def test_what_is_missing_or_damaged_is_said_in_one_line(chain_copy, tmp_path, run_here):
    copy = chain_copy / "checkpoints"
    flags = ["--checkpoint_dir", str(copy), "--output_dir", str(tmp_path / "report"), "--device", "cpu"]
    change(copy / "ret_t4.pt", zero_owned_by(1))
    error = refused(run_here("tools.report", *flags, "--data_dir", "nowhere"))
    assert "the data of task 1, does not exist: name its folder with --data_dir" in error
    change(copy / "tp_t3.pt", zero_owned_by(1))
    assert "is stale, as tp_t3.pt has been replaced since" in refused(run_here("tools.report", *flags))
    (copy / "tp_t2.pt").write_bytes(b"x")
    assert "tp_t2.pt is damaged or cut short" in refused(run_here("tools.report", *flags))
    for path in copy.glob("*.pt"):
        path.unlink()
    first = f"holds no checkpoint: run `python conure_tp_t1.py --checkpoint_dir {copy}` first"
    assert first in refused(run_here("tools.report", *flags))
    for table in ("", "what,else\n1,2\n", "task,state,split,epoch,mrr@5\none,tp,test,1,0.5\n"):
        (copy / "results.csv").write_text(table)
        assert "is not the table that the scripts write" in refused(run_here("tools.report", *flags))
    (copy / "results.csv").unlink()
    assert "results.csv does not exist" in refused(run_here("tools.report", *flags))
    assert not (tmp_path / "report").exists()


def test_matplotlib_is_asked_for_by_name(chain, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('blocked')\n")
    command = [sys.executable, "-m", "tools.report", "--checkpoint_dir", str(chain[0] / "checkpoints")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command += ["--output_dir", str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2 and not (tmp_path / "report").exists()
    assert done.stderr == "error: the report draws with matplotlib: run .venv/bin/python -m pip install matplotlib\n"
    assert "WRITES report.html" in run_python(*command[1:], "--help", PYTHONPATH=str(tmp_path))


def test_models_that_are_no_chain_are_refused(chain, tmp_path):
    """Such as some methods of tools/baselines.py leave: a folder with a model for each task."""
    for name in ("ret_t1.pt", "ret_t2.pt"):
        content, _ = checkpoint.load(str(chain[0] / "checkpoints" / name))
        if name == "ret_t2.pt":
            del content["tasks"][1]
        checkpoint.save(str(tmp_path / name), content | {"lineage": {}})
    with pytest.raises(InputError, match="has not learned task 1: they are no chain"):
        chains.read(str(tmp_path), "", CPU)
