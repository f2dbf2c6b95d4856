"""The network of SASRec: "Self-Attentive Sequential Recommendation" (Kang & McAuley, ICDM 2018).

It is trained as NextItNet is, so task 1 uses the scripts' sampled softmax in place of the paper's one negative per
position. Item embeddings are not scaled by sqrt(C), because with `table_rate` 10 they then overfit (validation MRR@5
0.032; unscaled 0.045).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextitnet import Dropout
from pruning import OwnedWeight, Stage
from tools.comparisons.networks import Unprotected

LAYERS = 2  # of one attention head each


class Projection(OwnedWeight):
    """x @ weight.T + bias. An owned weight, because stages count those; here it stays free."""

    def __init__(self, channels: int):
        super().__init__(channels, channels)
        nn.init.xavier_uniform_(self.weight)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, stage: Stage) -> Tensor:
        return F.linear(x, self.read(stage), self.bias)


class Layer(nn.Module):
    """y = x + dropout(attention(LN1(x))), then y + dropout(outer(dropout(relu(inner(LN2(y))))))."""

    def __init__(self, channels: int, dropout: Dropout):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query, self.key, self.value = (Projection(channels) for _ in range(3))
        self.inner, self.outer = Projection(channels), Projection(channels)
        self.dropout = dropout

    def forward(self, x: Tensor, stage: Stage, visible: Tensor, wanted: slice) -> Tensor:
        """(B, T, C) → (B, positions `wanted`, C); `visible` (B, T, T) is the attention mask."""
        normed = self.ln1(x)
        query, key, value = self.query(normed[:, wanted], stage), self.key(normed, stage), self.value(normed, stage)
        attended = F.scaled_dot_product_attention(query, key, value, visible[:, wanted])
        x = x[:, wanted] + self.dropout(attended)
        return x + self.dropout(self.outer(self.dropout(F.relu(self.inner(self.ln2(x), stage))), stage))


class SASRec(Unprotected):
    """Shares the item and position embeddings and the heads with NextItNet."""

    def __init__(
        self,
        items: int,
        channels: int,
        dilations: Sequence[int],
        kernel_size: int,
        positions: int = 0,
        tied: bool = True,
        padding: int = -1,
    ):
        """`dilations` and `kernel_size` are NextItNet's and unused; no position attends to the id `padding`."""
        super().__init__(items, channels, (), kernel_size, positions, tied)
        self.architecture |= {"padding": padding}
        self.layers = nn.ModuleList(Layer(channels, self.dropout) for _ in range(LAYERS))
        self.ln = nn.LayerNorm(channels)

    def forward(self, ids: Tensor, stage: Stage, last_only: bool = False) -> Tensor:
        """Hidden states (B, T, C); with `last_only` (B, 1, C)."""
        time, positions = ids.shape[1], self.position.num_embeddings
        places = torch.arange(time, device=ids.device)
        # Positions count from the right, because padding is on the left.
        x = self.dropout(self.embedding(ids) + self.position((places - time + positions).clamp(min=0)))
        causal, itself = places[:, None] >= places, places[:, None] == places
        visible = causal & (ids != self.architecture["padding"])[:, None] | itself  # so that no row of it is empty
        for layer in self.layers:
            last = last_only and layer is self.layers[-1]
            x = layer(x, stage, visible, slice(-1, None) if last else slice(None))
        return self.ln(x)
