"""NextItNet, the dilated causal CNN that all tasks share, with a head for each task and a readout for each later one.

Backbone: Yuan et al., "A Simple Convolutional Generative Network for Next Item Recommendation" (WSDM 2019), residual
block (b). Heads: the Conure paper, section 3.2. Inside the blocks activations are (time, batch, channels).
"""

from collections.abc import Callable, Sequence
from math import gcd
from typing import NamedTuple

from conure.matmul import DilatedConv, Geometry, matmul_dtype

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning import OwnedWeight, Stage, owned_weights

INITIAL_DEVIATION = 0.02  # of weights, except head 1
LAYER_NORM_EPS = 1e-8  # the original's ops.py


def truncated_normal_(weight: Tensor) -> None:
    """Normal initialisation, truncated at two deviations; the original's, except for head 1."""
    nn.init.trunc_normal_(weight, std=INITIAL_DEVIATION, a=-2 * INITIAL_DEVIATION, b=2 * INITIAL_DEVIATION)


class Grid(NamedTuple):
    """Evenly spaced positions of a sequence, up to its last position."""

    count: int
    step: int  # 0 if the last position is the only one

    def places(self, among: "Grid") -> slice:
        """The slice that selects these positions from an array over `among`, whose step must divide theirs."""
        step = max(1, self.step // among.step)
        return slice(among.count - 1 - (self.count - 1) * step, among.count, step)


class BlockPlan(NamedTuple):
    """The geometries of a residual block's two convolutions, and the slice of its input for the skip connection."""

    conv1: Geometry
    conv2: Geometry
    residual: slice


def plan(dilations: Sequence[int], kernel_size: int, time: int, last_only: bool) -> tuple[Grid, list[BlockPlan]]:
    """The grid of input positions that the blocks' output depends on, and a plan for each block.

    The output is every position of a sequence of length `time`, or with `last_only` the last position. In the second
    case the convolutions, from the last one down, compute 1, 3, 7, 15, … positions (with a kernel of 3).
    """
    outputs, blocks = Grid(1, 0) if last_only else Grid(time, 1), []
    for dilation in reversed(dilations):
        inner, conv2 = read_by(outputs, 2 * dilation, kernel_size, time)
        inputs, conv1 = read_by(inner, dilation, kernel_size, time)
        blocks.append(BlockPlan(conv1, conv2, outputs.places(inputs)))
        outputs = inputs
    return outputs, blocks[::-1]


def read_by(outputs: Grid, dilation: int, kernel_size: int, time: int) -> tuple[Grid, Geometry]:
    """The positions that a convolution reads to compute `outputs`, and its geometry on them."""
    step = gcd(outputs.step, dilation)
    wanted = 1 + ((outputs.count - 1) * outputs.step + (kernel_size - 1) * dilation) // step
    inputs = Grid(min(wanted, 1 + (time - 1) // step), step)
    return inputs, Geometry(max(1, outputs.step // step), dilation // step, wanted - inputs.count)


class CausalConv(OwnedWeight):
    """Causal dilated convolution; weight (C_out, K, C_in), tap 0 the oldest. No bias: the original's stays 0."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, kernel_size, channels)
        truncated_normal_(self.weight)

    def forward(self, x: Tensor, stage: Stage, geometry: Geometry) -> Tensor:
        """(P, B, C) → (outputs, B, C)."""
        return DilatedConv.apply(x, self.read(stage), geometry, matmul_dtype(x))


class Dropout(nn.Module):
    """torch.nn.Dropout with a faster mask on a CPU, where torch draws one random number per element."""

    LEVELS = 1 << 16  # values of a 16-bit random number; the dropout probability is exact to 1 / LEVELS

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        return x * self.factors(x)

    def factors(self, x: Tensor) -> Tensor:
        """The factor of each element of x: 0 or 1 / (1 - p). Determined by torch's seed."""
        source = np.random.Generator(np.random.SFC64(int(torch.randint(1 << 62, ()))))
        words = source.integers(1 << 64, size=-(-x.numel() // 4), dtype=np.uint64)
        dropped = min(round(self.p * self.LEVELS), self.LEVELS - 1)
        kept = words.view(np.int16)[: x.numel()] >= dropped - self.LEVELS // 2  # int16 starts at -LEVELS / 2
        return torch.from_numpy(np.multiply(kept, np.float32(1 / (1 - self.p)))).view(x.shape).to(x.dtype)


class ResidualBlock(nn.Module):
    """x + dropout(conv2(relu(LN2(conv1(relu(LN1(x))))))); conv1 has the block's dilation, conv2 twice that."""

    def __init__(self, channels: int, kernel_size: int, dropout: Dropout):
        super().__init__()
        self.ln1 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.conv1 = CausalConv(channels, kernel_size)
        self.ln2 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.conv2 = CausalConv(channels, kernel_size)
        self.dropout = dropout

    def forward(self, x: Tensor, stage: Stage, block_plan: BlockPlan) -> Tensor:
        inner = self.conv1(F.relu(self.ln1(x)), stage, block_plan.conv1)
        outer = self.conv2(F.relu(self.ln2(inner)), stage, block_plan.conv2)
        return x[block_plan.residual] + self.dropout(outer)


class LowRankTable(nn.Module):
    """A table with a row per item, rows (items, rank) @ axes (rank, C). Starts at zero.

    As an update of the item embedding it is a low-rank adaptation (LoRA, Hu et al., ICLR 2022): the embedding itself is
    frozen after task 1.
    """

    def __init__(self, items: int, rank: int, channels: int):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(items, rank))
        self.axes = nn.Parameter(torch.randn(rank, channels))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.rows) @ self.axes  # (…, C)


class Readout(nn.Module):
    """A later task's user representation: `scale` times the layer norm of (last hidden state + sum over the items).

    The last state favours the latest items, as task 1 needs; the sum counts all alike. Padding and separator count too,
    which tells how many items there are.
    """

    def __init__(self, items: int, rank: int, channels: int):
        super().__init__()
        self.table = LowRankTable(items, rank, channels)
        self.register_buffer("scale", torch.ones(()))  # not trained: it would grow, and overfit

    def forward(self, last: Tensor, ids: Tensor) -> Tensor:
        """(B, C), (B, T) → (B, C)."""
        summed = F.embedding(ids, self.table.rows).sum(dim=1) @ self.table.axes
        x = last + summed / ids.shape[1] ** 0.5  # a sum of unrelated rows grows with the root of their number
        return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS) * self.scale


class NextItNet(nn.Module):
    """Item ids (B, T) → hidden states (B, T, C) → scores over the items or classes of one task.

    `positions`: the number of position embeddings, 0 for none. In a longer input all earlier positions share the first.
    `tied`: task 1's head and the item embedding share one weight.
    """

    def __init__(
        self,
        items: int,
        channels: int,
        dilations: Sequence[int],
        kernel_size: int,
        positions: int = 0,
        tied: bool = False,
    ):
        super().__init__()
        self.architecture = {
            "items": items,
            "channels": channels,
            "dilations": list(dilations),
            "kernel_size": kernel_size,
            "positions": positions,
            "tied": tied,
        }
        self.embedding = nn.Embedding(items, channels)
        truncated_normal_(self.embedding.weight)
        self.position = nn.Embedding(positions, channels) if positions else None
        if positions:
            truncated_normal_(self.position.weight)
        self.dropout = Dropout()  # of embeddings, blocks and last states; `initial_model` sets p
        self.blocks = nn.ModuleList(ResidualBlock(channels, kernel_size, self.dropout) for _ in dilations)
        self.compiled: Callable[..., Tensor] | None = None  # `states` by torch.compile, for training only
        self.updates = nn.ModuleDict()  # of the item embedding; the key is the task number as a string
        self.readouts = nn.ModuleDict()  # same keys
        self.heads = nn.ModuleDict()  # same keys
        self.anchors: dict[int, Tensor] = {}  # task → the weight that L2-SP pulls its head towards; not saved
        self.add_head(1, items)
        if tied:
            self.head(1).weight = self.embedding.weight

    def add_head(self, task: int, size: int, bias: bool = False) -> None:
        """Adds the head of a task: a weight (size, C), and for task 1 or with `bias` a bias (size,)."""
        head = nn.Linear(self.architecture["channels"], size, bias=bias or task == 1)
        if task == 1:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.constant_(head.bias, 0.1)
        else:
            truncated_normal_(head.weight)
            if bias:
                nn.init.zeros_(head.bias)
        self.heads[str(task)] = head

    def head(self, task: int) -> nn.Linear:
        return self.heads[str(task)]

    def add_update(self, task: int, rank: int) -> None:
        """Adds a low-rank update of the item embedding: the task trains it, and later tasks read it too."""
        self.updates[str(task)] = LowRankTable(self.architecture["items"], rank, self.architecture["channels"])

    def add_readout(self, task: int, rank: int) -> None:
        """Adds a readout, which the task alone trains and reads."""
        self.readouts[str(task)] = Readout(self.architecture["items"], rank, self.architecture["channels"])

    def add_stored(self, task: int, state: dict[str, Tensor]) -> None:
        """Adds the task's update and readout, if a state dict has them, for load_state_dict to fill."""
        if (axes := state.get(f"updates.{task}.axes")) is not None:
            self.add_update(task, len(axes))
        if (axes := state.get(f"readouts.{task}.table.axes")) is not None:
            self.add_readout(task, len(axes))

    def embedded(self, ids: Tensor, stage: Stage) -> Tensor:
        """Item embeddings (…, C) with the updates of tasks 2..k, for a stage of task k."""
        x = self.embedding(ids)
        for task, update in self.updates.items():
            if int(task) <= stage.task:
                x = x + update(ids)
        return x

    def forward(self, ids: Tensor, stage: Stage, last_only: bool = False) -> Tensor:
        """Hidden states (B, T, C), or with `last_only` (B, 1, C) by computing only what the last one depends on."""
        shape = self.architecture
        if ids.shape[0] == 0:  # the share of a process at a small last batch; conv2d refuses an empty one
            return self.embedding.weight.new_zeros(0, 1 if last_only else ids.shape[1], shape["channels"])
        inputs, blocks = plan(shape["dilations"], shape["kernel_size"], ids.shape[1], last_only)
        states = self.compiled if self.training and self.compiled else self.states
        return states(ids, stage, inputs.places(Grid(ids.shape[1], 1)), blocks).transpose(0, 1)

    def states(self, ids: Tensor, stage: Stage, places: slice, blocks: list[BlockPlan]) -> Tensor:
        """Hidden states (outputs, B, C) at the positions of a plan: `places` in `ids`, then `blocks`."""
        x = self.embedded(ids.t()[places], stage)  # (P, B, C)
        if self.position is not None:
            # Counted from the right, because padding is on the left.
            order = torch.arange(ids.shape[1], device=ids.device) - ids.shape[1] + self.position.num_embeddings
            x = x + self.position(order[places].clamp(min=0))[:, None]
        x = self.dropout(x)
        for block, block_plan in zip(self.blocks, blocks):
            x = block(x, stage, block_plan)
        return self.dropout(x)

    def user_representation(self, ids: Tensor, stage: Stage) -> Tensor:
        """(B, C): the task's readout, or if it has none the last hidden state, the one that depends on all items."""
        last, task = self(ids, stage, last_only=True)[:, 0], str(stage.task)
        return self.readouts[task](last, ids) if task in self.readouts else last

    def scores(self, ids: Tensor, stage: Stage) -> Tensor:
        """(B, items or classes of the task)."""
        return self.head(stage.task)(self.user_representation(ids, stage))

    def own(self, task: int) -> set[nn.Parameter]:
        """Parameters that the task owns as a whole: its head, and its update and readout if it has them."""
        groups = (self.heads, self.updates, self.readouts)
        modules = (group[str(task)] for group in groups if str(task) in group)
        return {parameter for module in modules for parameter in module.parameters()}

    def tables(self, task: int) -> set[nn.Parameter]:
        """Item embedding and what the task owns as a whole, mostly tables whose rows a batch seldom touches."""
        return {self.embedding.weight, *self.own(task)}

    def trained(self, stage: Stage) -> set[nn.Parameter]:
        """Parameters that the stage trains: in tp of task 1 all, later the conv weights and the task's own, but not the
        item embedding, nor a head tied to it.

        Within a conv weight the owner map decides which elements get a gradient.
        """
        if stage == Stage(1, "tp"):
            return set(self.parameters())
        convs = {layer.weight for layer in owned_weights(self)}
        return (self.own(stage.task) | convs) - {self.embedding.weight}

    def train_only(self, stage: Stage) -> list[nn.Parameter]:
        """Sets `requires_grad` for what the stage trains, and clears it for all else.

        Returns the former in the order of `parameters()`, in which a snapshot stores them.
        """
        trained = self.trained(stage)
        for parameter in self.parameters():
            parameter.requires_grad_(parameter in trained)
        return [parameter for parameter in self.parameters() if parameter in trained]
