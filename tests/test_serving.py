"""Export, represent and recommend: a served task is bit-identical to the task in the checkpoint."""

import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

from conure import checkpoint, files, line_reader
from conure.vocabulary import Vocabulary, read_index

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FILES
from test_scripts import refused

import data_loader
from nextitnet import NextItNet
from pruning import Stage
from tools.export import program_of
from tools.serving import format


@pytest.fixture
def tool(run_here):
    """Runs a tool, which must succeed, and returns its output."""

    def run(name: str, *arguments) -> str:
        code, output, error = run_here(f"tools.{name}", *map(str, arguments))
        assert code == 0, error
        return output

    return run


@pytest.fixture
def serving(chain, tool, tmp_path):
    """Exports a task from the checkpoint of a stage; returns the path of the serving file."""

    def make(task: int, source: str = "ret_t4.pt", *more: str) -> Path:
        path = tmp_path / f"{source}_{task}{''.join(more)}"
        tool("export", "--task", task, "--checkpoint", chain[0] / "checkpoints" / source, "--output", path, *more)
        return path

    return make


def model_of(chain, name="ret_t4.pt"):
    return checkpoint.build_model(checkpoint.load(str(chain[0] / "checkpoints" / name))[0])


def inputs_of(chain, task) -> torch.Tensor:
    """The rows of a task's file as ids, with the separator where the task has one."""
    items = read_index(str(chain[0] / "Data" / "index.csv"))
    rows = data_loader.encode(str(chain[0] / "Data" / FILES[task]), task > 1, items).rows
    return torch.from_numpy(rows).long()


@pytest.mark.parametrize("task", [1, 2, 4])
def test_representations_are_bit_identical_after_later_tasks(chain, serving, tool, tmp_path, task):
    served, output, data = serving(task), tmp_path / "users.npy", chain[0] / "Data" / FILES[task]
    assert served.read_bytes() == serving(task, f"ret_t{task}.pt").read_bytes()
    tool("represent", "--task", task, "--serving", served, "--data_path", data, "--output", output)
    users, inputs = np.load(output), inputs_of(chain, task)
    assert users.dtype == np.float32 and users.shape == (len(inputs), 32)
    with torch.no_grad():
        expected = model_of(chain).user_representation(inputs[:256], Stage(task, "inference"))
        last = model_of(chain).user_representation(inputs[-256:], Stage(task, "inference"))
    assert np.array_equal(users[:256], expected.numpy())
    np.testing.assert_allclose(users[-256:], last.numpy(), atol=1e-6)


