"""Who owns which weight: the owner map, pruning, and what a task may read and train.

Every conv layer carries a uint8 map of the weight's own shape: 0 = free, k = owned by task k. Free weights keep their
values, so the next task starts from them. Paper: section 3.3 (pruning), 3.4 (retraining), figure 2.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

FREE = 0
MAX_TASKS = 255  # what a uint8 owner can tell apart


class Stage(NamedTuple):
    """The task and the mode, which decide the weights that are visible and those that are trained."""

    task: int  # from 1
    mode: str  # "tp" (train, then prune), "ret" (retrain) or "inference"


def used_and_trained(owner: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
    """The two boolean masks of `owner`'s shape: weights in the forward pass, and weights that get a gradient.

    tp uses everything and trains what is free; ret uses the weights of tasks 1..k and trains those of task k;
    inference uses the weights of tasks 1..k and trains none, so that no later task can reach it.
    """
    if stage.mode == "tp":
        return torch.ones_like(owner, dtype=torch.bool), owner == FREE
    used = (owner != FREE) & (owner <= stage.task)
    if stage.mode == "ret":
        return used, owner == stage.task
    return used, torch.zeros_like(used)


class Read(torch.autograd.Function):
    """`Read.apply(weight, used, trained)`: zero where it is not used; its gradient zero where it is not trained."""

    @staticmethod
    def forward(ctx, weight: Tensor, used: Tensor, trained: Tensor) -> Tensor:
        ctx.save_for_backward(trained)
        # `where`, not a product: a product with 0 keeps the sign of the hidden weight, and so its trace in the bits.
        return torch.where(used, weight, 0.0)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (trained,) = ctx.saved_tensors
        return torch.where(trained, gradient, 0.0), None, None


class OwnedWeight(nn.Module):
    """A weight whose every element is free or owned by one task."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_buffer("owner", torch.zeros(shape, dtype=torch.uint8))

    def read(self, stage: Stage) -> Tensor:
        """The weight as `stage` may see it: zero where it may not look, no gradient where it may not train."""
        if stage == Stage(1, "tp"):  # nothing is owned yet: spares a step of task 1 the masks, 4 % of its time
            return self.weight
        return Read.apply(self.weight, *used_and_trained(self.owner, stage))


def owned_weights(model: nn.Module) -> Iterator[OwnedWeight]:
    return (module for module in model.modules() if isinstance(module, OwnedWeight))


def keep_count(size: int, earlier_ratios: Sequence[float], ratio: float) -> int:
    """How many of a layer's `size` weights a task takes, when the tasks before it pruned by `earlier_ratios`.

    floor(size * prune_1 * ... * prune_{k-1} * (1 - prune_k)) + 1, in float32 as the original computes it, where the
    product may fall on the other side of a whole number than in float64.
    """
    kept = np.float32(size)
    for earlier in earlier_ratios:
        kept *= np.float32(earlier)
    return int(np.floor(kept * np.float32(1 - ratio))) + 1


def budget(layer: OwnedWeight, ratios: Sequence[float]) -> tuple[int, int]:
    """How many of the layer's weights are free, and how many of those a task takes; `ratios` are of tasks 1 to it."""
    free = int((layer.owner == FREE).sum())
    return free, min(keep_count(layer.owner.numel(), ratios[:-1], ratios[-1]), free)


@torch.no_grad()
def prune(model: nn.Module, task: int, ratios: Sequence[float]) -> None:
    """Gives `task` the free weights of largest magnitude in each layer; `ratios` are those of tasks 1..task.

    Raises ValueError if the task owns weights already, or if nothing is free.
    """
    if not 1 <= task <= MAX_TASKS:
        raise ValueError(f"task {task} cannot own weights: an owner map tells {MAX_TASKS} tasks apart")
    if len(ratios) != task:
        raise ValueError(f"pruning task {task} takes {task} prune ratios, one for each task so far; got {len(ratios)}")
    for layer in owned_weights(model):
        if (layer.owner == task).any():
            raise ValueError(f"task {task} owns weights already: it has been pruned before")
        free, count = budget(layer, ratios)
        if free == 0:
            raise ValueError(f"no free weights are left for task {task}")
        magnitude = torch.where(layer.owner == FREE, layer.weight.abs(), -1.0)
        layer.owner.view(-1)[magnitude.flatten().topk(count).indices] = task


def shares(model: nn.Module) -> dict[int, float]:
    """The fraction of all owned-layer weights that each owner has, free ones (0) included."""
    counts = sum(layer.owner.flatten().bincount(minlength=MAX_TASKS + 1) for layer in owned_weights(model))
    return {owner: count / int(counts.sum()) for owner, count in enumerate(counts.tolist()) if count}
