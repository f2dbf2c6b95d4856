"""The objective of a stage: a batch's loss, of which each process computes its share."""

from conure import processes
from conure.losses import Loss

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pruning import Stage


class Objective(nn.Module):
    """A process's share of the loss of a batch, as the module that DistributedDataParallel wants."""

    def __init__(self, loss: Loss, model: nn.Module, stage: Stage, generator: torch.Generator, precision: torch.dtype):
        """`generator` draws the negatives, the same ones in all processes."""
        super().__init__()
        self.loss, self.model, self.stage, self.generator = loss, model, stage, generator
        self.precision = precision

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """`inputs` (B, T) and `targets` (B,) of the whole batch, on the CPU."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            return self.loss(self.model, self.stage, inputs, targets, self.generator, processes.own_share())


def average_gradients(objective: Objective) -> nn.Module:
    """The objective, whose backward pass averages the gradients of all processes if there are several."""
    if processes.own_share().count == 1:
        return objective
    return DistributedDataParallel(objective, forward_sync_buffers=False, gradient_as_bucket_view=True)
