"""What the head of a new task starts from, as far as its targets are known before training."""

import numpy as np
import torch
from torch import Tensor

import metrics
from data_loader import TaskData
from nextitnet import NextItNet
from pruning import Reading

EXAMPLES_TO_COMPARE = 2048  # of the training part
HALVED = np.log(2)  # by how much the mean log rank must be better


def items_of_targets(data: TaskData) -> Tensor:
    """(targets,) int64: the id of the item that has a target's token, 0 if there is none."""
    return torch.from_numpy(data.items.look_up(data.target_vocabulary.tokens)).long()


@torch.no_grad()
def start_of(model: NextItNet, task: int, items: Tensor) -> Tensor:
    """(targets, C): where a head began that started as task 1's, by `items_of_targets`; 0 where a row was random, which
    is what that is drawn around. Of another head, which is told by its bias, 0 everywhere."""
    head = model.head(task)
    if head.bias is not None:
        return torch.zeros_like(head.weight)
    items = items.to(head.weight.device)
    return torch.where(items[:, None] > 0, model.head(1).weight[items], 0.0)


@torch.no_grad()
def inform(model: NextItNet, data: TaskData, reading: Reading, device: torch.device) -> str:
    """Starts the task's head as task 1's where a target's token is an item's, or else with a bias of log frequencies.

    The first if the untrained head then ranks the training part's targets at half the (geometric) mean rank that the
    same rows in another order give them. It does not where tasks use the same tokens for different things, and a start
    from those would be worse than none. Says what it did.
    """
    size = len(data.target_vocabulary)
    ids = items_of_targets(data).to(device)
    examples, weight = data.splits["train"], model.head(reading.task).weight
    random, known = weight.clone(), (ids > 0).nonzero().squeeze(1)
    rows, log_ranks = model.head(1).weight[ids[known]], []
    for order in (torch.randperm(len(known), device=device), slice(None)):
        weight[known] = rows[order]
        log_ranks.append(np.log(metrics.rank_examples(model, data, examples[:EXAMPLES_TO_COMPARE], reading, device)))
    found = f"{len(known):,} of {size - 1:,} targets have the token of an item"
    if log_ranks[1].mean() <= log_ranks[0].mean() - HALVED:
        return f"{found}, and start as in task 1"
    model.add_head(reading.task, size, bias=True)
    head = model.head(reading.task).to(device)
    head.weight.copy_(random)
    frequency = np.bincount(data.targets[examples], minlength=size) + 1
    head.bias.copy_(torch.from_numpy(np.log(frequency / frequency.mean())))
    return f"{found}, whose rows rank no better there than shuffled ones; a bias starts at the targets' log frequencies"
