"""The scripts as a user meets them: help, wrong input, Ctrl-C."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

from conure import checkpoint, launch, losses, settings, training
from conure.errors import InputError
from conure.settings import Running
from conure.stage_files import StageFiles

import numpy as np
import pytest
import torch
from conftest import FILES, PROGRAMS, ROOT, STAGES, flags, run_python

from pruning import Stage


def refused(result: tuple[int, str, str]) -> str:
    """The one-line error of a script that refuses its input."""
    code, _, error = result
    assert code == 2
    assert re.fullmatch(r"error: [^\n]+\n", error), error
    return error


@pytest.mark.parametrize("task, mode", STAGES)
def test_help_shows_every_field_with_its_comment(run_here, task, mode):
    script = f"conure_{mode}_t{task}.py"
    block = (ROOT / script).read_text().split("class Hyperparameters(Running):")[1].split("\n\n")[0]
    fields = dict(re.findall(r"^    (\w+): .* = .*?  # (.*)$", block, re.MULTILINE))
    assert len(fields) == len(block.strip().splitlines())
    code, output, _ = run_here(script, "--help")
    unwrapped = " ".join(output.split())
    assert code == 0 and all(comment in unwrapped for comment in fields.values())
    shown = [re.findall(r"^  --(\w+)", part, re.MULTILINE) for part in output.split("\nrunning:\n")]
    assert shown == [[*fields], [field.name for field in dataclasses.fields(Running)]]
    assert ("[10.0; the original: 1.0]" in unwrapped) == (task == 1)
    assert ("[softmax; the original: bce]" in unwrapped) == (task == 4)
    for part in ("READS", "WRITES", "NEXT"):
        assert part in output


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--epochs", "three"], "--epochs 'three' is not of the form INT"),
        (["--epochs", "0"], "--epochs 0 makes no sense"),
        (["--epochs"], "expected one argument"),
        (["--learning_rate", "nan"], "--learning_rate nan makes no sense"),
        (["--dilations", "1,x"], "--dilations '1,x' is not of the form INT,INT"),
        (["--positional_embedding", "maybe"], "--positional_embedding 'maybe' is not of the form true|false"),
        (["--device", "tpu"], "--device tpu makes no sense"),
        (["--data_path", "nowhere.csv"], "nowhere.csv does not exist"),
        (["--data_path", "."], "Is a directory"),
    ],
)
def test_invalid_flags_are_refused_in_one_line(run_here, demo, arguments, complaint):
    assert complaint in refused(run_here("conure_tp_t1.py", *flags(demo, 1), *arguments))


@pytest.mark.parametrize(
    "edited",
    ["epochs: Count = '4'", "epochs: Count = 1.5", "dilations: Dilations = (4)", "decay: bool = 'no'"],
)
def test_an_invalid_value_at_the_top_of_a_script_is_refused(run_here, tmp_path, edited):
    script = (ROOT / "conure_tp_t1.py").read_text()
    name = edited.split(":")[0]
    (tmp_path / "edited.py").write_text(re.sub(rf"    {name}: .*  #", f"    {edited}  #", script))
    assert f"error: {name} = " in refused(run_here(str(tmp_path / "edited.py")))


def test_data_makers_refuse_a_folder_with_other_task_files(run_here, tmp_path):
    (tmp_path / "original_desen_job.csv").write_text("1,2,,3\n")
    error = refused(run_here("Data.make_demo", "--output_dir", str(tmp_path), "--users", "5", "--overwrite"))
    assert "original_desen_job.csv is of other data" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_refused(run_here, demo):
    assert "--device auto or cpu" in refused(run_here("conure_tp_t1.py", *flags(demo, 1), "--device", "cuda"))


def test_compiled_training_equals_uncompiled(run_here, demo, tmp_path):
    """Weights agree after an epoch without dropout, in float32."""
    small = ["--channels", "8", "--dilations", "1", "--epochs", "1", "--learning_rate", "1e-4", "--dropout", "0"]
    small += ["--precision", "float32"]
    scores = []
    for number, more in enumerate(([], ["--compile"])):
        folder = str(tmp_path / str(number))
        code, output, _ = run_here("conure_tp_t1.py", *flags(demo, 1), *small, *more, "--checkpoint_dir", folder)
        assert code == 0 and "training without" not in output
        content, _ = checkpoint.load(f"{folder}/tp_t1.pt")
        scores.append(content["model"]["blocks.0.conv1.weight"])
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)


def test_without_a_compiler_training_runs_uncompiled(demo, tmp_path):
    where = [*flags(demo, 1), "--checkpoint_dir", str(tmp_path)]
    small = ["--channels", "8", "--dilations", "1", "--epochs", "1", "--compile"]
    nowhere = {"PATH": str(tmp_path), "CXX": "nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    printed = run_python("conure_tp_t1.py", *where, *small, **nowhere)
    assert printed.count("training without torch.compile, which fails here: ") == 1


def test_a_missing_predecessor_names_the_script_to_run(run_here, demo, chain, tmp_path):
    assert "conure_tp_t1.py" in refused(run_here("conure_ret_t1.py", *flags(tmp_path, 1)[2:], *flags(demo, 1)[:2]))
    for task, mode in STAGES[1:]:
        before = f"conure_tp_t{task}.py" if mode == "ret" else f"conure_ret_t{task - 1}.py"
        elsewhere = ["--checkpoint_dir", str(tmp_path)]
        assert before in refused(run_here(f"conure_{mode}_t{task}.py", *flags(chain[0], task), *elsewhere))
    assert "conure_tp_t1.py" in refused(run_here("evaluate.py", "--checkpoint_dir", str(tmp_path)))


def test_other_data_another_vocabulary_or_a_damaged_checkpoint_is_refused(run_here, chain_copy):
    assert "other data" in refused(run_here("conure_ret_t1.py", *flags(chain_copy, 1), "--test_fraction", "0.3"))
    with open(chain_copy / "Data" / FILES[2], "a") as file:
        file.write("1,2,3,,clicks0_1\n")
    again = f"run `python conure_tp_t2.py --checkpoint_dir {chain_copy / 'checkpoints'} --overwrite`"
    assert again in refused(run_here("conure_ret_t2.py", *flags(chain_copy, 2)))
    file_lines = (chain_copy / "Data" / "index.csv").read_text().splitlines()
    with open(chain_copy / "Data" / "index.csv", "a") as file:
        file.write(f"brandnew,{len(file_lines) - 1}\n")
    error = refused(run_here("conure_tp_t2.py", *flags(chain_copy, 2)))
    assert "another vocabulary" in error and "conure_tp_t1.py" in error
    (chain_copy / "checkpoints" / "tp_t2.pt").write_bytes(b"no checkpoint at all")
    error = refused(run_here("conure_ret_t2.py", *flags(chain_copy, 2)))
    assert "tp_t2.pt is damaged or cut short" in error and "conure_tp_t2.py" in error


def test_ret_needs_the_split_of_tp(run_here, chain_copy):
    small = [*flags(chain_copy, 2), "--epochs", "1", "--overwrite"]
    split = ["--split_seed", "3", "--split_by", "user"]
    code, output, _ = run_here("conure_tp_t2.py", *small, *split)
    assert code == 0 and output.count("--split_seed 3 --split_by user") == 1  # in the `next:` line
    error = refused(run_here("conure_ret_t2.py", *small))
    assert "another split (--test_fraction 0.2 --split_seed 3 --split_by user) than now" in error
    assert run_here("conure_ret_t2.py", *small, *split)[0] == 0
    for later in (chain_copy / "checkpoints").glob("*_t[34].pt"):
        later.unlink()
    code, output, _ = run_here("evaluate.py", "--checkpoint_dir", str(chain_copy / "checkpoints"), "--device", "cpu")
    assert code == 0 and output.count(" same\n") == 2


def test_ctrl_c_ends_training_as_if_it_had_converged(demo, tmp_path):
    """The best state is kept and pruned, and the next stage can start."""
    arguments = [*flags(demo, 1), "--index_path", str(tmp_path / "index.csv"), "--checkpoint_dir", str(tmp_path)]
    endless = ["--channels", "8", "--dilations", "1", "--epochs", "100000"]
    for mode, shape in (("tp", endless), ("ret", endless[-2:])):
        command = [sys.executable, str(ROOT / f"conure_{mode}_t1.py"), *arguments, *shape]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            printed = []
            for line in process.stdout:
                printed.append(line)
                if "epoch=2 " in line and not any("epoch=2 " in earlier for earlier in printed[:-1]):
                    process.send_signal(signal.SIGINT)
        output = "".join(printed)
        assert process.returncode == 0, output
        assert "stopped by Ctrl-C" in output and "Traceback" not in output and "next: python" in output
    pruned = torch.load(tmp_path / "tp_t1.pt", weights_only=True)
    assert pruned["tasks"][1]["state"] == "pruned"
    assert 0 < pruned["model"]["blocks.0.conv1.owner"].sum() < pruned["model"]["blocks.0.conv1.owner"].numel()
    assert torch.load(tmp_path / "ret_t1.pt", weights_only=True)["tasks"][1]["state"] == "ret"


def test_ctrl_c_before_training_writes_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "data.csv")
    command = [sys.executable, str(ROOT / "conure_tp_t1.py"), "--data_path", str(tmp_path / "data.csv")]
    command += ["--checkpoint_dir", str(tmp_path / "checkpoints")]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with started as process, open(tmp_path / "data.csv", "w"):  # a FIFO: open waits until the script reads it
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
    assert process.returncode == 130
    assert (
        error == "\ninterrupted: no checkpoint written; run the same command to resume from the last snapshot, if any\n"
    )
    assert not (tmp_path / "checkpoints").exists()


ON_IMPORT_OF_TORCH = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            {then}

sys.meta_path.insert(0, Finder())
{run}
"""


