"""NextItNet, the dilated causal CNN that all tasks share, and a head for each task.

Backbone: Yuan et al., "A Simple Convolutional Generative Network for Next Item Recommendation" (WSDM 2019), residual
block (b); heads: the Conure paper, section 3.2. Activations are (time, batch, channels) inside the blocks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convolution import BlockPlan, Connection, Convolve, Places, plan
from matmul import matmul_dtype
from pruning import OwnedWeight, Reading

LAYER_NORM_EPS = 1e-8  # the original's ops.py


def truncated_normal_(weight: Tensor) -> None:
    """Normal of deviation 0.02, redrawn beyond two deviations: the original's start for all but head 1."""
    nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04)


class CausalConv(OwnedWeight):
    """Dilated convolution that never looks ahead; weight (K, C_in, C_out), tap 0 the oldest; no bias, as it stays 0."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(kernel_size, channels, channels)
        truncated_normal_(self.weight)

    def forward(self, x: Tensor, reading: Reading, connection: Connection) -> Tensor:
        """(P, B, C) → (outputs, B, C)."""
        return Convolve.apply(x, self.read(reading), connection, matmul_dtype(x))


class ResidualBlock(nn.Module):
    """x + dropout(conv2(relu(LN2(conv1(relu(LN1(x))))))); conv1 has the block's dilation, conv2 twice that."""

    def __init__(self, channels: int, kernel_size: int, dropout: nn.Dropout):
        super().__init__()
        self.ln1 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.conv1 = CausalConv(channels, kernel_size)
        self.ln2 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.conv2 = CausalConv(channels, kernel_size)
        self.dropout = dropout

    def forward(self, x: Tensor, reading: Reading, block_plan: BlockPlan) -> Tensor:
        inner = self.conv1(F.relu(self.ln1(x)), reading, block_plan.conv1)
        outer = self.conv2(F.relu(self.ln2(inner)), reading, block_plan.conv2)
        return x[block_plan.residual] + self.dropout(outer)


class NextItNet(nn.Module):
    """Item ids (B, T) → hidden states (B, T, C) → scores over the items or classes of one task.

    `positions` is the number of learned position vectors, 0 for none; inputs longer than that repeat the first one.
    """

    def __init__(self, items: int, channels: int, dilations: Sequence[int], kernel_size: int, positions: int = 0):
        super().__init__()
        self.architecture = dict(
            items=items, channels=channels, dilations=list(dilations), kernel_size=kernel_size, positions=positions
        )
        self.embedding = nn.Embedding(items, channels)
        truncated_normal_(self.embedding.weight)
        self.position = nn.Embedding(positions, channels) if positions else None
        if positions:
            truncated_normal_(self.position.weight)
        self.dropout = nn.Dropout(0.0)  # of items, blocks and hidden states; training sets its share
        self.blocks = nn.ModuleList(ResidualBlock(channels, kernel_size, self.dropout) for _ in dilations)
        self.heads = nn.ModuleDict()  # by task number, as a string
        self.anchors: dict[int, Tensor] = {}  # by task: what its head is held near in training, if not 0; not saved
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

    def forward(self, ids: Tensor, reading: Reading, last_only: bool = False) -> Tensor:
        """Hidden states (B, T, C); with `last_only` (B, 1, C), and nothing computed that they do not depend on."""
        shape = self.architecture
        positions, blocks = plan(tuple(shape["dilations"]), shape["kernel_size"], ids.shape[1], last_only, ids.device)
        return self.states(ids, reading, positions, blocks).transpose(0, 1)

    def states(self, ids: Tensor, reading: Reading, positions: Places, blocks: list[BlockPlan]) -> Tensor:
        """(outputs, B, C) by a plan; what torch.compile may put in a faster form."""
        x = self.embedding(ids.t()[positions])  # (P, B, C)
        if self.position is not None:
            # Counted from the right, because padding is on the left.
            order = torch.arange(ids.shape[1], device=ids.device) - ids.shape[1] + self.position.num_embeddings
            x = x + self.position(order[positions].clamp(min=0))[:, None]
        x = self.dropout(x)
        for block, block_plan in zip(self.blocks, blocks):
            x = block(x, reading, block_plan)
        return self.dropout(x)

    def user_representation(self, ids: Tensor, reading: Reading) -> Tensor:
        """(B, C): the last hidden state, which has seen the whole sequence."""
        return self(ids, reading, last_only=True)[:, 0]

    def scores(self, ids: Tensor, reading: Reading) -> Tensor:
        """(B, items or classes of the task)."""
        return self.head(reading.task)(self.user_representation(ids, reading))

    def tables(self, task: int) -> set[nn.Parameter]:
        """What holds a row for every item or class, of which a batch reaches few: the embedding and the task's head."""
        return {self.embedding.weight, *self.head(task).parameters()}

    def train_only(self, reading: Reading) -> list[nn.Parameter]:
        """Lets gradients reach what this stage trains, and returns it.

        Everything in tp of task 1; from then on conv weights and the task's head alone, while embedding and layer
        norms stay as tp of task 1 left them. Which elements of a conv weight learn is the owner map's business.
        """
        everything = reading == Reading(1, "tp")
        trained = set(self.head(reading.task).parameters())
        trained |= {module.weight for module in self.modules() if isinstance(module, CausalConv)}
        for parameter in self.parameters():
            parameter.requires_grad_(everything or parameter in trained)
        return [parameter for parameter in self.parameters() if parameter.requires_grad]
