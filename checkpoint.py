"""Checkpoints: one plain dict per stage, written whole or not at all, from which model and tasks are read back.

    format        number of this layout
    task, stage   which stage wrote it
    architecture  the arguments of NextItNet
    model         state dict: weights, owner maps, heads, on the CPU
    items         the item vocabulary, as one uint8 tensor
    tasks         for each task learned so far: its data, targets, prune ratio, hyperparameters, results
    versions      of Python and the packages
"""

import os
import platform
import re
from typing import Any

import numpy as np
import pandas as pd
import torch

from data_loader import TaskData
from nextitnet import NextItNet
from settings import InputError

FORMAT = 1


def path_of(folder: str, task: int, stage: str) -> str:
    return os.path.join(folder, f"{stage}_t{task}.pt")


def script_of(task: int, stage: str) -> str:
    return f"conure_{stage}_t{task}.py"


def stage_before(task: int, stage: str) -> tuple[int, str]:
    """ret of a task starts from its tp, tp from the ret of the task before."""
    return (task, "tp") if stage == "ret" else (task - 1, "ret")


def newest(folder: str) -> str:
    """The checkpoint in `folder` that is furthest along the chain; InputError if there is none."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    stages = [(int(match[2]), match[1] == "tp", match[0]) for name in names if (match := re.fullmatch(r"(tp|ret)_t(\d+)\.pt", name))]
    if not stages:
        raise InputError(f"{folder} holds no checkpoint: run `python {script_of(1, 'tp')}` first")
    task = max(stages)[0]
    return os.path.join(folder, min((is_tp, name) for number, is_tp, name in stages if number == task)[1])


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "pandas": pd.__version__,
    }


def save(path: str, content: dict[str, Any]) -> None:
    """Writes beside `path`, flushes to disk, then renames: a crash leaves the file as it was before."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        torch.save({"format": FORMAT, "versions": versions(), **content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: str, script: str) -> dict[str, Any]:
    """The checkpoint that `script` writes; InputError, naming the script, if there is none or it cannot be read."""
    again = f"run `python {script}`"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: {again} first, which writes it") from None
    except OSError:
        raise
    except Exception as error:  # what a broken pickle raises depends on where it is broken
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise InputError(f"{path} is not a checkpoint ({reason}): {again} to make it again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this suite (format {FORMAT}): {again} to make it again")
    return content


def build_model(content: dict[str, Any]) -> NextItNet:
    """The model as the checkpoint's stage left it."""
    model = NextItNet(**content["architecture"])
    for task, record in content["tasks"].items():
        if task > 1:
            model.add_head(task, record["target_count"])
    model.load_state_dict(content["model"])
    return model


def check_same_items(path: str, content: dict[str, Any], data: TaskData, index_path: str) -> None:
    """InputError if the checkpoint's item ids are not those of the index that encoded `data`."""
    if not torch.equal(content["items"], data.items.to_tensor()):
        raise InputError(
            f"{path} was made with another vocabulary than {index_path}: "
            f"run `python {script_of(1, 'tp')}` again, or name the right index with --index_path"
        )


def check_same_data(path: str, record: dict[str, Any], data: TaskData, test_fraction: float, script: str) -> None:
    """InputError if the task was learned from other examples than these, or held out others."""
    if record["data_digest"] != data.digest or record["test_fraction"] != test_fraction:
        raise InputError(
            f"{path} was made with other data ({record['data_path']}, test_fraction {record['test_fraction']:g}) than "
            f"{data.path}: run `python {script}` again, or give the data and test_fraction that it had"
        )
