"""The scripts as a user meets them: help, wrong input, Ctrl-C."""

import os
import re
import shutil
import signal
import subprocess
import sys

from conure import checkpoint

import pytest
import torch
from conftest import FILES, ROOT, STAGES, flags


def refused(result: tuple[int, str, str]) -> str:
    """The one line that a script prints when it refuses its input."""
    code, _, error = result
    assert code == 2
    assert re.fullmatch(r"error: [^\n]+\n", error), error
    return error


@pytest.mark.parametrize("task, mode", STAGES)
def test_help_lists_every_hyperparameter_with_its_comment(run_here, task, mode):
    script = f"conure_{mode}_t{task}.py"
    block = (ROOT / script).read_text().split("class Hyperparameters:")[1].split("\n\n")[0]
    fields = re.findall(r"^    (\w+): .* = (.*?)  # (.*)$", block, re.MULTILINE)
    assert len(fields) == len(block.strip().splitlines())
    code, output, _ = run_here(script, "--help")
    unwrapped = " ".join(output.split())
    assert code == 0 and all(f"--{name}" in output and comment in unwrapped for name, _, comment in fields)
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
        (["--learning_rate", "-1"], "--learning_rate -1.0 makes no sense"),
        (["--learning_rate", "nan"], "--learning_rate nan makes no sense"),
        (["--prune_ratio", "1"], "--prune_ratio 1.0 makes no sense"),
        (["--negative_fraction", "0"], "--negative_fraction 0.0 makes no sense"),
        (["--dilations", "1,x"], "--dilations '1,x' is not of the form INT,INT"),
        (["--dilations", "1,0"], "--dilations 1,0 makes no sense"),
        (["--positional_embedding", "maybe"], "--positional_embedding 'maybe' is not of the form true|false"),
        (["--precision", "fp8"], "--precision fp8 makes no sense"),
        (["--device", "tpu"], "--device tpu makes no sense"),
        (["--test_fraction", "1.5"], "--test_fraction 1.5 makes no sense"),
        (["--data_path", "nowhere.csv"], "nowhere.csv does not exist"),
        (["--data_path", "."], "Is a directory"),
    ],
)
def test_nonsense_is_refused_in_one_line(run_here, demo, arguments, complaint):
    assert complaint in refused(run_here("conure_tp_t1.py", *flags(demo, 1), *arguments))


@pytest.mark.parametrize(
    "edited",
    ["epochs: int = '4'", "epochs: int = 1.5", "dilations: tuple[int, ...] = (4)", "overwrite: bool = 'no'"],
)
def test_a_value_of_another_type_at_the_top_of_a_script_is_refused(tmp_path, edited):
    script = (ROOT / "conure_tp_t1.py").read_text()
    name = edited.split(":")[0]
    (tmp_path / "edited.py").write_text(re.sub(rf"    {name}: .*  #", f"    {edited}  #", script))
    command, paths = [sys.executable, str(tmp_path / "edited.py")], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=paths)
    assert f"error: {name} = " in refused((done.returncode, done.stdout, done.stderr))


def test_data_makers_leave_no_files_of_other_data_beside_theirs(run_here, tmp_path):
    (tmp_path / "original_desen_job.csv").write_text("1,2,,3\n")
    error = refused(run_here("Data.make_demo", "--output_dir", str(tmp_path), "--users", "5", "--overwrite"))
    assert "original_desen_job.csv is of other data" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_said(run_here, demo):
    assert "--device auto or cpu" in refused(run_here("conure_tp_t1.py", *flags(demo, 1), "--device", "cuda"))


def test_compiled_training_is_that_of_the_plain_code(run_here, demo, tmp_path):
    """And where there is no compiler, one line says so."""
    small = ["--channels", "8", "--dilations", "1", "--epochs", "1", "--learning_rate", "1e-4", "--dropout", "0"]
    scores = []
    for number, more in enumerate(([], ["--compile"])):
        folder = str(tmp_path / str(number))
        code, output, _ = run_here("conure_tp_t1.py", *flags(demo, 1), *small, *more, "--checkpoint_dir", folder)
        assert code == 0 and "goes on without" not in output
        content, _ = checkpoint.load(f"{folder}/tp_t1.pt")
        scores.append(content["model"]["blocks.0.conv1.weight"])
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)


