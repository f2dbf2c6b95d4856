"""Scores a task again, from its data file and what a checkpoint recorded."""

import os
from typing import Any

from conure import checkpoint, metrics, ranking
from conure.errors import InputError
from conure.metrics import Protocol, Ranks
from conure.vocabulary import Vocabulary

import torch

import data_loader
from nextitnet import NextItNet


def load_data(task: int, content: dict[str, Any], data_dir: str) -> data_loader.TaskData:
    """The examples that a task was learned from; InputError if the file is missing or has changed.

    The file is expected in `data_dir`, or if that is empty, where `checkpoint.load` found it.
    """
    record, items = content["tasks"][task], Vocabulary.from_tensor(content["items"])
    path = os.path.join(data_dir, os.path.basename(record["data_path"])) if data_dir else record["data_path"]
    if not os.path.exists(path):
        raise InputError(f"{path}, the data of task {task}, does not exist: name its folder with --data_dir")
    if record["data_left_behind"] and not data_dir:
        print(f"the data of task {task} was not copied with the checkpoint: reading {path}")
    split = data_loader.Split(**record["split"])
    if task == 1:
        data = data_loader.load_sequences(path, split, items)
    else:
        targets = Vocabulary.from_tensor(record["targets"])
        data = data_loader.load_examples(path, split, items, targets)
    if data.digest != record["data_digest"]:
        raise InputError(
            f"{path} is not the file that task {task} was learned from, or has changed: name the folder of the right "
            "one with --data_dir"
        )
    return data


def rank(
    task: int, content: dict[str, Any], model: NextItNet, data_dir: str, device: torch.device, split: str = "test"
) -> Ranks:
    """The ranks of a held-out split by the checkpoint's model, which moves to `device`."""
    record, data = content["tasks"][task], load_data(task, content, data_dir)
    stage, protocol = checkpoint.stage_of_state(task, record["state"]), Protocol(**record["protocol"])
    if split == "heldout":
        return ranking.rank_held_out(model.to(device), data, stage, device, protocol)[split]
    return ranking.rank(model.to(device), data, data.splits[split], stage, device, protocol)


def score(
    task: int, content: dict[str, Any], model: NextItNet, data_dir: str, device: torch.device, split: str = "test"
) -> dict[str, float]:
    """The scores of a held-out split, as `rank` ranks it."""
    ranks = rank(task, content, model, data_dir, device, split)
    return metrics.score(ranks, Protocol(**content["tasks"][task]["protocol"]))
