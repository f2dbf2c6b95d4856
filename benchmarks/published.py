"""NextItNet as in published PyTorch versions, Conv2d over permuted activations: the baseline of speed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv2dBlock(nn.Module):
    def __init__(self, channels: int, kernel_size: int, dilation: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, (1, kernel_size), dilation=dilation)
        self.ln1 = nn.LayerNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, (1, kernel_size), dilation=2 * dilation)
        self.ln2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.ln1(self.convolve(self.conv1, x)))
        return x + F.relu(self.ln2(self.convolve(self.conv2, inner)))

    def convolve(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C), through (B, C, 1, T)."""
        seen_back = (conv.kernel_size[1] - 1) * conv.dilation[1]
        return conv(F.pad(x.permute(0, 2, 1).unsqueeze(2), (seen_back, 0))).squeeze(2).permute(0, 2, 1)


class Published(nn.Module):
    """Next-item loss of a batch by full softmax at every position."""

    def __init__(self, items: int, channels: int, dilations: tuple[int, ...], kernel_size: int):
        super().__init__()
        self.embedding = nn.Embedding(items, channels)
        self.blocks = nn.Sequential(*(Conv2dBlock(channels, kernel_size, dilation) for dilation in dilations))
        self.head = nn.Linear(channels, items)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        labels = torch.cat([inputs[:, 1:], targets[:, None]], dim=1)
        return F.cross_entropy(self.head(self.blocks(self.embedding(inputs))).flatten(0, 1), labels.flatten())
