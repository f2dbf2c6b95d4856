"""Checkpoints: one plain dict per stage, written atomically, from which model and tasks are read back.

    format, name  version of this layout, and the file's name
    task, mode    of the stage that wrote it
    identity      what determines the result: hyperparameters, digests of data, vocabulary and the checkpoint before
    lineage       digests of all ancestors, by file name
    architecture  the arguments of NextItNet
    model         state dict on the CPU: weights, owner maps, updates, readouts, heads
    items         the item vocabulary, as one uint8 tensor
    tasks         for each task learned so far: its data, row length, targets, prune ratio, hyperparameters,
                  results, and the fingerprint of everything that it reads
    versions      of Python and the packages

A snapshot has the same layout, with the state of an unfinished stage in place of model and tasks. The last line of
each file is the SHA-256 of all bytes before it, checked before anything is unpickled.

For each task's data a checkpoint stores the absolute path, `data_path`, and the path relative to its own folder,
`data_beside`. `load` replaces the first by the second if that file exists, so a copied project reads its own data.
Otherwise it sets `data_left_behind`.
"""

import os
import platform
import re
import shlex
import sys
from typing import Any

from conure.errors import InputError
from conure.files import CHECKPOINT_NAME, load_sealed, save_sealed, seal_of
from conure.settings import Running

import numpy as np
import pandas as pd
import torch

from nextitnet import NextItNet
from pruning import Stage

FORMAT = 8


def snapshot_of(path: str) -> str:
    """The path of the snapshot beside a stage's checkpoint."""
    return f"{path.removesuffix('.pt')}.snapshot.pt"


def path_of(folder: str, stage: Stage) -> str:
    return os.path.join(folder, f"{stage.mode}_t{stage.task}.pt")


def script_of(stage: Stage) -> str:
    return f"conure_{stage.mode}_t{stage.task}.py"


def check_script(stage: Stage) -> None:
    """InputError if a script of the chain runs that, by its file name, should train another stage."""
    name = os.path.basename(sys.argv[0])
    if re.fullmatch(r"conure_(tp|ret)_t\d+\.py", name) and name != script_of(stage):
        raise InputError(
            f'{name} is to train Stage({stage.task}, "{stage.mode}"): change that in its main, or rename it'
        )


def stage_before(stage: Stage) -> Stage:
    """ret of task k starts from tp of task k, and tp of task k from ret of task k - 1."""
    return Stage(stage.task, "tp") if stage.mode == "ret" else Stage(stage.task - 1, "ret")


def stage_of(path: str) -> Stage | None:
    """The stage of a checkpoint, by its file name; None for any other file, snapshots included."""
    match = re.fullmatch(CHECKPOINT_NAME, os.path.basename(path))
    return Stage(int(match[2]), match[1]) if match and not match[3] else None


def order_of(path: str) -> tuple[int, bool]:
    """Sort key of checkpoint files: their order in the chain."""
    stage = stage_of(path)
    return stage.task, stage.mode == "ret"


