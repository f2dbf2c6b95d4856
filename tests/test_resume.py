"""What a script does when a run of it has been there before, or is there now."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from conure import checkpoint

import pandas as pd
import pytest
import torch
from conftest import FILES, ROOT, chain_settings, flags
from test_scripts import refused

SMALL = ["--channels", "8", "--dilations", "1", "--snapshot_minutes", "0.001"]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def copy(chain, tmp_path) -> Path:
    """A finished chain of one's own."""
    shutil.copytree(chain[0], tmp_path / "copy")
    return tmp_path / "copy"


def start_and_kill(folder: Path, *arguments: str) -> None:
    """Runs tp of task 1 until it has written a snapshot, then kills it."""
    snapshot = folder / "checkpoints" / "tp_t1.snapshot.pt"
    command = [sys.executable, str(ROOT / "conure_tp_t1.py"), *flags(folder, 1), *SMALL, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not snapshot.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def killed(demo, tmp_path_factory) -> Path:
    """A folder in which tp of task 1 was killed on its way to epoch 300."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(demo / "Data", folder / "Data")
    start_and_kill(folder, "--epochs", "300")
    return folder


def test_a_finished_stage_says_so_and_changes_nothing(chain, copy, run_here):
    _, printed = chain
    before = files_in(copy / "checkpoints")
    settings = chain_settings(2, "tp")
    code, output, error = run_here("conure_tp_t2.py", *flags(copy, 2), *settings)
    assert code == 0 and error == ""
    assert "tp_t2.pt is finished; --overwrite does it over\nnext: python conure_ret_t2.py" in output
    assert files_in(copy / "checkpoints") == before
    error = refused(run_here("conure_tp_t2.py", *flags(copy, 2), *settings[2:]))
    assert "was made with epochs 6 (now 15): the stage is finished: go on with `python conure_ret_t2.py " in error
    assert files_in(copy / "checkpoints") == before


def test_a_lost_index_is_written_again_by_the_finished_script(copy, run_here):
    index = copy / "Data" / "index.csv"
    before = index.read_bytes()
    for damage in (index.unlink, lambda: index.write_text("junk")):
        damage()
        assert "conure_tp_t1.py" in refused(run_here("conure_ret_t1.py", *flags(copy, 1)))
        assert run_here("conure_tp_t1.py", *flags(copy, 1), *chain_settings(1, "tp"))[0] == 0
        assert index.read_bytes() == before


def test_overwriting_a_stage_replaces_its_results_and_makes_what_follows_stale(copy, run_here):
    settings = ["--epochs", "1", "--batch_size", "128"]
    code, output, _ = run_here("conure_tp_t2.py", *flags(copy, 2), *settings, "--overwrite")
    assert code == 0
    table = pd.read_csv(copy / "checkpoints" / "results.csv")
    again = table[(table["task"] == 2) & table["state"].isin(["tp", "pruned"])]
    assert len(again) == output.count("RESULT") == 5
    later = "ret_t2.pt, tp_t3.pt, ret_t3.pt, tp_t4.pt, ret_t4.pt"
    assert f"tp_t2.pt is done over, and what goes back to it has to be afterwards: {later}\n" in output
    for script in ("conure_ret_t2.py", "conure_tp_t3.py", "conure_ret_t4.py"):
        task = int(script[-4])
        error = refused(run_here(script, *flags(copy, task)))
        assert "other" in error and "--overwrite" in error
    error = refused(run_here("evaluate.py", "--checkpoint_dir", str(copy / "checkpoints")))
    assert "goes back to another tp_t2.pt than the one there now" in error


def test_a_snapshot_of_other_settings_or_data_is_refused_by_name(killed, tmp_path, run_here):
    shutil.copytree(killed, tmp_path / "copy")
    folder = tmp_path / "copy"
    error = refused(run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, "--epochs", "2", "--seed", "3"))
    assert "tp_t1.snapshot.pt was made with seed 10 (now 3), epochs 300 (now 2)" in error
    with open(folder / "Data" / FILES[1], "a") as file:
        file.write("1,2,3\n")
    error = refused(run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, "--epochs", "300"))
    assert "was made with other data: --overwrite" in error
    code, output, _ = run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, "--epochs", "1", "--overwrite")
    assert code == 0 and "going on" not in output
    assert not list((folder / "checkpoints").glob("*snapshot*"))


def test_a_killed_overwriting_goes_on_when_it_is_started_again(killed, tmp_path, run_here):
    folder = tmp_path / "copy"
    shutil.copytree(killed / "Data", folder / "Data")
    assert run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, "--epochs", "1")[0] == 0
    first = (folder / "checkpoints" / "tp_t1.pt").read_bytes()
    again = ["--epochs", "40", "--overwrite"]
    start_and_kill(folder, *again)
    assert (folder / "checkpoints" / "tp_t1.pt").read_bytes() == first
    code, output, _ = run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, *again)
    assert code == 0 and "going on from" in output and "epoch=40 " in output


def test_a_damaged_snapshot_is_refused(killed, tmp_path, run_here):
    shutil.copytree(killed, tmp_path / "copy")
    snapshot = tmp_path / "copy" / "checkpoints" / "tp_t1.snapshot.pt"
    snapshot.write_bytes(snapshot.read_bytes()[:-100])
    error = refused(run_here("conure_tp_t1.py", *flags(tmp_path / "copy", 1), *SMALL, "--epochs", "300"))
    assert "tp_t1.snapshot.pt is damaged or cut short" in error and "--overwrite starts the stage over" in error


def test_two_runs_in_one_folder_do_not_meet(killed, tmp_path, run_here):
    folder = tmp_path / "copy"
    shutil.copytree(killed / "Data", folder / "Data")
    command = [sys.executable, str(ROOT / "conure_tp_t1.py"), *flags(folder, 1), *SMALL, "--epochs", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("RESULT"))
        error = refused(run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, "--epochs", "1"))
        assert "another run is at work in" in error
        process.kill()
    assert run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, "--epochs", "1", "--overwrite")[0] == 0


def test_a_loss_that_is_not_finite_stops_the_stage(copy, run_here):
    before = files_in(copy / "checkpoints")
    error = refused(run_here("conure_ret_t1.py", *flags(copy, 1), "--learning_rate", "1e30", "--overwrite"))
    assert "the loss is " in error and "at step 2 in ret of task 1" in error and "ret_t1.pt kept as before" in error
    after = files_in(copy / "checkpoints")
    assert {name: after[name] for name in after if name.endswith(".pt")} == {
        name: before[name] for name in before if name.endswith(".pt")
    }


def test_a_model_that_diverges_in_its_last_step_is_not_kept(demo, tmp_path, run_here):
    """Its loss was finite, as it was computed before the step."""
    one_step = ["--epochs", "1", "--batch_size", "5000", "--learning_rate", "1e30", "--channels", "8"]
    code, _, error = run_here("conure_tp_t1.py", *flags(demo, 1), *one_step, "--checkpoint_dir", str(tmp_path))
    assert code == 2 and "not finite" in error and not list(tmp_path.glob("*.pt"))


def test_a_checkpoint_carries_where_it_comes_from(chain):
    folder = chain[0] / "checkpoints"
    content, digest = checkpoint.load(str(folder / "ret_t2.pt"))
    assert list(content["lineage"]) == ["tp_t1.pt", "ret_t1.pt", "tp_t2.pt"]
    for name, expected in content["lineage"].items():
        assert checkpoint.load(str(folder / name))[1] == expected != digest
    assert content["identity"]["checkpoint before"] == content["lineage"]["tp_t2.pt"]
    assert content["identity"]["epochs"] == "6" and content["versions"]["torch"] == torch.__version__
    assert not list(folder.glob("*snapshot*")) and not list(folder.glob("*.tmp"))
