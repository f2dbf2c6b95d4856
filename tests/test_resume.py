"""Finished, interrupted and concurrent runs: skipping, resuming, overwriting, refusing."""

import itertools
import shutil
import subprocess
import sys
import time
from pathlib import Path

from conure import checkpoint
from conure.files import lock_folder
from conure.reporting import Progress
from conure.stage_files import StageFiles

import pandas as pd
import pytest
import torch
from conftest import FILES, ROOT, chain_settings, flags
from test_scripts import refused

SMALL = ["--channels", "8", "--dilations", "1", "--snapshot_minutes", "0.001"]
DIVERGING = ["--learning_rate", "1e30", "--epochs", "1", "--overwrite"]


def files_in(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


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
    """A folder in which tp of task 1, with 300 epochs, was killed after a snapshot."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(demo / "Data", folder / "Data")
    start_and_kill(folder, "--epochs", "300")
    return folder


def test_running_a_finished_stage_again_changes_nothing(chain_copy, run_here):
    before = files_in(chain_copy / "checkpoints")
    settings = chain_settings(2, "tp")
    code, output, error = run_here("conure_tp_t2.py", *flags(chain_copy, 2), *settings)
    assert code == 0 and error == ""
    later = "ret_t2.pt, tp_t3.pt, ret_t3.pt, tp_t4.pt, ret_t4.pt"
    redo = f"--overwrite redoes it and makes {later} stale"
    assert f"tp_t2.pt is finished; {redo}\nnext: python conure_ret_t2.py" in output
    assert files_in(chain_copy / "checkpoints") == before
    error = refused(run_here("conure_tp_t2.py", *flags(chain_copy, 2), *settings[2:]))
    assert "was made with epochs 6 (now 15): the stage is finished: continue with `python conure_ret_t2.py " in error
    assert error.endswith(f"`; {redo}\n")
    assert files_in(chain_copy / "checkpoints") == before


def test_a_finished_tp_of_task_1_restores_a_lost_index(chain_copy, run_here):
    index = chain_copy / "Data" / "index.csv"
    before = index.read_bytes()
    for damage in (index.unlink, lambda: index.write_text("junk")):
        damage()
        assert "conure_tp_t1.py" in refused(run_here("conure_ret_t1.py", *flags(chain_copy, 1)))
        assert run_here("conure_tp_t1.py", *flags(chain_copy, 1), *chain_settings(1, "tp"))[0] == 0
        assert index.read_bytes() == before


def test_overwriting_a_stage_replaces_its_results_and_makes_later_stages_stale(chain_copy, run_here):
    settings = ["--epochs", "1", "--batch_size", "128"]
    code, output, _ = run_here("conure_tp_t2.py", *flags(chain_copy, 2), *settings, "--overwrite")
    assert code == 0
    table = pd.read_csv(chain_copy / "checkpoints" / "results.csv")
    again = table[(table["task"] == 2) & table["state"].isin(["tp", "pruned"])]
    assert len(again) == output.count("RESULT") == 5
    later = "ret_t2.pt, tp_t3.pt, ret_t3.pt, tp_t4.pt, ret_t4.pt"
    assert f"tp_t2.pt will be redone; these depend on it and become stale: {later}\n" in output
    scripts = ", ".join(f"conure_{name.removesuffix('.pt')}.py" for name in later.split(", "))
    where = f"--checkpoint_dir {chain_copy / 'checkpoints'}"
    assert (
        f"stale now: run again, in this order, with {where} --overwrite: {scripts}\nnext: python conure_ret_t2.py"
        in output
    )
    assert output.endswith(" --overwrite\n")
    for script in ("conure_ret_t2.py", "conure_tp_t3.py", "conure_ret_t4.py"):
        task = int(script[-4])
        error = refused(run_here(script, *flags(chain_copy, task)))
        assert ("other" in error or "stale" in error) and "--overwrite" in error
    error = refused(run_here("evaluate.py", "--checkpoint_dir", str(chain_copy / "checkpoints")))
    assert "is stale, as tp_t2.pt has been replaced since" in error


def test_a_snapshot_of_other_settings_or_data_is_refused(killed, tmp_path, run_here):
    folder = Path(shutil.copytree(killed, tmp_path / "copy"))
    error = refused(run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, "--epochs", "2", "--seed", "3"))
    assert "tp_t1.snapshot.pt was made with seed 10 (now 3), epochs 300 (now 2)" in error
    with open(folder / "Data" / FILES[1], "a") as file:
        file.write("1,2,3\n")
    error = refused(run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, "--epochs", "300"))
    assert "was made with other data: --overwrite" in error
    code, output, _ = run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, "--epochs", "1", "--overwrite")
    assert code == 0 and "resuming" not in output
    assert not list((folder / "checkpoints").glob("*snapshot*"))


@pytest.mark.parametrize(
    "cpu, auto", [({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({}, "float32")]
)
def test_the_precision_that_auto_chose_is_recorded_and_another_one_is_refused(
    demo, tmp_path, run_here, monkeypatch, cpu, auto
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    command = ["conure_tp_t1.py", *flags(demo, 1), *SMALL, "--epochs", "1", "--checkpoint_dir", str(tmp_path)]
    code, output, _ = run_here(*command)
    assert code == 0 and f"; {auto}\nversions" in output
    other = "float32" if auto == "bfloat16" else "bfloat16"
    assert f"was made with precision {auto} (now {other})" in refused(run_here(*command, "--precision", other))
    assert "is finished" in run_here(*command, "--precision", auto)[1]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not cpu})
    assert "is finished" in run_here(*command)[1], "auto takes what is there, on other hardware too"


def test_a_killed_run_with_overwrite_resumes(killed, tmp_path, run_here):
    folder = Path(shutil.copytree(killed / "Data", tmp_path / "Data")).parent
    assert run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, "--epochs", "1")[0] == 0
    first = (folder / "checkpoints" / "tp_t1.pt").read_bytes()
    again = ["--epochs", "40", "--overwrite"]
    start_and_kill(folder, *again)
    assert (folder / "checkpoints" / "tp_t1.pt").read_bytes() == first
    code, output, _ = run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, *again)
    assert code == 0 and "resuming from" in output and "epoch=40 " in output and "spectral, from" not in output


def test_a_run_may_resume_on_another_device(killed, tmp_path, run_here, monkeypatch):
    """The snapshot is edited as if it had been made on a GPU. Its precision is kept."""
    folder = Path(shutil.copytree(killed, tmp_path / "copy"))
    path = str(folder / "checkpoints" / "tp_t1.snapshot.pt")
    content, _ = checkpoint.load_file(path, "")
    content["device"], content["identity"]["epochs"] = "cuda", "1"
    checkpoint.save(path, content)
    before = content["identity"]["precision"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": before == "float32"})
    code, output, error = run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, "--epochs", "1")
    assert code == 0, error
    assert "it was made on cuda; cpu draws and rounds differently: the result is as good" in output
    assert f"; {before}\nversions" in output


def test_a_run_resumed_within_an_epoch_is_bit_identical(demo, tmp_path, run_here, monkeypatch):
    """With dropout, sampled negatives, learning-rate decay and weight averaging, interrupted at every third step."""
    settings = ["--epochs", "2", "--batch_size", "100", "--average_last", "0.7", "--snapshot_minutes", "1e-9"]
    settings += SMALL[:4]
    folders = tmp_path / "a", tmp_path / "b"
    places = [[*flags(folder, 1), *flags(demo, 1)[:2]] for folder in folders]
    assert run_here("conure_tp_t1.py", *places[0], *settings)[0] == 0
    steps, advance = itertools.count(1), Progress.advance

    def interrupted(progress, loss):
        advance(progress, loss)
        if next(steps) % 3 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "advance", interrupted)
    codes = [run_here("conure_tp_t1.py", *places[1], *settings)[0] for _ in range(12)]
    assert codes == [130] * 11 + [0], "24 steps, of which every third is taken twice"
    untouched, resumed = (checkpoint.load(str(folder / "checkpoints" / "tp_t1.pt"))[0] for folder in folders)
    assert all(torch.equal(value, resumed["model"][name]) for name, value in untouched["model"].items())
    assert untouched["tasks"][1]["results"] == resumed["tasks"][1]["results"]


def test_a_run_releases_the_lock_of_its_folder(chain_copy, run_here, monkeypatch):
    """After a saved, failed or refused run, even while an object still refers to its files."""
    alive, begin = [], StageFiles.__init__
    monkeypatch.setattr(StageFiles, "__init__", lambda files, *given: [alive.append(files), begin(files, *given)][1])
    for arguments, expected in (["--epochs", "1", "--overwrite"], 0), (["--epochs", "1"], 0), ([], 2), (DIVERGING, 2):
        code, output, error = run_here("conure_ret_t1.py", *flags(chain_copy, 1), *arguments)
        assert code == expected, output + error
        lock_folder(str(chain_copy / "checkpoints")).close()
    assert len(alive) == 4


def test_the_index_changes_only_with_its_checkpoint(chain_copy, run_here):
    index, data = chain_copy / "Data" / "index.csv", chain_copy / "Data" / FILES[1]
    before = index.read_bytes()
    data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    elsewhere = [*flags(chain_copy, 1), *SMALL, "--epochs", "1", "--checkpoint_dir", str(chain_copy / "elsewhere")]
    code, output, error = run_here("conure_tp_t1.py", *elsewhere)
    assert code == 2 and "holds the ids of other data" in error and "RESULT" not in output
    assert run_here("conure_tp_t1.py", *elsewhere, "--index_path", str(chain_copy / "new.csv"), *DIVERGING)[0] == 2
    assert run_here("conure_tp_t1.py", *flags(chain_copy, 1), *SMALL, *DIVERGING)[0] == 2
    assert index.read_bytes() == before and not (chain_copy / "new.csv").exists()
    assert run_here("conure_tp_t1.py", *flags(chain_copy, 1), *SMALL, "--epochs", "1", "--overwrite")[0] == 0
    assert index.read_bytes() != before
    index.write_bytes(before)
    error = refused(run_here("conure_ret_t1.py", *flags(chain_copy, 1), "--overwrite"))
    assert "was made with another vocabulary than" in error and "--overwrite" not in error


def test_a_damaged_snapshot_is_refused(killed, tmp_path, run_here):
    folder = Path(shutil.copytree(killed, tmp_path / "copy"))
    snapshot = folder / "checkpoints" / "tp_t1.snapshot.pt"
    snapshot.write_bytes(snapshot.read_bytes()[:-100])
    error = refused(run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, "--epochs", "300"))
    assert "tp_t1.snapshot.pt is damaged or cut short" in error and "--overwrite starts the stage over" in error


def test_two_runs_never_write_to_one_folder(killed, tmp_path, run_here):
    folder = Path(shutil.copytree(killed / "Data", tmp_path / "Data")).parent
    command = [sys.executable, str(ROOT / "conure_tp_t1.py"), *flags(folder, 1), *SMALL, "--epochs", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("RESULT"))
        error = refused(run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, "--epochs", "1"))
        assert "another run is at work in" in error
        process.kill()
    assert run_here("conure_tp_t1.py", *flags(folder, 1), *SMALL, "--epochs", "1", "--overwrite")[0] == 0


def test_a_loss_that_is_not_finite_stops_the_stage(chain_copy, run_here):
    before = files_in(chain_copy / "checkpoints", "*.pt")
    error = refused(run_here("conure_ret_t1.py", *flags(chain_copy, 1), *DIVERGING))
    assert "the loss is " in error and "at step 2 in ret of task 1" in error and "ret_t1.pt kept as before" in error
    assert files_in(chain_copy / "checkpoints", "*.pt") == before


def test_a_model_that_diverges_in_its_last_step_is_not_saved(demo, tmp_path, run_here):
    """The loss is finite, because it is computed before the step."""
    one_step = ["--epochs", "1", "--batch_size", "5000", "--learning_rate", "1e30", "--channels", "8"]
    code, _, error = run_here("conure_tp_t1.py", *flags(demo, 1), *one_step, "--checkpoint_dir", str(tmp_path))
    assert code == 2 and "not finite" in error and not list(tmp_path.glob("*.pt"))


def test_a_checkpoint_records_its_lineage(chain):
    folder = chain[0] / "checkpoints"
    content, digest = checkpoint.load(str(folder / "ret_t2.pt"))
    assert list(content["lineage"]) == ["tp_t1.pt", "ret_t1.pt", "tp_t2.pt"]
    for name, expected in content["lineage"].items():
        assert checkpoint.load(str(folder / name))[1] == expected != digest
    assert content["identity"]["checkpoint before"] == content["lineage"]["tp_t2.pt"]
    assert content["identity"]["epochs"] == "6" and content["versions"]["torch"] == torch.__version__
    assert not list(folder.glob("*snapshot*")) and not list(folder.glob("*.tmp"))