def in_folder(folder: str) -> list[str]:
    """The names of the checkpoints in `folder`, in the order of the chain."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(filter(stage_of, names), key=order_of)


def newest(folder: str) -> str:
    """The path of the last checkpoint of the chain in `folder`; InputError if there is none."""
    names = in_folder(folder)
    if not names:
        first = f"python {script_of(Stage(1, 'tp'))}{flag_of(folder)}"
        raise InputError(f"{os.path.abspath(folder)} holds no checkpoint: run `{first}` first")
    return os.path.join(folder, names[-1])


def after(path: str) -> list[str]:
    """The names of the checkpoints in the same folder that come after `path` in the chain, in order."""
    return [name for name in in_folder(os.path.dirname(path)) if order_of(name) > order_of(path)]


def flag_of(folder: str) -> str:
    """The flag that a command in a message needs for this folder; empty for the default folder."""
    return "" if folder == Running.checkpoint_dir else f" --checkpoint_dir {shlex.quote(folder or '.')}"


def commands_to_rerun(names: list[str], folder: str) -> str:
    """For messages: the scripts to run to write these checkpoints of `folder` again."""
    scripts = ", ".join(script_of(stage_of(name)) for name in names)
    return f"run again, in this order, with{flag_of(folder)} --overwrite: {scripts}"


def rerun_advice(path: str) -> str:
    """For messages: the commands that write the checkpoint at `path` again, and all that become stale with it."""
    folder = os.path.dirname(path)
    later = f", then {commands_to_rerun(after(path), folder)}" if after(path) else ""
    return f"run `python {script_of(stage_of(path))}{flag_of(folder)} --overwrite`{later}"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "pandas": pd.__version__,
    }


def save(path: str, content: dict[str, Any]) -> None:
    """Writes a checkpoint or snapshot with its digest. If the disk is full: InputError, and an old file stays."""
    head, folder = {"format": FORMAT, "name": os.path.basename(path), "versions": versions()}, os.path.dirname(path)
    if "tasks" in content:
        records = content["tasks"].items()
        beside = {task: {"data_beside": os.path.relpath(record["data_path"], folder)} for task, record in records}
        content = content | {"tasks": {task: record | beside[task] for task, record in records}}
    save_sealed(path, head | content)


def load_file(path: str, remedy: str) -> tuple[dict[str, Any], str]:
    """Content and digest of a checkpoint or snapshot.

    InputError, ending with `remedy`, if a single bit has changed, or if the file has another format or was renamed.
    """
    content, seal = load_sealed(path)
    if content is None:
        raise InputError(f"{path} is damaged or cut short, or no checkpoint: {remedy}")
    if not {"format", "name", "identity"} <= content.keys():
        raise InputError(f"{path} is another kind of file, no checkpoint: {remedy}")
    if content["format"] != FORMAT:
        raise InputError(f"{path} has format {content['format']}, this version reads {FORMAT}: {remedy}")
    if re.fullmatch(CHECKPOINT_NAME, os.path.basename(path)) and content["name"] != os.path.basename(path):
        raise InputError(f"{path} is a renamed {content['name']}: {remedy}")
    return content, seal


def load(path: str) -> tuple[dict[str, Any], str]:
    """Content and digest of a stage's checkpoint.

    InputError, naming the script to run, if the file is missing, damaged, renamed or a snapshot, or if it is stale: an
    ancestor in the same folder has been replaced since.
    """
    stage, folder = stage_of(path), os.path.dirname(path)
    if not os.path.exists(path):
        command = f"python {script_of(stage)}{flag_of(folder)}" if stage else ""
        first = f"run `{command}` first, which writes it" if stage else "name one that exists"
        raise InputError(f"{path} does not exist: {first}")
    remedy = f"restore a copy, or {rerun_advice(path)}" if stage else "name a checkpoint"
    content, digest = load_file(path, remedy)
    if "tasks" not in content:
        raise InputError(f"{path} is a snapshot, no checkpoint: {remedy}")
    for name, expected in content["lineage"].items():
        ancestor = os.path.join(folder, name)
        if os.path.exists(ancestor):
            with open(ancestor, "rb") as file:
                if seal_of(file) != expected:
                    chain = [*content["lineage"], content["name"]]
                    stale = chain[chain.index(name) + 1 :]
                    raise InputError(
                        f"{path} is stale, as {name} has been replaced since: restore that, or "
                        f"{commands_to_rerun(stale, folder)}"
                    )
    for record in content["tasks"].values():
        beside = os.path.abspath(os.path.join(folder, record["data_beside"]))
        record["data_left_behind"] = not os.path.exists(beside)
        record["data_path"] = record["data_path"] if record["data_left_behind"] else beside
    return content, digest


def refuse_other(path: str, there: dict[str, str], identity: dict[str, str], remedy: str) -> None:
    """InputError, naming the fields, if `there`, the identity of the file at `path`, differs from `identity`.

    A field that is still `auto` in `identity` matches any value.
    """
    differing = [name for name in identity if identity[name] not in (there.get(name), "auto")]
    if differing:
        digests = ("data", "vocabulary", "checkpoint before")
        shown = (f"other {n}" if n in digests else f"{n} {there.get(n)} (now {identity[n]})" for n in differing)
        raise InputError(f"{path} was made with {', '.join(shown)}: {remedy}")


def stage_of_state(task: int, state: str) -> Stage:
    """The stage that scores a task in a state (tp, pruned or ret): before pruning the task reads all weights."""
    return Stage(task, "tp" if state == "tp" else "inference")


def build_model(content: dict[str, Any], network: type[NextItNet] = NextItNet) -> NextItNet:
    """The model as the checkpoint's stage left it; InputError if the weights do not fit the network."""
    model = network(**content["architecture"])
    for task, record in content["tasks"].items():
        if task > 1:
            model.add_head(task, record["target_count"], bias=f"heads.{task}.bias" in content["model"])
        model.add_stored(task, content["model"])
    try:
        model.load_state_dict(content["model"])
    except RuntimeError:
        raise InputError(
            f"{content['name']} holds another network than the scripts train: name another checkpoint"
        ) from None
    return model
