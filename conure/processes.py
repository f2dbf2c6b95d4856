"""One process, or several that torchrun started: who computes what, who writes, and how they add up.

Every process reads the same data and draws the same numbers; each computes its share of every batch.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from conure.errors import InputError

import torch
import torch.distributed as dist
from torch import Tensor


class Shard(NamedTuple):
    """Which part of a batch a process computes: each `count`-th example from `number` on."""

    number: int = 0
    count: int = 1

    def of(self, batch: Tensor) -> Tensor:
        return batch[self.number :: self.count]


def own_shard() -> Shard:
    return Shard(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Shard()


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return own_shard().number == 0


@contextlib.contextmanager
def group(device: str) -> Iterator[None]:
    """Joins the processes that torchrun started, until the block ends; `device` is the hyperparameter."""
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
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise InputError("another process has ended, and this one with it: the other's own line says why") from None
        raise
    finally:
        dist.destroy_process_group()


def total(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, in each of them; changes `tensor`."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def wait() -> None:
    """Goes on when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()
