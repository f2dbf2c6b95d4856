"""Matrix products: their dtype, the library that computes them, wide ones in pieces, and those of a convolution."""

from typing import NamedTuple

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


class Geometry(NamedTuple):
    """Stride, dilation and padding of a convolution that computes only the positions that are needed."""

    stride: int
    dilation: int
    padding: int  # zero positions in front of the input


class DilatedConv(torch.autograd.Function):
    """`DilatedConv.apply(x, weight, geometry, dtype)`: x (P, B, C_in), weight (C_out, K, C_in) → (outputs, B, C_out).

    It multiplies in `dtype`; output and gradients have the dtypes of `x` and `weight`. (P, B, C) is an image
    (1, C, P, B) in channels-last memory, so one torch.conv2d does the work. On a CPU the weight gradient is computed
    tap by tap, in two thirds of the time of oneDNN's.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
        ctx.geometry, ctx.dtypes = geometry, (x.dtype, weight.dtype)
        x, weight = F.pad(x.to(dtype), (0, 0, 0, 0, geometry.padding, 0)), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        out = torch.conv2d(image(x), kernel(weight), stride=(geometry.stride, 1), dilation=(geometry.dilation, 1))
        return out[0].permute(1, 2, 0).to(ctx.dtypes[0])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (x, weight), (stride, dilation, padding) = ctx.saved_tensors, ctx.geometry
        gradient, (of_x, of_weight) = gradient.to(weight.dtype), ctx.needs_input_grad[:2]
        by_taps = x.device.type == "cpu" or x.dtype == torch.float32  # cuDNN's error in float32 is seven times as large
        x_gradient, weight_gradient, _ = torch.ops.aten.convolution_backward(
            *(image(gradient), image(x), kernel(weight), None, (stride, 1), (0, 0), (dilation, 1)),
            *(False, (0, 0), 1, (of_x, of_weight and not by_taps, False)),  # not transposed, one group
        )
        if of_x:
            x_gradient = x_gradient[0].permute(1, 2, 0)[padding:].to(ctx.dtypes[0])
        if of_weight:
            taps = weight.shape[1]
            found = sums_by_tap(gradient, x, taps, stride, dilation) if by_taps else weight_gradient[..., 0].mT
            weight_gradient = found.to(ctx.dtypes[1])
        return x_gradient, weight_gradient, None, None


def sums_by_tap(gradient: Tensor, x: Tensor, taps: int, stride: int, dilation: int) -> Tensor:
    """The weight gradient (C_out, K, C_in), from gradient (outputs, B, C_out) and x (P, B, C_in)."""
    reach = (len(gradient) - 1) * stride + 1
    inputs = (x[first : first + reach : stride] for first in range(0, taps * dilation, dilation))
    columns = gradient.flatten(0, 1).t().contiguous()
    return torch.stack([product(columns, each.flatten(0, 1).t()) for each in inputs], dim=1)


def image(x: Tensor) -> Tensor:
    """(P, B, C) → (1, C, P, B), a view."""
    return x.permute(2, 0, 1)[None]


def kernel(weight: Tensor) -> Tensor:
    """(C_out, K, C_in) → (C_out, C_in, K, 1), a view."""
    return weight.unsqueeze(2).permute(0, 3, 1, 2)