def run_code(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("script", ["conure_tp_t1.py", "evaluate.py"])
def test_ctrl_c_while_torch_loads_ends_a_script_in_one_line(script):
    run = "runpy.run_path(sys.argv[1], run_name='__main__')"
    done = run_code(ON_IMPORT_OF_TORCH.format(then="os.kill(os.getpid(), signal.SIGINT)", run=run), str(ROOT / script))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


def test_environment_variables_are_set_before_torch_is_imported():
    """Whichever module is imported first, in a process that has imported neither ours nor torch."""
    run = """
import importlib
ours = {"conure", "pruning", "nextitnet", "data_loader"}
for name in sys.argv[1:]:
    for loaded in [each for each in sys.modules if each.split(".")[0] in ours]:
        del sys.modules[loaded]
    os.environ.pop("GOMP_SPINCOUNT", None)
    try:
        importlib.import_module(name)
    except EOFError:
        assert os.environ.get("GOMP_SPINCOUNT") == "1000", name
    """
    run_python("-c", ON_IMPORT_OF_TORCH.format(then="raise EOFError", run=run), *PROGRAMS, "data_loader", "nextitnet")


@pytest.mark.parametrize("script", ["conure_tp_t1.py", "evaluate.py"])
def test_windows_is_refused_with_the_supported_systems(script):
    code = "import runpy, sys; sys.platform = 'win32'; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = run_code(code, str(ROOT / script))
    assert "runs on Linux and macOS" in refused((done.returncode, done.stdout, done.stderr))


def test_output_works_on_an_ascii_terminal(tmp_path):
    """The help and the table of Data.from_interactions, both with an ellipsis."""
    rows = "".join(f"{user},{item},{item}\n" for user in range(3) for item in range(1, 10))
    (tmp_path / "rows.csv").write_text("user_id,item_id,timestamp\n" + rows)
    code = "import runpy; runpy.run_module('Data.from_interactions', run_name='__main__', alter_sys=True)"
    made = ["--interactions", str(tmp_path / "rows.csv"), "--output_dir", str(tmp_path / "made")]
    for arguments in (["--help"], made):
        done = run_code(code, *arguments, PYTHONIOENCODING="ascii")
        assert done.returncode == 0 and "\\u2026" in done.stdout and not done.stderr, done.stderr


@dataclasses.dataclass
class Sized:
    batch_size: int = 32  # less of it takes less memory
    prune_ratio: float = 0.5  # has nothing to do with memory


@dataclasses.dataclass
class Named:
    name: str = ""  # no field that changes the use of memory


@pytest.fixture
def ended(monkeypatch, capsys):
    """Runs a script with this settings block, whose main raises the error; returns exit code, stdout and stderr."""

    def end(block: type, error: Exception | Callable) -> tuple[int, str, str]:
        def main(_: object) -> None:
            raise error if isinstance(error, Exception) else error()

        monkeypatch.setattr(sys, "argv", ["script.py"])
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
        with pytest.raises(SystemExit) as end:
            launch.run(main, block, "")
        return (end.value.code, *capsys.readouterr())

    return end


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.empty(1 << 48),
        MemoryError(),
        MemoryError("Unable to allocate 1 TiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_out_of_memory_is_one_line_that_names_only_flags_of_the_script(ended, error):
    assert re.fullmatch(r"error: .*(memory|allocate).*: lower --batch_size\n", refused(ended(Sized, error)))
    assert "--" not in refused(ended(Named, error))


@pytest.mark.parametrize(
    "text", ["CUDA error: an illegal memory access was encountered", "view is not compatible with the memory layout"]
)
def test_another_error_that_mentions_memory_keeps_its_traceback(ended, text):
    with pytest.raises(RuntimeError, match=text):
        ended(Sized, RuntimeError(text))


def test_ctrl_c_after_training_does_not_interrupt_saving(demo, tmp_path):
    command = [sys.executable, str(ROOT / "conure_tp_t1.py"), *flags(demo, 1), "--channels", "8", "--dilations", "1"]
    command += ["--epochs", "1", "--index_path", str(tmp_path / "index.csv"), "--checkpoint_dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if "split=test" in line)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 0 and "saved" in rest and (tmp_path / "tp_t1.pt").exists()


@pytest.mark.parametrize("task, mode", STAGES)
def test_each_script_trains_its_own_loss(run_here, monkeypatch, chain_copy, task, mode):
    """Of the type that the task needs, and with the given hyperparameters."""
    folder, seen, ranks = chain_copy, [], []

    def see(run, loss):
        seen.append((loss, run.model.dropout.p))
        updates, readouts = run.model.updates.values(), [readout.table for readout in run.model.readouts.values()]
        ranks.append([(len(update.axes), len(table.axes)) for update, table in zip(updates, readouts, strict=True)])
        run.files.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Run, "train", see)
    given = ["--negative_fraction", "0.5", "--padding_in_loss"] if task == 1 else ["--l2", "0.125"]
    given += ["--l2_sp", "0.25"] if task in (2, 3) else []
    for arguments in (given, ["--as_original"], ["--as_original", *given]):
        assert run_here(f"conure_{mode}_t{task}.py", *flags(folder, task), *arguments, "--overwrite")[0] == 130
    improved, original, both = (loss for loss, _ in seen)
    assert [dropout for _, dropout in seen] == [0.3 if task in (1, 4) else 0, 0, 0]
    of_tasks = [(16, 32), (16, 32), (16, 16)]  # the demo's model has 32 channels
    there = task - 1 - (mode == "tp" and task > 1)
    assert ranks[0] == of_tasks[: task - 1], "of update and readout, for tasks 2 and later"
    assert ranks[1] == ranks[2] == of_tasks[:there], "the original adds neither"
    if task == 1:
        items = original.sampler.items
        assert [loss.sampler.count for loss in (improved, original, both)] == [items // 2, items // 5, items // 2]
        assert improved.ignored_label is None and original.ignored_label is None
        run_here(f"conure_{mode}_t{task}.py", *flags(folder, task), "--overwrite")
        assert seen[3][0].sampler.count == items // 5 and seen[3][0].ignored_label > 0
    else:
        assert type(improved) is losses.TargetLoss and improved.l2 == both.l2 == 0.125
        assert original.l2 == (0.05 if task == 3 else 0.02)
        assert task == 4 or improved.l2_sp == both.l2_sp == 0.25
        assert original.compare is (losses.bce if task == 4 else losses.bpr)
        steps = original.sampler.cumulative.diff()
        assert (steps.max() - steps.min() < 1e-9) == (task == 4), "uniform for classes, by popularity for items"


def test_hints_at_settings_that_move_nothing_and_at_classes_as_items(run_here, chain_copy):
    arguments = [*flags(chain_copy, 4), "--overwrite"]
    code, output, _ = run_here("conure_tp_t4.py", *arguments, "--epochs", "3", "--learning_rate", "1e-2")
    assert code == 0 and "\nhint: " not in output
    code, output, _ = run_here("conure_tp_t2.py", *arguments, "--epochs", "1", "--learning_rate", "1e-4")
    assert code == 0
    hints = re.findall(r"^hint: (.*)$", output, re.MULTILINE)
    assert len(hints) == 2 and hints[0].endswith("or --batch_size 128 --learning_rate 1e-3 as for small data")
    assert "one of 2 targets: if they are classes, use copies of task 4's scripts" in hints[1]


def test_items_learned_as_classes_get_a_hint(run_here, chain_copy):
    items = ["--data_path", str(chain_copy / "Data" / FILES[3]), "--epochs", "1", "--overwrite"]
    code, output, _ = run_here("conure_tp_t4.py", *flags(chain_copy, 4), *items)
    assert code == 0 and "if they are items, use copies of task 3's scripts" in output


def test_a_copied_script_whose_stage_was_left_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/conure_tp_t5.py"])
    with pytest.raises(InputError, match=r'conure_tp_t5.py is to train Stage\(4, "tp"\): change that in its main'):
        training.Run(None, Stage(4, "tp"), None)


def test_the_chain_ends_where_the_next_tasks_data_are_missing(monkeypatch):
    hp = settings.of_script("conure_ret_t2.py")
    files = StageFiles.__new__(StageFiles)
    files.hp, files.stage = hp, Stage(2, "ret")
    monkeypatch.setattr(os.path, "exists", lambda path: "like" not in str(path))
    assert files.next_command() == "evaluate.py"
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    assert files.next_command() == "conure_tp_t3.py"


def test_a_loss_is_added_in_one_place():
    """`--loss` allows each of PAIRWISE, and `target` takes it."""
    for name, loss in losses.PAIRWISE.items():
        hp = settings.of_script("conure_tp_t2.py", loss=name)
        targets = SimpleNamespace(targets=np.array([1, 2, 2]), target_vocabulary=range(3))
        assert losses.target(hp, targets).compare is loss
