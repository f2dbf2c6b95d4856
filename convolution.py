"""Dilated causal convolution as matrix products, at no positions but those that are asked for.

Activations are time-major, (P, B, C) for P positions of the sequence: so where all positions are computed, a tap's
inputs are a block of memory that starts `dilation` positions earlier, and each tap is one matrix product that adds to
the output. Only where positions are left out are inputs copied together.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Places = slice | Tensor  # of positions in an array of activations


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
            elif len(rows):
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
