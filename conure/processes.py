"""One process, or several that torchrun started: shards of a batch, sums of gradients, and the process that writes.

Every process reads the same data and draws the same batches and, on GPUs of one kind, the same negatives. Each
computes its shard of every batch.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from conure.errors import InputError

import torch
import torch.distributed as dist
from torch import Tensor, nn

TABLE = 1 << 20  # elements; larger gradients are summed by rows, smaller ones in one buffer


class Shard(NamedTuple):
    """The part of a batch that a process computes: number 0, 1, … of `count` contiguous parts of nearly equal size."""

    number: int = 0
    count: int = 1

    def of(self, batch: Tensor) -> Tensor:
        """The part. With fewer examples than processes it is empty in the last ones, but never in the first."""
        return batch.tensor_split(self.count)[self.number]


def own_shard() -> Shard:
    return Shard(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Shard()


def is_main() -> bool:
    """Whether this process is the one that prints and writes files."""
    return own_shard().number == 0


@contextlib.contextmanager
def group(device: str) -> Iterator[None]:
    """Joins torchrun's process group until the block ends; `device` is the hyperparameter."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        wanted, found = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if wanted > found:
            raise InputError(f"--nproc_per_node {wanted} is more than this machine's {found} GPUs: lower it")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
            if not is_main():
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
        wait()  # no process may leave while others still communicate
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise InputError("another process failed, which ends this one too: see its error line") from None
        raise
    finally:
        dist.destroy_process_group()


def total(tensor: Tensor) -> Tensor:
    """Sums `tensor` over all processes in place (all-reduce), and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sums each parameter's gradient over all processes (all-reduce); a missing gradient counts as zeros.

    All processes must pass the same parameters in the same order.
    """
    if own_shard().count == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    small = [gradient for gradient in gradients if gradient.numel() < TABLE]
    if small:
        together = total(torch.cat([gradient.flatten() for gradient in small]))
        for gradient, summed in zip(small, together.split([gradient.numel() for gradient in small])):
            gradient.copy_(summed.view_as(gradient))
    for gradient in gradients:
        if gradient.numel() >= TABLE:  # whole tables would be 1.3 GB a step at TTL's 645,974 items
            sum_rows(gradient)


def sum_rows(gradient: Tensor) -> None:
    """Sums a gradient in place: the rows that any process touched, or all rows if those are more than half."""
    flat = gradient.reshape(len(gradient), -1)
    touched = ((flat.amax(dim=1) != 0) | (flat.amin(dim=1) != 0)).byte()  # any() takes three times as long on a CPU
    dist.all_reduce(touched, dist.ReduceOp.MAX)  # so that all processes take the same branch
    rows = touched.nonzero().squeeze(1)
    if len(rows) > len(gradient) / 2:
        total(gradient)
    else:
        gradient[rows] = total(gradient[rows])


def wait() -> None:
    """Waits until all processes have called it."""
    if dist.is_initialized():
        dist.barrier()
