"""Matrix products: their dtype, the library that computes them, and wide ones in pieces."""

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_COLUMNS = 8192  # of a wide product computed at once, so that they are still in the cache when they are read


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with `x`: autocast's if it is on, otherwise that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, C) @ weight.T (C, S) → (N, S), without gradients; both of one dtype, `weight` with any strides.

    float32 on a CPU uses oneDNN, which takes half the time of torch.mm with MKL (docs/speed.md).
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def pieces(x: Tensor, size: int) -> list[slice]:
    """The columns of a product (N, size) with `x`, in slices to be computed one by one."""
    width = CPU_COLUMNS if x.device.type == "cpu" else size
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x (N, C) @ weight.T (C, S) + bias (S,) → out (N, S), in pieces; without gradients."""
    for columns in pieces(x, len(weight)):
        torch.add(product(x, weight[columns]), 0.0 if bias is None else bias[columns], out=out[:, columns])
