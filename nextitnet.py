"""NextItNet, the dilated causal CNN that all tasks share, and a head for each task.

Backbone: Yuan et al., "A Simple Convolutional Generative Network for Next Item Recommendation" (WSDM 2019), residual
block (b); heads: the Conure paper, section 3.2. Activations are (time, batch, channels) inside the blocks.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from conure.matmul import matmul_dtype

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning import OwnedWeight, Stage

LAYER_NORM_EPS = 1e-8  # the original's ops.py

Places = slice | Tensor  # of positions in an array of activations


def truncated_normal_(weight: Tensor) -> None:
    """Normal of deviation 0.02, redrawn beyond two deviations: the original's start for all but head 1."""
    nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04)


class Connection(NamedTuple):
    """Which input positions each tap of a convolution reads."""

    outputs: int  # how many positions go out
    # For each tap, the oldest first: the first output that it reaches, the others lying before the sequence's start,
    # and the places of the inputs that it reads for the outputs from there on.
    taps: tuple[tuple[int, Places], ...]


class BlockPlan(NamedTuple):
    """The two convolutions of a residual block, and the places of its inputs that are added to its outputs."""

    conv1: Connection
    conv2: Connection
    residual: Places


@lru_cache(maxsize=64)
def plan(
    dilations: tuple[int, ...], kernel_size: int, time: int, last_only: bool, device: torch.device
) -> tuple[Places, list[BlockPlan]]:
    """The positions of a sequence of length `time` that the blocks' output depends on, and how each block reads them.

    The output is all positions, or the last alone: then the upper convolutions run at 1, 3, 7, 15, … positions.
    """
    outputs, blocks = [time - 1] if last_only else list(range(time)), []
    for dilation in reversed(dilations):
        inner = seen_from(outputs, 2 * dilation, kernel_size)
        inputs = seen_from(inner, dilation, kernel_size)
        conv1 = connect(inputs, inner, dilation, kernel_size, device)
        conv2 = connect(inner, outputs, 2 * dilation, kernel_size, device)
        blocks.append(BlockPlan(conv1, conv2, places(outputs, inputs, device)))
        outputs = inputs
    return places(outputs, list(range(time)), device), blocks[::-1]


def seen_from(outputs: list[int], dilation: int, kernel_size: int) -> list[int]:
    """The input positions that a convolution's `outputs` depend on."""
    taps = range(0, kernel_size * dilation, dilation)
    return sorted({position - back for position in outputs for back in taps if position >= back})


def connect(inputs: list[int], outputs: list[int], dilation: int, kernel_size: int, device: torch.device) -> Connection:
    taps = []
    for back in range((kernel_size - 1) * dilation, -1, -dilation):
        read = [position - back for position in outputs if position >= back]
        taps.append((len(outputs) - len(read), places(read, inputs, device)))
    return Connection(len(outputs), tuple(taps))


def places(chosen: list[int], positions: list[int], device: torch.device) -> Places:
    """Where the chosen positions stand among `positions`: a slice where it can be one, as steps of 1 need no copy."""
    place = {position: number for number, position in enumerate(positions)}
    found = [place[position] for position in chosen]
    step = found[1] - found[0] if len(found) > 1 else 1
    if not found:
        return slice(0, 0, 1)
    if found == list(range(found[0], found[-1] + 1, step)):
        return slice(found[0], found[-1] + 1, step)
    return torch.tensor(found, device=device)


class Convolve(torch.autograd.Function):
    """`Convolve.apply(x, weight, connection, dtype)`: x (P, B, C_in), weight (K, C_in, C_out) → (outputs, B, C_out).

    The products are taken in `dtype`; what comes out, the gradients too, has the dtypes of `x` and `weight`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, connection: Connection, dtype: torch.dtype) -> Tensor:
        ctx.connection, ctx.dtypes = connection, (x.dtype, weight.dtype)
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        batch = x.shape[1]
        out = None
        for (first, read), tap in reversed(list(zip(connection.taps, weight))):  # the last tap reaches all outputs
            rows = x[read].reshape(-1, x.shape[2])
            if out is None:
                out = rows @ tap
            elif rows.shape[0]:
                out[first * batch :].addmm_(rows, tap)
        return out.view(connection.outputs, batch, weight.shape[2]).to(ctx.dtypes[0])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        connection, batch = ctx.connection, x.shape[1]
        gradient = gradient.reshape(-1, weight.shape[2]).to(weight.dtype)
        x_gradient = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for number, (first, read) in enumerate(connection.taps):
            reached, transposed = gradient[first * batch :], weight[number].t()
            if x_gradient is not None:
                if isinstance(read, slice) and read.step == 1:
                    x_gradient[read].view(-1, x.shape[2]).addmm_(reached, transposed)
                else:
                    x_gradient[read] += (reached @ transposed).view(-1, batch, x.shape[2])
            if weight_gradient is not None:
                torch.mm(x[read].reshape(-1, x.shape[2]).t(), reached, out=weight_gradient[number])
        x_gradient = None if x_gradient is None else x_gradient.to(ctx.dtypes[0])
        weight_gradient = None if weight_gradient is None else weight_gradient.to(ctx.dtypes[1])
        return x_gradient, weight_gradient, None, None


class CausalConv(OwnedWeight):
    """Dilated convolution that never looks ahead; weight (K, C_in, C_out), tap 0 the oldest; no bias, as it stays 0."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(kernel_size, channels, channels)
        truncated_normal_(self.weight)

    def forward(self, x: Tensor, stage: Stage, connection: Connection) -> Tensor:
        """(P, B, C) → (outputs, B, C)."""
        return Convolve.apply(x, self.read(stage), connection, matmul_dtype(x))


