"""Fingerprints of what a task reads. If a task has the same one in two checkpoints, its outputs are bit-identical on
one machine, whatever was trained in between."""

import hashlib
from collections.abc import Iterable
from typing import Any

from conure import checkpoint

import torch
from torch import Tensor, nn

import pruning
from nextitnet import NextItNet


def fingerprints(model: NextItNet, content: dict[str, Any]) -> dict[int, str]:
    """Task → SHA-256 of everything that it reads; `model` is the one that the checkpoint `content` holds."""
    shared, tasks = hashlib.sha256(), {}
    add(shared, shared_by_all(model, content))
    for task, record in content["tasks"].items():
        own = shared.copy()
        add(own, read_by(model, task, record))
        tasks[task] = own.hexdigest()
    return tasks


def shared_by_all(model: NextItNet, content: dict[str, Any]) -> Iterable[Tensor]:
    """What all tasks read: item ids, architecture, item and position embeddings, layer norms."""
    yield content["items"]
    yield torch.tensor(list(repr(sorted(content["architecture"].items())).encode()), dtype=torch.uint8)
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.LayerNorm)):
            yield from module.parameters()


def read_by(model: NextItNet, task: int, record: dict[str, Any]) -> Iterable[Tensor]:
    """What the task reads besides: target ids, its head and readout, the updates of the embedding by tasks 2..k, and
    the conv weights of tasks 1..k with their positions. It never reads masked weights."""
    yield record["targets"]
    yield from model.head(task).parameters()
    if str(task) in model.readouts:
        yield from model.readouts[str(task)].state_dict().values()
    for earlier, update in model.updates.items():
        if int(earlier) <= task:
            yield from update.parameters()
    for layer in pruning.owned_weights(model):
        used, _ = pruning.used_and_trained(layer.owner, checkpoint.stage_of_state(task, record["state"]))
        yield used
        yield layer.weight[used]


def add(digest: Any, tensors: Iterable[Tensor]) -> None:
    """Updates a hashlib digest with the tensors' shapes and bits."""
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().reshape(-1).numpy())
