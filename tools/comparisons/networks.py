"""The networks that Conure is compared with, and the joint loss of two tasks."""

from collections.abc import Callable

from conure import losses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data_loader
from data_loader import Batch
from nextitnet import CausalConv, NextItNet
from pruning import Stage

ADAPTER_SHARE = 4  # channels of the network per channel of an adapter


def only_named(model: nn.Module, chosen: Callable[[str], bool]) -> list[nn.Parameter]:
    """Enables gradients for the parameters whose names are `chosen`, disables all others, and returns the former."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Unprotected(NextItNet):
    """Trains everything except the heads of other tasks. It is never pruned, so all weights stay free."""

    def own_heads(self, task: int) -> tuple[str, ...]:
        return (f"heads.{task}.",)

    def train_only(self, stage: Stage) -> list[nn.Parameter]:
        own = self.own_heads(stage.task)
        return only_named(self, lambda name: not name.startswith("heads.") or name.startswith(own))


class Joint(Unprotected):
    """Also trains the head of task 1."""

    def own_heads(self, task: int) -> tuple[str, ...]:
        return (f"heads.{task}.", "heads.1.")

    def tables(self, task: int) -> set[nn.Parameter]:
        return super().tables(1)


class HeadOnly(NextItNet):
    """Trains the head alone."""

    def train_only(self, stage: Stage) -> list[nn.Parameter]:
        return only_named(self, lambda name: name.startswith(f"heads.{stage.task}."))


class Adapter(nn.Module):
    """x + up(relu(down(x))); initially the identity, as `up` starts at zero."""

    def __init__(self, channels: int):
        super().__init__()
        self.down = nn.Linear(channels, channels // ADAPTER_SHARE)
        self.up = nn.Linear(channels // ADAPTER_SHARE, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.relu(self.down(x)))


class Adapted(NextItNet):
    """An adapter behind every convolution: "Parameter-Efficient Transfer from Sequential Behaviors for User Modeling
    and Recommendation" (Yuan et al., SIGIR 2020), serial insertion."""

    def add_head(self, task: int, size: int, bias: bool = False) -> None:
        new = str(task) not in self.heads
        super().add_head(task, size, bias)
        if task > 1 and new:
            for conv in (module for module in self.modules() if isinstance(module, CausalConv)):
                conv.adapter = Adapter(self.architecture["channels"])
                conv.register_forward_hook(lambda conv, _, output: conv.adapter(output))

    def train_only(self, stage: Stage) -> list[nn.Parameter]:
        return only_named(self, lambda name: ".adapter." in name or name.startswith(f"heads.{stage.task}."))


class JointLoss:
    """The task's loss plus that of task 1 on a batch drawn for it."""

    def __init__(self, own: losses.Loss, first: losses.Loss, data: data_loader.TaskData, batch_size: int):
        self.own, self.first, self.data, self.batch_size = own, first, data, batch_size

    def __call__(self, model: NextItNet, stage: Stage, batch: Batch, generator, shard):
        examples = self.data.splits["train"]
        drawn = examples[torch.randint(len(examples), (self.batch_size,), generator=generator).numpy()]
        first = self.first(model, Stage(1, stage.mode), self.data.batch(drawn), generator, shard)
        return self.own(model, stage, batch, generator, shard) + first
