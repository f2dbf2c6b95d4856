"""Checkpoints: one plain dict per stage, written whole or not at all, from which model and tasks are read back.

    format, name  number of this layout, and the file's name
    task, mode    of the stage that wrote it
    identity      what made it what it is: hyperparameters, digests of data, vocabulary and the checkpoint before
    lineage       digests of all checkpoints that it goes back to, by file name
    architecture  the arguments of NextItNet
    model         state dict: weights, owner maps, heads, on the CPU
    items         the item vocabulary, as one uint8 tensor
    tasks         for each task learned so far: its data, length of rows, targets, prune ratio, hyperparameters, results
    versions      of Python and the packages

A snapshot is a file of the same kind, with the state of a stage that is under way in place of model and tasks. The
last line of each file is the SHA-256 of all bytes before it, checked before anything is unpickled.
"""

import os
import platform
import re
from typing import Any

from conure.errors import InputError
from conure.files import load_sealed, save_sealed, seal_of

import numpy as np
import pandas as pd
import torch

from nextitnet import NextItNet
from pruning import Stage

FORMAT = 3
NAME = r"(tp|ret)_t([1-9]\d*)\.(snapshot\.)?pt"  # of a checkpoint or a snapshot; copies may be called anything else


def snapshot_of(path: str) -> str:
    """The snapshot beside a stage's checkpoint."""
    return f"{path.removesuffix('.pt')}.snapshot.pt"


def path_of(folder: str, stage: Stage) -> str:
    return os.path.join(folder, f"{stage.mode}_t{stage.task}.pt")


def script_of(stage: Stage) -> str:
    return f"conure_{stage.mode}_t{stage.task}.py"


def stage_before(stage: Stage) -> Stage:
    """ret of a task starts from its tp, tp from the ret of the task before."""
    return Stage(stage.task, "tp") if stage.mode == "ret" else Stage(stage.task - 1, "ret")


def stage_of(path: str) -> Stage | None:
    """The stage whose checkpoint has this file name; None if it is no checkpoint's."""
    match = re.fullmatch(NAME, os.path.basename(path))
    return Stage(int(match[2]), match[1]) if match and not match[3] else None


def order_of(path: str) -> tuple[int, bool]:
    """Sorts checkpoint files along the chain."""
    stage = stage_of(path)
    return stage.task, stage.mode == "ret"


def in_folder(folder: str) -> list[str]:
    """The names of the checkpoints in `folder`, along the chain."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(filter(stage_of, names), key=order_of)


def newest(folder: str) -> str:
    """The checkpoint in `folder` that is furthest along the chain; InputError if there is none."""
    names = in_folder(folder)
    if not names:
        raise InputError(f"{folder} holds no checkpoint: run `python {script_of(Stage(1, 'tp'))}` first")
    return os.path.join(folder, names[-1])


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "pandas": pd.__version__,
    }


def save(path: str, content: dict[str, Any]) -> None:
    """Writes a checkpoint or snapshot with its digest; InputError, and the file as it was, if the disk is full."""
    head = {"format": FORMAT, "name": os.path.basename(path), "versions": versions()}
    save_sealed(path, head | content)


def load_file(path: str, remedy: str) -> tuple[dict[str, Any], str]:
    """Content and digest of a checkpoint or snapshot.

    InputError, with the remedy, if a single bit is not as it was written, or if it was written under another name.
    """
    content, seal = load_sealed(path)
    if content is None:
        raise InputError(f"{path} is damaged or cut short, or was never a checkpoint of this suite: {remedy}")
    if content["format"] != FORMAT:
        raise InputError(f"{path} has format {content['format']}, this version reads {FORMAT}: {remedy}")
    if re.fullmatch(NAME, os.path.basename(path)) and content["name"] != os.path.basename(path):
        raise InputError(f"{path} was written as {content['name']}: {remedy}")
    return content, seal


def load(path: str) -> tuple[dict[str, Any], str]:
    """Content and digest of a stage's checkpoint.

    InputError, naming the script to run, if it does not exist, is damaged, is another stage's, or goes back to a
    checkpoint in the same folder that has been replaced since.
    """
    stage = stage_of(path)
    script = f"run `python {script_of(stage)}" if stage else None
    if not os.path.exists(path):
        raise InputError(
            f"{path} does not exist: " + (f"{script}` first, which writes it" if stage else "name one that does")
        )
    content, digest = load_file(path, f"{script} --overwrite`" if stage else "name another one")
    for name, expected in content["lineage"].items():
        ancestor = os.path.join(os.path.dirname(path), name)
        if os.path.exists(ancestor):
            with open(ancestor, "rb") as file:
                if seal_of(file) != expected:
                    raise InputError(
                        f"{path} goes back to another {name} than the one there now: put that back, or run the "
                        "scripts after it again with --overwrite"
                    )
    return content, digest


def stage_of_state(task: int, state: str) -> Stage:
    """The stage as which a task is scored in a state, tp, pruned or ret: before pruning it may read all weights."""
    return Stage(task, "tp" if state == "tp" else "inference")


def build_model(content: dict[str, Any], network: type[NextItNet] = NextItNet) -> NextItNet:
    """The model as the checkpoint's stage left it."""
    model = network(**content["architecture"])
    for task, record in content["tasks"].items():
        if task > 1:
            model.add_head(task, record["target_count"], bias=f"heads.{task}.bias" in content["model"])
    model.load_state_dict(content["model"])
    return model
