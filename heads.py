"""What the head of a new task starts from, as far as its targets are known before training."""

import math

import numpy as np
import torch

import metrics
from data_loader import TaskData
from nextitnet import NextItNet
from pruning import Reading

EXAMPLES_TO_COMPARE = 2048  # of the training part
STANDARD_ERRORS = 3  # by which task 1's rows must rank better than random ones


@torch.no_grad()
def inform(model: NextItNet, data: TaskData, reading: Reading, device: torch.device) -> str:
    """Starts the task's head as task 1's where a target's token is an item's, or else with a bias of log frequencies.

    The first if so the untrained head ranks the training part's targets better than a random one. It does not where
    tasks use the same tokens for different things, and a start from those would be worse than none. Says what it did.
    """
    size = len(data.target_vocabulary)
    ids = torch.from_numpy(data.items.look_up(data.target_vocabulary.tokens)).long().to(device)  # 0: no item
    examples, weight = data.splits["train"], model.head(reading.task).weight
    random, log_ranks = weight.clone(), []
    for start in (random, torch.where((ids > 0)[:, None], model.head(1).weight[ids], random)):
        weight.copy_(start)
        log_ranks.append(np.log(metrics.rank_examples(model, data, examples[:EXAMPLES_TO_COMPARE], reading, device)))
    gain = log_ranks[0] - log_ranks[1]
    known = f"{int((ids > 0).sum()):,} of {size:,} targets have the token of an item"
    if gain.mean() > STANDARD_ERRORS * gain.std() / math.sqrt(len(gain)):
        return f"{known}, and start as in task 1"
    model.add_head(task=reading.task, size=size, bias=True)
    head = model.head(reading.task).to(device)
    head.weight.copy_(random)
    frequency = np.bincount(data.targets[examples], minlength=size) + 1
    head.bias.copy_(torch.from_numpy(np.log(frequency / frequency.mean())))
    return f"{known}, which does not help; a bias starts at their log frequencies"
