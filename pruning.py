"""Who owns which weight: the owner map, pruning, and the weights that a task reads and trains.

Every conv layer has an owner map, a uint8 tensor of its weight's shape: 0 = free, k = owned by task k. Pruning keeps
the values of free weights, and the next task starts from them. Paper: sections 3.3 (pruning) and 3.4 (retraining),
figure 2.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

FREE = 0
MAX_TASKS = 255  # the largest owner that a uint8 holds


class Stage(NamedTuple):
    """The task and the mode, which decide the weights that are visible and those that are trained."""

    task: int  # from 1
    mode: str  # "tp" (train, then prune), "ret" (retrain) or "inference"


def used_and_trained(owner: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
    """Two boolean masks of `owner`'s shape: weights used in the forward pass, and weights that get a gradient.

    tp of task k uses all weights and trains the free ones. ret uses the weights of tasks 1..k and trains those of task
    k. Inference uses the weights of tasks 1..k and trains none; later tasks cannot change these.
    """
    if stage.mode == "tp":
        return torch.ones_like(owner, dtype=torch.bool), owner == FREE
    used = (owner != FREE) & (owner <= stage.task)
    if stage.mode == "ret":
        return used, owner == stage.task
    return used, torch.zeros_like(used)


class Read(torch.autograd.Function):
    """`Read.apply(weight, used, trained)`: masks the weight by `used`, and its gradient by `trained`."""

    @staticmethod
    def forward(ctx, weight: Tensor, used: Tensor, trained: Tensor) -> Tensor:
        ctx.save_for_backward(trained)
        # Not weight * used: a negative weight times 0 is -0.0, which still shows the sign of a masked weight.
        return torch.where(used, weight, 0.0)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (trained,) = ctx.saved_tensors
        return torch.where(trained, gradient, 0.0), None, None


class OwnedWeight(nn.Module):
    """A conv weight and its owner map: each element is free or owned by one task."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_buffer("owner", torch.zeros(shape, dtype=torch.uint8))

    def read(self, stage: Stage) -> Tensor:
        """The weight with the masks of `stage`: zero where it is not used, no gradient where it is not trained."""
        if stage == Stage(1, "tp"):  # no weight has an owner yet; masking would take 4 % of a step
            return self.weight
        return Read.apply(self.weight, *used_and_trained(self.owner, stage))


def owned_weights(model: nn.Module) -> Iterator[OwnedWeight]:
    return (module for module in model.modules() if isinstance(module, OwnedWeight))


def keep_count(size: int, earlier_ratios: Sequence[float], ratio: float) -> int:
    """How many of a layer's `size` weights a task keeps; `earlier_ratios` are the prune ratios of the tasks before it.

    floor(size * prune_1 * ... * prune_{k-1} * (1 - prune_k)) + 1. In float32, as in the original: float64 may round the
    product to the other side of a whole number.
    """
    kept = np.float32(size)
    for earlier in earlier_ratios:
        kept *= np.float32(earlier)
    return int(np.floor(kept * np.float32(1 - ratio))) + 1


def budget(layer: OwnedWeight, ratios: Sequence[float]) -> tuple[int, int]:
    """How many of the layer's weights are free, and how many of them task k keeps; `ratios` are those of tasks 1..k."""
    free = int((layer.owner == FREE).sum())
    return free, min(keep_count(layer.owner.numel(), ratios[:-1], ratios[-1]), free)


@torch.no_grad()
def prune(model: nn.Module, task: int, ratios: Sequence[float]) -> None:
    """Prunes by magnitude: in each layer `task` becomes the owner of the largest free weights.

    `ratios` are the prune ratios of tasks 1..task. Raises ValueError if the task already owns weights, or if no weight
    is free.
    """
    if not 1 <= task <= MAX_TASKS:
        raise ValueError(f"task {task} cannot own weights: an owner map holds tasks 1 to {MAX_TASKS}")
    if len(ratios) != task:
        raise ValueError(f"pruning task {task} needs {task} prune ratios, one per task so far; got {len(ratios)}")
    for layer in owned_weights(model):
        if (layer.owner == task).any():
            raise ValueError(f"task {task} already owns weights: it was pruned before")
        free, count = budget(layer, ratios)
        if free == 0:
            raise ValueError(f"no free weights are left for task {task}")
        magnitude = torch.where(layer.owner == FREE, layer.weight.abs(), -1.0)
        layer.owner.view(-1)[magnitude.flatten().topk(count).indices] = task


def shares(model: nn.Module) -> dict[int, float]:
    """Owner → its share of all conv weights; owner 0 is the free ones."""
    counts = sum(layer.owner.flatten().bincount(minlength=MAX_TASKS + 1) for layer in owned_weights(model))
    return {owner: count / int(counts.sum()) for owner, count in enumerate(counts.tolist()) if count}
