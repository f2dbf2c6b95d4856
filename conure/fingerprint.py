"""Fingerprints of what a task reads: if two checkpoints have the same one, the task's outputs are bit-identical on one
machine, whatever else was trained in between."""

import hashlib
from collections.abc import Iterable
from typing import Any

from conure import checkpoint

import torch
from torch import Tensor, nn

import pruning
from nextitnet import NextItNet


def fingerprints(model: NextItNet, content: dict[str, Any]) -> dict[int, str]:
    """The SHA-256 of all that each task in a checkpoint reads; `model` is the checkpoint's."""
    shared, tasks = hashlib.sha256(), {}
    add(shared, shared_by_all(model, content))
    for task, record in content["tasks"].items():
        own = shared.copy()
        add(own, read_by(model, task, record))
        tasks[task] = own.hexdigest()
    return tasks


def shared_by_all(model: NextItNet, content: dict[str, Any]) -> Iterable[Tensor]:
    """What every task reads: the ids of the items, the shape of the network, embedding, positions and layer norms."""
    yield content["items"]
    yield torch.tensor(list(repr(sorted(content["architecture"].items())).encode()), dtype=torch.uint8)
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.LayerNorm)):
            yield from module.parameters()


def read_by(model: NextItNet, task: int, record: dict[str, Any]) -> Iterable[Tensor]:
    """What this task reads besides: the ids of its targets, its head, the embedding's updates by tasks 2..k, and the
    conv weights of tasks 1..k, as numbers and as places; what stands at the other places never reaches it."""
    yield record["targets"]
    yield from model.head(task).parameters()
    for earlier, update in model.updates.items():
        if int(earlier) <= task:
            yield from update.parameters()
    for layer in pruning.owned_weights(model):
        used, _ = pruning.used_and_trained(layer.owner, checkpoint.stage_of_state(task, record["state"]))
        yield used
        yield layer.weight[used]


def add(digest: Any, tensors: Iterable[Tensor]) -> None:
    """Updates a hashlib digest with shapes and bits."""
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().reshape(-1).numpy())
