"""The model that a stage starts to train, and what the head of a new task starts from."""

from conure import checkpoint
from conure.errors import InputError
from conure.ranking import ModelScorer, Ranker, recurring
from conure.stage_files import StageFiles

import numpy as np
import torch
from torch import Tensor

import pruning
from data_loader import TaskData
from nextitnet import NextItNet
from pruning import Stage

EXAMPLES_TO_COMPARE = 2048  # of the training part
TIED_UP_TO = 0.1  # share of recurring items: a tied head starts by predicting that the last item comes again
HALVED = np.log(2)  # by how much the mean log rank must be better


def initial_model(files: StageFiles, device: torch.device) -> tuple[NextItNet, bool]:
    """The model as the stage before left it, with a new head in tp; a new one for the first stage.

    Returns the model, and whether its head starts from task 1's. InputError if no weight is left to train.
    """
    hp, data, (task, mode) = files.hp, files.data, files.stage
    if files.before is None:
        positions = data.rows.shape[1] if hp.positional_embedding else 0
        tied = is_tied(hp.tied, data)
        model = files.network(len(data.items), hp.channels, hp.dilations, hp.kernel_size, positions, tied)
        print(f"head of task 1: {'tied to the item embedding' if tied else 'a table of its own'}")
    else:
        model = checkpoint.build_model(files.before, files.network)
    if mode == "tp" and task > 1:
        check_capacity(model, task, files.prune_ratios())
        model.add_head(task, len(data.target_vocabulary))
        if hp.lora_rank:
            model.add_update(task, hp.lora_rank)
    model.to(device)
    model.dropout.p = hp.dropout
    if mode == "ret":
        informed = files.tasks[task]["informed"]
    else:
        informed = task > 1 and hp.informed_head and inform(model, data, files.stage, device)
    if informed:
        anchor(model, data, task)
    return model, informed


def is_tied(tied: str, first: TaskData) -> bool:
    """The hyperparameter, with `auto` decided by task 1's data."""
    return tied == "yes" or (tied == "auto" and recurring(first) <= TIED_UP_TO)


def check_capacity(model: NextItNet, task: int, ratios: list[float]) -> None:
    """Prints how many weights are free for the task, and how many it will keep; InputError if a layer has none.

    `ratios` are the prune ratios of tasks 1 to it.
    """
    free, kept = zip(*(pruning.budget(layer, ratios) for layer in pruning.owned_weights(model)))
    total = sum(layer.owner.numel() for layer in pruning.owned_weights(model))
    if not all(free):
        raise InputError(
            f"no free weights are left for task {task}: {free.count(0)} of {len(free)} conv layers belong to tasks "
            f"1 to {task - 1} entirely, and of {total:,} weights {sum(free):,} are free; begin again at task 1 in "
            f"another --checkpoint_dir, with --prune_ratio {1 - 1 / task:.2f} or higher, which leaves room for {task} "
            "tasks, or more channels"
        )
    share = sum(free) / total
    print(f"capacity: {sum(free):,} of {total:,} conv weights are free ({share:.2%}); it will keep {sum(kept):,}")


def items_of_targets(data: TaskData) -> Tensor:
    """(targets,) int64: the id of the item that has a target's token, 0 if there is none."""
    return torch.from_numpy(data.items.look_up(data.target_vocabulary.tokens)).long()


@torch.no_grad()
def anchor(model: NextItNet, data: TaskData, task: int) -> None:
    """Has training hold the head near task 1's rows, and near 0 where a target is no item."""
    rows = model.head(1).weight
    items = items_of_targets(data).to(rows.device)
    model.anchors[task] = torch.where(items[:, None] > 0, rows[items], 0.0)


@torch.no_grad()
def inform(model: NextItNet, data: TaskData, stage: Stage, device: torch.device) -> bool:
    """Starts the task's head as task 1's where a target's token is an item's, or else with a bias of log frequencies.

    The first if the untrained head then ranks the training part's targets at half the (geometric) mean rank that the
    same rows in another order give them. It does not where tasks use the same tokens for different things, and a start
    from those would be worse than none. Prints what it did, and returns whether it was the first.
    """
    size = len(data.target_vocabulary)
    ids = items_of_targets(data).to(device)
    examples, weight = data.splits["train"], model.head(stage.task).weight
    random, known = weight.clone(), (ids > 0).nonzero().squeeze(1)
    ranker = Ranker(ModelScorer(model, data, stage, device), data)
    rows, log_ranks = model.head(1).weight[ids[known]], []
    for order in (torch.randperm(len(known)).to(device), slice(None)):
        weight[known] = rows[order]
        log_ranks.append(np.log(ranker.rank(examples[:EXAMPLES_TO_COMPARE])[0]))
    found = f"{len(known):,} of {size - 1:,} targets have the token of an item"
    if log_ranks[1].mean() <= log_ranks[0].mean() - HALVED:
        print(f"head: {found}, and start as in task 1")
        return True
    model.add_head(stage.task, size, bias=True)
    head = model.head(stage.task).to(device)
    head.weight.copy_(random)
    frequency = np.bincount(data.targets[examples], minlength=size) + 1
    head.bias.copy_(torch.from_numpy(np.log(frequency / frequency.mean())))
    print(f"head: {found}, whose rows there rank no better than shuffled ones; a bias starts at their log frequencies")
    return False
