"""The model at the start of a stage, and the initialisation of a new task's head."""

from conure import checkpoint, spectral
from conure.errors import InputError
from conure.ranking import EVALUATION_BATCH, ModelScorer, Ranker, recurring
from conure.stage_files import StageFiles

import numpy as np
import torch
from torch import Tensor

import pruning
from data_loader import TaskData
from nextitnet import NextItNet
from pruning import Stage

EXAMPLES_TO_COMPARE = 2048  # training examples that `inform` ranks
TIED_UP_TO = 0.1  # share of recurring items; a tied head starts by predicting that the last item recurs
SPECTRAL_IDS = 1 << 24  # items of training rows that are counted; of TTL a seventh, which take two minutes on 2 cores
SPECTRAL_DEVIATION = 0.06  # of the item embedding; 0.04 was as good
INFORMED_DEVIATION = 0.5  # of a readout, relative to last hidden states, where targets rarely recur
HALVED = np.log(2)  # difference of mean log ranks that halves the geometric mean rank


def initial_model(files: StageFiles, device: torch.device, of_classes: bool, resumes: bool) -> tuple[NextItNet, bool]:
    """The model as the stage before left it, with a new head in tp; for the first stage a new model.

    Returns it, and whether its head is initialised from task 1's rows. If the stage `resumes`, a snapshot will replace
    the weights, and the spectral initialisation is left out. InputError if a layer has no free weight.
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
        channels = model.architecture["channels"]
        if hp.lora_rank:
            model.add_update(task, min(hp.lora_rank, channels))
        if hp.readout_rank:
            model.add_readout(task, min(hp.readout_rank, channels))
    model.to(device)
    if files.before is None and hp.spectral and not resumes:
        spectral_embedding(model, data)
    model.dropout.p = hp.dropout
    if mode == "ret":
        informed = files.tasks[task]["informed"]
    else:
        informed = task > 1 and hp.informed_head and inform(model, data, files.stage, device, of_classes)
        if informed and hp.readout_rank:
            # A small deviation regularises, but learns too slowly where targets recur and so are easy to predict.
            deviation = INFORMED_DEVIATION if recurring(data) <= TIED_UP_TO else 1.0
            scale_readout(model, data, files.stage, device, deviation)
    if informed:
        anchor(model, data, task)
    return model, informed


def is_tied(tied: str, first: TaskData) -> bool:
    """The hyperparameter `tied`, where task 1's data decide what `auto` means."""
    return tied == "yes" or (tied == "auto" and recurring(first) <= TIED_UP_TO)


@torch.no_grad()
def spectral_embedding(model: NextItNet, data: TaskData) -> None:
    """Initialises the item embedding by co-occurrence in the training rows; items without a neighbour stay random.

    In tied models task 1's head starts with it.
    """
    weight, examples = model.embedding.weight, data.splits["train"][: SPECTRAL_IDS // data.rows.shape[1]]
    rows = data.rows[np.unique(data.users[examples])]
    print(f"item embedding: spectral, from co-occurrence in {len(rows):,} rows")
    ignored = [0, data.padding_id] if data.padding_id >= 0 else [0]
    vectors = spectral.leading_eigenvectors(rows, *weight.shape, ignored, weight.device)
    found = vectors.any(dim=1)
    # Columns have norm 1, so this sets the root mean square of the elements.
    weight[found, : vectors.shape[1]] = SPECTRAL_DEVIATION * found.sum().sqrt() * vectors[found]


def check_capacity(model: NextItNet, task: int, ratios: list[float]) -> None:
    """Prints how many weights are free and how many the task will keep; InputError if a layer has no free weight.

    `ratios` are the prune ratios of tasks 1..task.
    """
    free, kept = zip(*(pruning.budget(layer, ratios) for layer in pruning.owned_weights(model)))
    total = sum(layer.owner.numel() for layer in pruning.owned_weights(model))
    if not all(free):
        raise InputError(
            f"no free weights are left for task {task} in {free.count(0)} of {len(free)} conv layers: start again at "
            f"task 1 in another --checkpoint_dir, with --prune_ratio {1 - 1 / task:.2f} or more, or more --channels"
        )
    share = sum(free) / total
    print(
        f"capacity: {sum(free):,} of {total:,} conv weights are free ({share:.2%}); after pruning, task {task} keeps "
        f"{sum(kept):,} of them"
    )


@torch.no_grad()
def scale_readout(model: NextItNet, data: TaskData, stage: Stage, device: torch.device, deviation: float) -> None:
    """Sets the readout's deviation relative to that of the last hidden states, for which task 1's rows were trained."""
    rows = data.users[data.splits["train"][:EVALUATION_BATCH]]
    states = model.eval()(torch.from_numpy(data.rows[rows]).long().to(device), stage, last_only=True)[:, 0]
    model.readouts[str(stage.task)].scale.fill_(deviation * states.std(dim=1, correction=0).mean())


def items_of_targets(data: TaskData) -> Tensor:
    """(targets,) int64: the item id of each target's token, 0 if it is no item."""
    return torch.from_numpy(data.items.look_up(data.target_vocabulary.tokens)).long()


@torch.no_grad()
def anchor(model: NextItNet, data: TaskData, task: int) -> None:
    """Sets what L2-SP pulls the head towards: task 1's rows, and zeros for targets that are no items."""
    rows = model.head(1).weight
    items = items_of_targets(data).to(rows.device)
    model.anchors[task] = torch.where(items[:, None] > 0, rows[items], 0.0)


@torch.no_grad()
def inform(model: NextItNet, data: TaskData, stage: Stage, device: torch.device, of_classes: bool) -> bool:
    """Initialises the task's head from task 1's rows of its targets, or at random with a bias of log frequencies.

    Classes are no items, whatever their tokens. Prints the decision, and returns whether the head has task 1's rows.
    """
    head, size = model.head(stage.task), len(data.target_vocabulary)
    random, ids = head.weight.clone(), items_of_targets(data).to(device)
    known = (ids > 0).nonzero().squeeze(1)
    found = f"{len(known):,} of {size - 1:,} targets are items of task 1"
    if not of_classes and rows_fit(model, data, stage, device, ids, known):
        print(f"head: initialised from task 1's rows ({found})")
        return True
    model.add_head(stage.task, size, bias=True)
    head = model.head(stage.task).to(device)
    head.weight.copy_(random)
    frequency = data.target_counts() + 1
    head.bias.copy_(torch.from_numpy(np.log(frequency / frequency.mean())))
    reason = f"{found}, but task 1's rows rank them no better than shuffled rows" if len(known) else found
    print(f"head: random, bias from {'class frequencies' if of_classes else f'target frequencies ({reason})'}")
    return False


def rows_fit(model: NextItNet, data: TaskData, stage: Stage, device: torch.device, ids: Tensor, known: Tensor) -> bool:
    """Gives the `known` targets task 1's rows of their items `ids`, and tells whether these rank training targets well.

    They must halve the (geometric) mean rank that the same rows give if shuffled; they do not if the two tasks use a
    token for different things.
    """
    examples = data.splits["train"][:EXAMPLES_TO_COMPARE]
    ranker = Ranker(ModelScorer(model, data, stage, device), data)
    rows, log_ranks = model.head(1).weight[ids[known]], []
    for order in (torch.randperm(len(known)).to(device), slice(None)):
        model.head(stage.task).weight[known] = rows[order]
        log_ranks.append(np.log(ranker.rank(examples)[0]))
    return bool(log_ranks[1].mean() <= log_ranks[0].mean() - HALVED)