class ResidualBlock(nn.Module):
    """x + dropout(conv2(relu(LN2(conv1(relu(LN1(x))))))); conv1 has the block's dilation, conv2 twice that."""

    def __init__(self, channels: int, kernel_size: int, dropout: nn.Dropout):
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


class NextItNet(nn.Module):
    """Item ids (B, T) → hidden states (B, T, C) → scores over the items or classes of one task.

    `positions` is the number of learned position vectors, 0 for none; inputs longer than that repeat the first one.
    """

    def __init__(self, items: int, channels: int, dilations: Sequence[int], kernel_size: int, positions: int = 0):
        super().__init__()
        self.architecture = {
            "items": items,
            "channels": channels,
            "dilations": list(dilations),
            "kernel_size": kernel_size,
            "positions": positions,
        }
        self.embedding = nn.Embedding(items, channels)
        truncated_normal_(self.embedding.weight)
        self.position = nn.Embedding(positions, channels) if positions else None
        if positions:
            truncated_normal_(self.position.weight)
        self.dropout = nn.Dropout(0.0)  # of items, blocks and hidden states; training sets its probability
        self.blocks = nn.ModuleList(ResidualBlock(channels, kernel_size, self.dropout) for _ in dilations)
        self.heads = nn.ModuleDict()  # by task number, as a string
        self.anchors: dict[int, Tensor] = {}  # by task: where L2-SP pulls the head's weight; not saved
        self.add_head(1, items)

    def add_head(self, task: int, size: int, bias: bool = False) -> None:
        """Softmax weights and bias for task 1; an item or class matrix (size, C) for every later task, or that and a
        bias (size,)."""
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

    def forward(self, ids: Tensor, stage: Stage, last_only: bool = False) -> Tensor:
        """Hidden states (B, T, C); with `last_only` (B, 1, C), and nothing computed that they do not depend on."""
        shape = self.architecture
        positions, blocks = plan(tuple(shape["dilations"]), shape["kernel_size"], ids.shape[1], last_only, ids.device)
        return self.states(ids, stage, positions, blocks).transpose(0, 1)

    def states(self, ids: Tensor, stage: Stage, positions: Places, blocks: list[BlockPlan]) -> Tensor:
        """(outputs, B, C) by a plan; what torch.compile may put in a faster form."""
        x = self.embedding(ids.t()[positions])  # (P, B, C)
        if self.position is not None:
            # Counted from the right, because padding is on the left.
            order = torch.arange(ids.shape[1], device=ids.device) - ids.shape[1] + self.position.num_embeddings
            x = x + self.position(order[positions].clamp(min=0))[:, None]
        x = self.dropout(x)
        for block, block_plan in zip(self.blocks, blocks):
            x = block(x, stage, block_plan)
        return self.dropout(x)

    def user_representation(self, ids: Tensor, stage: Stage) -> Tensor:
        """(B, C): the last hidden state, which has seen the whole sequence."""
        return self(ids, stage, last_only=True)[:, 0]

    def scores(self, ids: Tensor, stage: Stage) -> Tensor:
        """(B, items or classes of the task)."""
        return self.head(stage.task)(self.user_representation(ids, stage))

    def tables(self, task: int) -> set[nn.Parameter]:
        """Parameters with a row per item or class: embedding and task's head. A batch reaches few of the rows."""
        return {self.embedding.weight, *self.head(task).parameters()}

    def train_only(self, stage: Stage) -> list[nn.Parameter]:
        """Lets gradients reach what this stage trains, and returns it.

        Everything in tp of task 1; from then on conv weights and the task's head alone, while embedding and layer
        norms stay as tp of task 1 left them. Which elements of a conv weight learn is the owner map's business.
        """
        everything = stage == Stage(1, "tp")
        trained = set(self.head(stage.task).parameters())
        trained |= {module.weight for module in self.modules() if isinstance(module, CausalConv)}
        for parameter in self.parameters():
            parameter.requires_grad_(everything or parameter in trained)
        return [parameter for parameter in self.parameters() if parameter.requires_grad]
