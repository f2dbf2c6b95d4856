"""The networks that Conure is compared with, and the losses of joint training, replay and distillation."""

from typing import NamedTuple

from conure import losses
from conure.initial_model import items_of_targets

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data_loader
from data_loader import Batch
from nextitnet import CausalConv, NextItNet
from pruning import Stage

ADAPTER_SHARE = 4  # reduction of an adapter's bottleneck: channels of the network per channel of the adapter
TEMPERATURE = 2.0  # of the softmax in distillation, as in Learning without Forgetting


class Unprotected(NextItNet):
    """Trains all weights but what other tasks own. It is never pruned, so all weights stay free."""

    def trained(self, stage: Stage) -> set[nn.Parameter]:
        others = {each for task in self.heads if int(task) != stage.task for each in self.own(int(task))}
        return set(self.parameters()) - others | {self.embedding.weight}  # task 1's head may be tied to it


class AllHeads(NextItNet):
    """Trains all weights, also those that other tasks own."""

    def trained(self, stage: Stage) -> set[nn.Parameter]:
        return set(self.parameters())


class Joint(AllHeads):
    """Task 1 and another task; `table_rate` applies to task 1's tables."""

    def tables(self, task: int) -> set[nn.Parameter]:
        return super().tables(1)


class FrozenHead(NextItNet):
    """Conure with frozen heads where they are initialised from task 1's, so that the task trains no head weights.

    A head without such a start, as gender's, is trained.
    """

    def trained(self, stage: Stage) -> set[nn.Parameter]:
        frozen = self.head(stage.task).parameters() if stage.task in self.anchors else ()
        return super().trained(stage) - set(frozen)


class HeadOnly(NextItNet):
    """Trains what the task owns as a whole: its head, and its update and readout if it has them."""

    def trained(self, stage: Stage) -> set[nn.Parameter]:
        return self.own(stage.task)


class Adapter(nn.Module):
    """x + up(relu(down(x))); initially the identity, as `up` is zero."""

    def __init__(self, channels: int):
        super().__init__()
        self.down = nn.Linear(channels, channels // ADAPTER_SHARE)
        self.up = nn.Linear(channels // ADAPTER_SHARE, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.relu(self.down(x)))


class Adapted(NextItNet):
    """PeterRec: a serial adapter behind every convolution. "Parameter-Efficient Transfer from Sequential Behaviors for
    User Modeling and Recommendation" (Yuan et al., SIGIR 2020)."""

    def add_head(self, task: int, size: int, bias: bool = False) -> None:
        new = str(task) not in self.heads
        super().add_head(task, size, bias)
        if task > 1 and new:
            for conv in (module for module in self.modules() if isinstance(module, CausalConv)):
                conv.adapter = Adapter(self.architecture["channels"])
                conv.register_forward_hook(lambda conv, _, output: conv.adapter(output))

    def trained(self, stage: Stage) -> set[nn.Parameter]:
        adapters = {each for module in self.modules() if isinstance(module, Adapter) for each in module.parameters()}
        return self.own(stage.task) | adapters


@torch.no_grad()
def add_item_head(model: NextItNet, data: data_loader.TaskData, task: int) -> None:
    """Adds a head that scores each target as task 1 scores the item of its token; -inf if there is no such item."""
    model.add_head(task, len(data.target_vocabulary), bias=True)
    items, first, head = items_of_targets(data), model.head(1), model.head(task)
    head.weight.copy_(first.weight[items])
    head.bias.copy_(torch.where(items > 0, first.bias[items], -torch.inf))


class Memory(NamedTuple):
    """Training examples of another task, with its loss and batch size."""

    task: int
    data: data_loader.TaskData
    loss: losses.Loss
    examples: np.ndarray
    batch_size: int


class JointLoss:
    """The task's loss plus the loss of another task, drawn at random, on a batch drawn from its memory."""

    def __init__(self, own: losses.Loss, memories: list[Memory]):
        self.own, self.memories = own, memories

    def __call__(self, model: NextItNet, stage: Stage, batch: Batch, generator, shard):
        task, data, loss, examples, batch_size = self.memories[draw(len(self.memories), 1, generator)[0]]
        drawn = data.batch(examples[draw(len(examples), batch_size, generator)])
        other = loss(model, Stage(task, stage.mode), drawn, generator, shard)
        return self.own(model, stage, batch, generator, shard) + other


def draw(size: int, count: int, generator: torch.Generator) -> np.ndarray:
    """Random numbers below `size`, (count,)."""
    return torch.randint(size, (count,), generator=generator, device=generator.device).cpu().numpy()


class DistilledLoss:
    """The task's loss plus a distillation loss per earlier task, each of weight 1: the cross entropy between its scores
    for the task's inputs and those of the model `before`. "Learning without Forgetting" (Li & Hoiem, ECCV 2016)."""

    def __init__(self, own: losses.Loss, before: NextItNet):
        self.own, self.before = own, before.eval().requires_grad_(False)

    def __call__(self, model: NextItNet, stage: Stage, batch: Batch, generator, shard):
        rows = losses.to_device(shard.of(batch.inputs), model.embedding.weight.device)
        loss = self.own(model, stage, batch, generator, shard)
        for task in range(1, stage.task):
            answers = self.answers(model, rows, task, stage.mode)
            wanted = self.answers(self.before, rows, task, stage.mode).softmax(dim=1)
            loss = loss + F.cross_entropy(answers, wanted, reduction="sum") / len(batch.rows)
        return loss

    def answers(self, model: NextItNet, rows: Tensor, task: int, mode: str) -> Tensor:
        """Logits (R, targets without <UNK>) over the temperature. Task 1's inputs have no separator."""
        seen = rows[:, :-1] if task == 1 else rows
        padded = F.pad(seen, (0, 0, 0, -len(seen) % losses.ENCODED_ROWS))
        return model.scores(padded, Stage(task, mode))[: len(seen), 1:].float() / TEMPERATURE


AnyLoss = losses.Loss | JointLoss | DistilledLoss