def test_a_serving_file_has_nothing_of_other_tasks(chain, serving):
    path = serving(2)
    content, _ = files.load_sealed(str(path))
    model, owned = model_of(chain), 0
    tables = {f"{table}.{part}" for table in ("updates.2", "readouts.2.table") for part in ("rows", "axes")}
    own = {"heads.2.weight", "heads.2.bias", "readouts.2.scale"} | tables
    assert {name for name in content["weights"] if name.startswith(("heads", "updates", "readouts"))} == own
    for name, layer in content["conv"].items():
        owner = model.get_submodule(name).owner
        owned += int(((owner == 1) | (owner == 2)).sum())
        assert len(layer["weights"]) == int(((owner == 1) | (owner == 2)).sum())
        assert layer["readable"].nbytes == -(-owner.numel() // 8)
    assert 0 < owned < 0.6 * sum(module.owner.numel() for module in model.modules() if hasattr(module, "owner"))
    whole = (chain[0] / "checkpoints" / "ret_t4.pt").stat().st_size
    assert serving(2, "ret_t4.pt", "--dtype", "float16").stat().st_size < path.stat().st_size < 0.7 * whole


def test_weights_in_16_bits_change_the_representations_little(chain, serving, tool, tmp_path):
    data = chain[0] / "Data" / FILES[2]
    users = {}
    for dtype in ("float32", "float16", "bfloat16"):
        served, output = serving(2, "ret_t4.pt", "--dtype", dtype), tmp_path / f"{dtype}.npy"
        tool("represent", "--task", 2, "--serving", served, "--data_path", data, "--output", output)
        users[dtype] = np.load(output)
    spread = users["float32"].std()
    assert 0 < np.abs(users["float16"] - users["float32"]).max() < 0.02 * spread
    assert 0 < np.abs(users["bfloat16"] - users["float32"]).max() < 0.2 * spread


def test_csv_and_parquet_hold_users_and_the_values_of_npy(chain, serving, tool, tmp_path):
    pytest.importorskip("pyarrow")
    served, data = serving(3), chain[0] / "Data" / FILES[3]
    count = len(data.read_text().splitlines())
    (tmp_path / "ids").write_text("".join(f"user {number}\n" for number in range(count)))
    for name in ("u.npy", "u.csv", "u.parquet"):
        arguments = ("--task", 3, "--serving", served, "--data_path", data, "--output", tmp_path / name)
        tool("represent", *arguments, "--ids", tmp_path / "ids")
    for table in (pd.read_csv(tmp_path / "u.csv"), pd.read_parquet(tmp_path / "u.parquet")):
        assert table["user"].tolist() == [f"user {number}" for number in range(count)]
        assert np.array_equal(table.iloc[:, 1:].to_numpy(np.float32), np.load(tmp_path / "u.npy"))


def test_rows_of_any_form_are_read_as_in_training(chain, serving, tool, tmp_path, monkeypatch):
    """Shorter rows are padded on the left, longer ones lose their oldest items, and targets after `,,` are ignored."""
    served = serving(2)
    row = (chain[0] / "Data" / FILES[1]).read_text().splitlines()[0]
    short = "1,2,3"
    forms = {
        "sequences": [row, short, "never seen,2,3", f"9,9,{row}"],
        "examples": [f"{row},,clicks0_1", f"{','.join(['0'] * 17)},{short},,x,y", "not seen,2,3,,7", f"8,{row},,1"],
    }
    monkeypatch.setattr(line_reader, "CHUNK_BYTES", 16)  # so that each row is a chunk
    users = []
    for name, lines in forms.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        arguments = ("--task", 2, "--serving", served, "--data_path", tmp_path / name)
        output = tool("represent", *arguments, "--output", tmp_path / "u.npy", "--overwrite")
        assert "4 rows; read as <UNK>: 1 items that task 1 never saw; 1 rows longer than 20" in output
        users.append(np.load(tmp_path / "u.npy"))
    assert np.array_equal(*users)
    assert np.array_equal(users[0][0], users[0][3]) and not np.array_equal(users[0][1], users[0][2])


def test_memory_does_not_grow_with_the_rows(chain, serving, tool, tmp_path, monkeypatch):
    served, lines = serving(2), (chain[0] / "Data" / FILES[1]).read_text()
    monkeypatch.setattr(line_reader, "CHUNK_BYTES", 1 << 16)
    peaks = []
    for copies in (1, 2, 20):  # the first run also counts what is loaded once per process
        (tmp_path / "rows").write_text(lines * copies)
        arguments = ("--task", 2, "--serving", served, "--data_path", tmp_path / "rows")
        tracemalloc.start()
        tool("represent", *arguments, "--output", tmp_path / "u.csv", "--overwrite")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len((tmp_path / "u.csv").read_text().splitlines()) == 1 + 30_000
    assert peaks[2] < peaks[1] + 1_000_000, "30,000 rows of 20 ids are 4.8 MB, their representations 3.8 MB"


@pytest.mark.parametrize("task, k", [(1, 7), (2, 10), (4, 10)])
def test_recommendations_are_the_top_k_scores_as_tokens(chain, serving, tool, task, k):
    data = chain[0] / "Data" / FILES[task]
    output = tool("recommend", "--task", task, "--serving", serving(task), "--data_path", data, "--top_k", k)
    table = pd.read_csv(pd.io.common.StringIO(output), dtype={"target": str})
    record = checkpoint.load(str(chain[0] / "checkpoints" / "ret_t4.pt"))[0]["tasks"][task]
    tokens = Vocabulary.from_tensor(record["targets"]).tokens
    with torch.no_grad():
        scores = model_of(chain).scores(inputs_of(chain, task), Stage(task, "inference")).numpy()
    for never in ("<UNK>", "0"):
        if never in tokens:
            scores[:, tokens.index(never)] = -np.inf
    k = min(k, int((scores[0] > -np.inf).sum()))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert table["user"].tolist() == np.repeat(np.arange(1, len(scores) + 1), k).tolist()
    assert table["rank"].tolist() == list(range(1, k + 1)) * len(scores)
    np.testing.assert_allclose(table["score"], np.take_along_axis(scores, best, 1).ravel(), atol=1e-5)
    assert np.mean(table["target"] == np.array(tokens)[best].ravel()) > 0.99, "but for ties to the last bits"


@pytest.mark.parametrize("tied", [True, False])
def test_task_1_is_served_with_its_tied_or_untied_head(chain, tied):
    content = checkpoint.load(str(chain[0] / "checkpoints" / "ret_t4.pt"))[0]
    weight = content["model"]["heads.1.weight"]
    content["architecture"]["tied"] = tied
    if not tied:
        content["model"]["heads.1.weight"] = weight + 1
    served = format.extract(content, 1, torch.float32)
    model = format.build_model(served)
    assert torch.equal(model.head(1).weight, content["model"]["heads.1.weight"])
    assert (model.head(1).weight is model.embedding.weight) == tied == ("heads.1.weight" not in served["weights"])
    assert served["leave_out"] == content["tasks"][1]["protocol"]["leave_out"] == "nothing"


def test_whole_histories_are_served_with_their_users(serving, tool, run_here, tmp_path):
    """The two commands that `tools.recommend --help` names, on a table of the demo's items."""
    rows = "".join(f"u{user},{item},{item}\n" for user in range(1, 4) for item in range(user, 3 * user))
    (tmp_path / "rows.csv").write_text(f"user_id,item_id,timestamp\n{rows}")
    whole = ["--history", "1", "--min_rows", "1", "--output_dir", str(tmp_path / "whole")]
    code, printed, _ = run_here("Data.from_interactions", "--interactions", str(tmp_path / "rows.csv"), *whole)
    assert code == 0
    data = ["--data_path", tmp_path / "whole" / FILES[1], "--ids", tmp_path / "whole" / "users.csv"]
    assert f"python -m tools.recommend --task 1 {' '.join(map(str, data))}\n" in printed
    output = tool("recommend", "--task", 2, "--serving", serving(2), *data, "--top_k", 2)
    users = pd.read_csv(pd.io.common.StringIO(output))["user"].tolist()
    assert users == ["u1", "u1", "u2", "u2", "u3", "u3"]


def test_exclude_seen_leaves_out_items_of_the_row(chain, serving, tool):
    data = chain[0] / "Data" / FILES[1]
    rows = [set(line.split(",")) for line in data.read_text().splitlines()]
    arguments = ("--task", 1, "--serving", serving(1), "--data_path", data, "--top_k", 5)
    seen = []
    for exclude in ("no", "auto", "yes"):
        output = tool("recommend", *arguments, "--exclude_seen", exclude)
        table = pd.read_csv(pd.io.common.StringIO(output), dtype={"target": str})
        assert len(table) == 5 * len(rows)
        seen.append(sum(target in rows[user - 1] for user, target in zip(table["user"], table["target"])))
    assert seen[0] == seen[1] > 0 == seen[2], "items recur in these rows, so task 1's ranks did not leave them out"


@pytest.mark.parametrize("task", [1, 3])
def test_a_program_runs_without_the_suite(chain, tool, tmp_path, task):
    newest = chain[0] / "checkpoints" / "ret_t4.pt"
    outputs = ("--output", tmp_path / "x", "--program", tmp_path / "task.pt2")
    tool("export", "--task", task, "--checkpoint", newest, *outputs)
    inputs = inputs_of(chain, task)[:300]
    torch.save(inputs[:, :-1] if task > 1 else inputs, tmp_path / "ids.pt")
    alone = """
import torch
files = {"items.txt": "", "targets.txt": ""}
program = torch.export.load("task.pt2", extra_files=files).module()
for count in (1, 300):
    torch.save(program(torch.load("ids.pt")[:count]), f"{count}.pt")
print(len(files["items.txt"].split("\\n")), files["targets.txt"].split("\\n")[0])
"""
    done = subprocess.run([sys.executable, "-I", "-c", alone], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = model_of(chain)
    assert done.stdout.split() == [str(model.architecture["items"]), "<UNK>"]
    with torch.no_grad():
        stage = Stage(task, "inference")
        expected = model.user_representation(inputs, stage), model.scores(inputs, stage)[:, 1:]
    for count in (1, 300):
        users, scores = torch.load(tmp_path / f"{count}.pt")
        assert (scores[:, 0] == -torch.inf).all()
        for found, wanted in zip((users, scores[:, 1:]), expected):
            torch.testing.assert_close(found, wanted[:count], rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", [1, 2])
def test_a_program_counts_positions_as_the_model_does(task):
    torch.manual_seed(1)
    model = NextItNet(30, 8, [1, 2], 3, positions=6).eval()
    model.add_head(2, 9)
    torch.nn.init.normal_(model.position.weight)
    ids, stage = torch.randint(1, 30, (5, 7)), Stage(task, "inference")  # more items than positions, by one or two
    users, scores = program_of(model, task, 7).module()(ids)
    whole = torch.nn.functional.pad(ids, (0, 1)) if task > 1 else ids
    torch.testing.assert_close(users, model.user_representation(whole, stage), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores[:, 1:], model.scores(whole, stage)[:, 1:], rtol=0, atol=1e-5)


def test_serving_refuses_unusable_input_in_one_line(chain, serving, run_here, tmp_path):
    served, data = str(serving(2)), str(chain[0] / "Data" / FILES[2])
    source = ["--serving", served, "--data_path", data]
    represent = ["tools.represent", *source, "--output", str(tmp_path / "u.npy")]
    assert "serves task 2: give --task 2" in refused(run_here(*represent, "--task", "3"))
    assert "must end with .npy, .csv" in refused(run_here(*represent, "--task", "2", "--output", "u.txt"))
    (tmp_path / "ids").write_text("one\ntwo\n")
    assert "fewer lines" in refused(run_here(*represent, "--task", "2", "--ids", str(tmp_path / "ids")))
    (tmp_path / "ids").write_text("a\n" * 5000)
    assert "more lines" in refused(run_here(*represent, "--task", "2", "--ids", str(tmp_path / "ids")))
    (tmp_path / "ids").write_bytes(b"Jos\xe9\n" * 1500)
    assert "ids cannot be read ('utf-8'" in refused(run_here(*represent, "--task", "2", "--ids", str(tmp_path / "ids")))
    error = refused(run_here(*represent, "--task", "2", "--data_path", str(tmp_path)))
    assert error.startswith(f"error: {tmp_path} does not exist, or is no file")
    assert not (tmp_path / "u.npy").exists()
    (tmp_path / "rows.csv").write_text("1,2,3\n")
    over = ["--data_path", str(tmp_path / "rows.csv"), "--output", str(tmp_path / "rows.csv")]
    assert "is a file that is read" in refused(run_here(*represent, "--task", "2", *over))
    assert (tmp_path / "rows.csv").read_text() == "1,2,3\n"
    missing = ["tools.recommend", *source[2:], "--serving", str(tmp_path / "none"), "--task", "2"]
    error = refused(run_here(*missing))
    assert error.endswith(
        "none does not exist: name one with --serving, or make one with `python -m tools.export --task 2`\n"
    )
    assert "is damaged, or no serving file" in refused(run_here(*missing, "--serving", str(tmp_path)))
    elsewhere = ["--serving", "", "--checkpoint_dir", "elsewhere"]
    assert f"elsewhere/serving_t2.pt does not exist in {Path.cwd()}" in refused(run_here(*missing, *elsewhere))
    assert "must end with .csv" in refused(run_here(*missing, "--output", str(tmp_path / "best")))
    classes = ["tools.recommend", "--task", "4", "--serving", str(serving(4)), "--exclude_seen", "yes"]
    assert "--exclude_seen yes: task 4 learns classes" in refused(run_here(*classes))
    bits = bytearray(Path(served).read_bytes())
    bits[len(bits) // 2] ^= 1
    Path(served).write_bytes(bits)
    error = refused(run_here(*represent, "--task", "2"))
    assert "is damaged, or no serving file" in error and "--output" not in error
    folder = ["--checkpoint_dir", str(chain[0] / "checkpoints")]
    assert "has learned tasks 1 to 4" in refused(run_here("tools.export", "--task", "5", *folder))
    assert "--dtype int8 makes no sense" in refused(run_here("tools.export", "--task", "1", "--dtype", "int8"))


def test_other_files_are_replaced_only_with_overwrite(chain_copy, serving, run_here, tmp_path):
    """Where a checkpoint is given as serving file or output, no message proposes to overwrite it."""
    folder = chain_copy / "checkpoints"
    newest, data = folder / "ret_t4.pt", chain_copy / "Data" / FILES[2]
    before = newest.read_bytes()
    error = refused(run_here("tools.represent", "--task", "2", "--serving", str(newest), "--data_path", str(data)))
    assert "no serving file: name one with --serving" in error and "--output" not in error
    export = ["tools.export", "--task", "2", "--checkpoint_dir", str(folder)]
    for name in ("tp_t4.pt", "ret_t6.pt", "tp_t5.snapshot.pt", "index.csv"):  # whether they exist or not
        error = refused(run_here(*export, "--output", str(folder / name), "--overwrite"))
        assert f"{folder / name} is the name of a" in error and error.endswith("give another name\n")
    own = ["--checkpoint", str(shutil.copy(newest, tmp_path / "own.pt2")), "--overwrite"]
    for flag in ("--output", "--program"):
        assert f"{flag} {own[1]} is the checkpoint to export" in refused(run_here(*export, *own, flag, own[1]))
    both = ["--output", str(tmp_path / "x.pt2"), "--program", str(tmp_path / "x.pt2")]
    assert "--program and --output are both" in refused(run_here(*export, *both))
    read = ["--task", "2", "--serving", str(serving(2)), "--data_path", str(data), "--output"]
    for name in ("results.csv", "index.csv"):
        for tool in ("tools.represent", "tools.recommend"):
            (folder / name).write_text("kept\n")
            error = refused(run_here(tool, *read, str(folder / name), "--overwrite"))
            assert f"{name} is the name of a table that the scripts write" in error
            assert (folder / name).read_text() == "kept\n"
    assert newest.read_bytes() == before
    (tmp_path / "task.pt2").write_text("kept")
    program = ["--program", str(tmp_path / "task.pt2")]
    assert "task.pt2 exists: --overwrite replaces it" in refused(run_here(*export, *program))
    for more, code in (((), 0), ((), 0), (("--task", "3"), 2), (("--task", "3", "--overwrite"), 0)):
        assert run_here(*export, "--output", str(tmp_path / "served"), *more)[0] == code, "its own is replaced"
