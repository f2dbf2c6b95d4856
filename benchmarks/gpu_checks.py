"""Correctness checks for a GPU, without the test suite: agreement with the CPU, export, a chain, resuming."""

import copy
import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from conure import checkpoint, rescoring
from conure.fingerprint import fingerprints
from conure.losses import Objective
from conure.settings import ROOT

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

import pruning
from benchmarks import train_step
from benchmarks.train_step import Hyperparameters
from data_loader import Batch
from nextitnet import NextItNet
from pruning import Stage
from tools.export import Program, program_of

# Tolerances are relative: the norm of the difference over the norm. The device may differ from float32 on the CPU by
# TOLERANCES, plus TIMES_ROUNDING times what bfloat16 on the CPU differs from it.
TOLERANCES, TIMES_ROUNDING = {"states": 1e-4, "gradients": 1e-3}, 2
EXPORT_TOLERANCE = 1e-4  # of the exported program from the model on the same device
ROUNDED_ROWS = 2  # rows of a test set whose ranks may differ by rounding
CPU = torch.device("cpu")

FILES = {1: "original_desen_pretrain.csv", 2: "original_desen_finetune_click_nouserID.csv"}
FIRST = ["--epochs", "1", "--batch_size", "2", "--channels", "32", "--dilations", "1,4"]
CHAIN = {
    "conure_tp_t1.py": FIRST,
    "conure_ret_t1.py": ["--epochs", "1"],
    "conure_tp_t2.py": ["--epochs", "2", "--batch_size", "32", "--learning_rate", "1e-3"],
    "conure_ret_t2.py": ["--epochs", "2", "--batch_size", "32", "--learning_rate", "1e-3"],
}


class Check(NamedTuple):
    name: str
    ok: bool
    detail: dict[str, Any]


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the expected norm; infinite if a value is not finite."""
    found, expected = found.detach().cpu(), expected.detach().cpu()
    return float(((found - expected).norm() / expected.norm()).nan_to_num(torch.inf))


def agreement(device: torch.device, shape: Hyperparameters) -> Iterator[Check]:
    """Hidden states and the gradients of all parameters for one batch, compared with float32 on the CPU.

    The tolerance of bfloat16 is a multiple of the difference of bfloat16 on the CPU. Task 2 has an update, a readout
    and two targets a user.
    """
    later = {"task": 2, "lora_rank": 4, "readout_rank": 4, "per_user": 2, "targets": shape.items}
    for each in (shape, replace(shape, **later)):
        yield from agreement_of_task(device, each)


def agreement_of_task(device: torch.device, shape: Hyperparameters) -> Iterator[Check]:
    model = train_step.make_model(shape).to(CPU)
    for low_rank in (*model.updates.values(), *(readout.table for readout in model.readouts.values())):
        torch.nn.init.normal_(low_rank.rows, std=0.1)  # they start at zero, where the axes have no gradient
    batch = train_step.random_batch(shape, shape.length - 1)
    shapes = {precision: replace(shape, precision=precision) for precision in ("float32", "bfloat16")}
    here = {name: states_and_gradients(copy.deepcopy(model), each, batch) for name, each in shapes.items()}
    model.to(device)
    for precision, each in shapes.items():
        there = states_and_gradients(copy.deepcopy(model), each, batch)
        for what, tolerance in TOLERANCES.items():
            expected = here["float32"][what]
            differences = list(map(relative, there[what], expected))
            rounding = list(map(relative, here[precision][what], expected))
            ok = all(own <= tolerance + TIMES_ROUNDING * cpus for own, cpus in zip(differences, rounding))
            detail = {"difference": max(differences), "difference_of_cpu": max(rounding), "tensors": len(expected)}
            yield Check(f"agreement_task_{shape.task}_{precision}_{what}", ok, detail)


def states_and_gradients(model: NextItNet, shape: Hyperparameters, batch: Batch) -> dict[str, list[Tensor]]:
    stage, device, precision = Stage(shape.task, "tp"), next(model.parameters()).device, getattr(torch, shape.precision)
    trained = model.train_only(stage)
    generator = torch.Generator().manual_seed(10)  # on the CPU, so that both devices get the same negatives
    Objective(train_step.make_loss(shape, batch), model, stage, generator, precision)(batch).backward()
    with torch.no_grad(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        inputs = batch.inputs.to(device)
        states = model(inputs, stage) if shape.task == 1 else model.user_representation(inputs, stage)
    return {"states": [states.float()], "gradients": [parameter.grad for parameter in trained]}


@torch.no_grad()
def export(device: torch.device, shape: Hyperparameters) -> Iterator[Check]:
    """The exported program of tasks 1 and 2, saved, loaded and moved to the device, compared with the model there."""
    for task in (1, 2):
        model = train_step.make_model(replace(shape, task=task)).to(CPU).eval()
        file = io.BytesIO()
        torch.export.save(program_of(model, task, shape.length - 1), file)
        file.seek(0)
        program = move_to_device_pass(torch.export.load(file), device).module()
        ids = torch.randint(1, shape.items, (5, shape.length - 1), device=device)
        users, scores = program(ids)
        expected_users, expected_scores = Program(model.to(device), task)(ids)
        worst = max(relative(users, expected_users), relative(scores[:, 1:], expected_scores[:, 1:]))
        yield Check(f"export_task_{task}", worst <= EXPORT_TOLERANCE, {"difference": worst})


def scripts(device: torch.device, users: int) -> Iterator[Check]:
    """Trains tasks 1 and 2 on demo data, and task 1 once more in a run that is killed and resumed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("-m", "Data.make_demo", "--output_dir", str(folder), "--users", str(users), "--length", "20")
        for script, settings in CHAIN.items():
            run(*command(script, folder, "chain", device), *settings)
        yield from chain(folder / "chain", device)
        yield resume(folder, device)


