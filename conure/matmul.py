"""How matrix products are taken: in which dtype, by which library, and the widest ones in pieces."""

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_COLUMNS = 8192  # of a wide product at once, so that the cache still holds them for what follows


def matmul_dtype(x: Tensor) -> torch.dtype:
    """In which matrix products with `x` are taken: that of autocast if it is on, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, C) @ weight.T (C, S) → (N, S), without gradients; both of one dtype, `weight` with any strides.

    float32 on a CPU goes to oneDNN, which takes half the time of MKL behind torch.mm (docs/speed.md).
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def pieces(x: Tensor, size: int) -> list[slice]:
    """The columns of a product (N, size) with `x`, in pieces that are taken one by one."""
    width = CPU_COLUMNS if x.device.type == "cpu" else size
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x (N, C) @ weight.T (C, S) + bias (S,) → out (N, S), in pieces; without gradients."""
    for columns in pieces(x, len(weight)):
        torch.add(product(x, weight[columns]), 0.0 if bias is None else bias[columns], out=out[:, columns])