def test_without_a_compiler_training_goes_on_plainly(demo, tmp_path):
    command = [sys.executable, str(ROOT / "conure_tp_t1.py"), *flags(demo, 1), "--checkpoint_dir", str(tmp_path)]
    small = ["--channels", "8", "--dilations", "1", "--epochs", "1", "--compile"]
    nowhere = os.environ | {"PATH": str(tmp_path), "CXX": "nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command + small, env=nowhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("goes on without torch.compile, which does not work here: ") == 1


def test_a_missing_predecessor_names_the_script_to_run(run_here, demo, chain, tmp_path):
    assert "conure_tp_t1.py" in refused(run_here("conure_ret_t1.py", *flags(tmp_path, 1)[2:], *flags(demo, 1)[:2]))
    for task, mode in STAGES[1:]:
        before = f"conure_tp_t{task}.py" if mode == "ret" else f"conure_ret_t{task - 1}.py"
        elsewhere = ["--checkpoint_dir", str(tmp_path)]
        assert before in refused(run_here(f"conure_{mode}_t{task}.py", *flags(demo, task), *elsewhere))
    assert "conure_tp_t1.py" in refused(run_here("evaluate.py", "--checkpoint_dir", str(tmp_path)))


def test_other_data_or_another_vocabulary_is_refused(run_here, chain, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(chain[0], folder)
    assert "other data" in refused(run_here("conure_ret_t1.py", *flags(folder, 1), "--test_fraction", "0.3"))
    with open(folder / "Data" / FILES[2], "a") as file:
        file.write("1,2,3,,clicks0_1\n")
    assert "run `python conure_tp_t2.py --overwrite`" in refused(run_here("conure_ret_t2.py", *flags(folder, 2)))
    file_lines = (folder / "Data" / "index.csv").read_text().splitlines()
    with open(folder / "Data" / "index.csv", "a") as file:
        file.write(f"brandnew,{len(file_lines) - 1}\n")
    error = refused(run_here("conure_tp_t2.py", *flags(folder, 2)))
    assert "another vocabulary" in error and "conure_tp_t1.py" in error


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_what_is_no_checkpoint_is_refused(run_here, chain, tmp_path, content):
    folder = tmp_path / "copy"
    shutil.copytree(chain[0], folder)
    (folder / "checkpoints" / "tp_t2.pt").write_bytes(content)
    assert "conure_tp_t2.py" in refused(run_here("conure_ret_t2.py", *flags(folder, 2)))


def test_bad_lines_end_a_script_in_one_line(run_here, chain, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(chain[0], folder)
    (folder / "Data" / FILES[2]).write_text("1,2,,c\n3,4\n")
    assert "line 2: no `,,`" in refused(run_here("conure_tp_t2.py", *flags(folder, 2)))


def test_a_results_table_that_is_none_is_refused_before_training(run_here, demo, tmp_path):
    (tmp_path / "results.csv").write_bytes(b"\xff\xfe\n\x00")
    error = refused(run_here("conure_tp_t1.py", *flags(demo, 1), "--checkpoint_dir", str(tmp_path), "--channels", "4"))
    assert "results.csv" in error


def test_ctrl_c_ends_training_as_if_it_had_converged(demo, tmp_path):
    """The best state is kept and pruned, and the chain goes on from it."""
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


def test_ctrl_c_before_training_says_that_no_checkpoint_was_written(tmp_path):
    os.mkfifo(tmp_path / "data.csv")
    command = [sys.executable, str(ROOT / "conure_tp_t1.py"), "--data_path", str(tmp_path / "data.csv")]
    command += ["--checkpoint_dir", str(tmp_path / "checkpoints")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        with open(tmp_path / "data.csv", "w"):  # which waits until the script reads its data
            process.send_signal(signal.SIGINT)
            error = process.stderr.read()
    assert process.returncode == 130
    assert error == "\ninterrupted: no checkpoint written; the same command goes on from the last snapshot, if any\n"
    assert not (tmp_path / "checkpoints").exists()


def test_ctrl_c_after_training_does_not_interrupt_what_is_left(demo, tmp_path):
    command = [sys.executable, str(ROOT / "conure_tp_t1.py"), *flags(demo, 1), "--channels", "8", "--dilations", "1"]
    command += ["--epochs", "1", "--index_path", str(tmp_path / "index.csv"), "--checkpoint_dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if "split=test" in line)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 0 and "saved" in rest and (tmp_path / "tp_t1.pt").exists()


@pytest.mark.parametrize("task, mode", STAGES)
def test_each_script_trains_its_own_loss(run_here, monkeypatch, chain, tmp_path, task, mode):
    """With the hyperparameters that are given, and of the kind that the task calls for."""
    from conure import losses, training

    folder, seen = tmp_path / "copy", []
    shutil.copytree(chain[0], folder)

    def see(run, loss):
        seen.append((loss, run.model.dropout.p))
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Run, "train", see)
    given = ["--negative_fraction", "0.5", "--padding_in_loss"] if task == 1 else ["--l2", "0.125"]
    for arguments in (given, ["--as_original"], ["--as_original", *given]):
        assert run_here(f"conure_{mode}_t{task}.py", *flags(folder, task), *arguments, "--overwrite")[0] == 130
    improved, original, both = (loss for loss, _ in seen)
    assert [dropout for _, dropout in seen] == [0.3 if task == 1 else 0, 0, 0]
    if task == 1:
        items = original.sampler.items
        assert [loss.sampler.count for loss in (improved, original, both)] == [items // 2, items // 5, items // 2]
        assert improved.ignored_label is None and original.ignored_label is None
        run_here(f"conure_{mode}_t{task}.py", *flags(folder, task), "--overwrite")
        assert seen[3][0].sampler.count == items // 5 and seen[3][0].ignored_label > 0
    else:
        assert type(improved) is losses.TargetLoss and improved.l2 == both.l2 == 0.125
        assert original.l2 == (0.05 if task == 3 else 0.02)
        assert original.compare is (losses.bce if task == 4 else losses.bpr)
        steps = original.sampler.cumulative.diff()
        assert (steps.max() - steps.min() < 1e-9) == (task == 4), "uniform for classes, by popularity for items"