def command(script: str, folder: Path, name: str, device: torch.device) -> list[str]:
    """A script on the data in `folder`, with checkpoints and index in folder/name."""
    places = {
        "data_path": folder / FILES[int(script[-4])],
        "index_path": folder / name / "index.csv",
        "checkpoint_dir": folder / name,
        "device": device.type,
    }
    return [script, *(str(part) for flag, value in places.items() for part in (f"--{flag}", value))]


def run(*arguments: str) -> str:
    """Runs Python and returns its output; RuntimeError with the last of it if it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def chain(folder: Path, device: torch.device) -> Iterator[Check]:
    """Task 1 after task 2, compared with task 1 when it was learned: its weights, all that it reads, its scores."""
    contents = [checkpoint.load(str(folder / f"ret_t{task}.pt"))[0] for task in (1, 2)]
    before, after = map(checkpoint.build_model, contents)
    owned = changed = others = 0
    for layer, later in zip(pruning.owned_weights(before), pruning.owned_weights(after)):
        differs, own = layer.weight != later.weight, layer.owner == 1
        owned += int(own.sum())
        changed += int((differs | (later.owner != 1))[own].sum())
        others += int(differs[~own].sum())
    detail = {"owned": owned, "changed": changed, "changed_of_others": others}
    yield Check("owned_weights_bit_identical", owned > 0 and changed == 0 and others > 0, detail)
    prints = [fingerprints(model, content)[1] for model, content in zip((before, after), contents)]
    yield Check("all_that_task_1_reads_bit_identical", prints[0] == prints[1], {"fingerprint": prints[1][:12]})
    scores = rescoring.score(1, contents[1], after, "", device)
    recorded = contents[1]["tasks"][1]["results"]["ret"]["test"]
    difference = max(abs(scores[name] - recorded[name]) for name in recorded)
    detail = {"difference": difference, "n": recorded["n"]}
    yield Check("task_1_scores_as_recorded", difference <= ROUNDED_ROWS / recorded["n"], detail)


def resume(folder: Path, device: torch.device) -> Check:
    """tp of task 1, killed and resumed, equals an uninterrupted run, bit for bit."""
    again = [*command("conure_tp_t1.py", folder, "killed", device), *FIRST, "--snapshot_minutes", "1e-9"]
    kill_after_snapshots(again, folder / "killed" / "tp_t1.snapshot.pt", 3)
    resumed_at = re.search(r"resuming from .*: step (\d+)", run(*again))
    untouched, resumed = (checkpoint.load(str(folder / n / "tp_t1.pt"))[0]["model"] for n in ("chain", "killed"))
    changed = sum(not torch.equal(resumed[name], value) for name, value in untouched.items())
    detail = {"at_step": resumed_at[1] if resumed_at else "none", "changed_tensors": changed}
    return Check("resume", resumed_at is not None and changed == 0, detail)


def kill_after_snapshots(arguments: list[str], snapshot: Path, count: int) -> None:
    """Starts a script and kills it after `count` snapshots."""
    process, seen = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL), set()
    while len(seen) < count and process.poll() is None:
        with suppress(FileNotFoundError):  # not yet written
            seen.add(snapshot.stat().st_mtime_ns)
        time.sleep(0.002)
    process.kill()
    process.wait()
