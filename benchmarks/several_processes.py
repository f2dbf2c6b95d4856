"""Time of a data-parallel step of task 1: `python -m benchmarks.several_processes --items 33080`.

Compares processes of one thread each with one process of as many threads, interleaved. The processes exchange either
the gradient rows that the batch touched, or whole tables. Each process has a GPU if there are GPUs.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated
from unittest import mock

from conure import launch, processes, training
from conure.processes import Shard
from conure.settings import Count, Dilations, Range, UpTo1, Width

import torch
import torch.distributed as dist

from benchmarks import bench, train_step
from pruning import Stage


@dataclass
class Hyperparameters:
    items: Annotated[int, Range(3)] = 33_080  # in the catalogue
    batch_size: Count = 32  # sequences of 50 random items a step; a real batch touches fewer rows of the embedding
    channels: Width = 256  # width of the embedding and of every layer
    dilations: Dilations = (1, 4, 1, 4, 1, 4, 1, 4)  # one residual block each
    negative_fraction: UpTo1 = 0.2  # share of the items sampled as negatives in a step; 1: full softmax
    processes: Annotated[int, Range(2)] = 2  # number of processes that share a batch
    steps: Count = 9  # timed steps of each kind; the median is reported
    output: str = ""  # .csv file to add a row to; empty: none


def megabytes_exchanged(step: Callable[[], None]) -> float:
    """MB that this process passes to all_reduce in a step."""
    sizes, all_reduce = [], dist.all_reduce

    def counted(tensor: torch.Tensor, *arguments) -> None:
        sizes.append(tensor.nbytes)
        all_reduce(tensor, *arguments)

    with mock.patch.object(dist, "all_reduce", counted):
        step()
    return sum(sizes) / 1e6


def steppers(hp: Hyperparameters) -> dict[str, Callable[[], None]]:
    """The steps to compare, each ending with a barrier, and one that does not count."""
    copied = ("items", "batch_size", "channels", "dilations", "negative_fraction")
    shape = train_step.Hyperparameters(**{name: getattr(hp, name) for name in copied})
    model, stage = train_step.make_model(shape), Stage(1, "tp")
    batch, trained = train_step.random_batch(shape, shape.length - 1), model.train_only(stage)
    loss = train_step.make_loss(shape, batch)
    adam = training.adam(trained, 1e-4, 0.9)

    def step(shard: Shard) -> None:
        adam.zero_grad()
        # Seeded in each step, because processes run different numbers of steps.
        loss(model, stage, batch, torch.Generator(bench.device()).manual_seed(10), shard).backward()
        if shard.count > 1:
            processes.sum_gradients(trained)
        adam.step()

    def alone() -> None:
        if processes.is_main():
            torch.set_num_threads(hp.processes)
            step(Shard())
            torch.set_num_threads(1)
        processes.wait()

    def by_rows() -> None:
        step(processes.own_shard())
        processes.wait()

    def whole() -> None:
        with mock.patch.object(processes, "sum_rows", processes.total):
            by_rows()

    # While one process works alone, the caches of the others go cold, and their next step takes up to twice as long.
    return {"alone": alone, "uncounted": by_rows, "by_rows": by_rows, "whole": whole}


def main(hp: Hyperparameters) -> int:
    if not launch.by_torchrun():
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={hp.processes}"]
        command = [sys.executable, "-m", *torchrun, "-m", "benchmarks.several_processes", *sys.argv[1:]]
        return subprocess.run(command).returncode
    with processes.group("auto"):
        torch.set_num_threads(1)
        torch.manual_seed(10)  # the same model and batch in every process
        steps = steppers(hp)
        given = {f"{name}_mb": megabytes_exchanged(steps[name]) for name in ("by_rows", "whole")}
        seconds = bench.interleaved(steps, hp.steps)
        del seconds["uncounted"]
        if processes.is_main():
            bench.report(
                "several_processes",
                hp.output,
                **{name: getattr(hp, name) for name in ("items", "batch_size", "channels", "processes")},
                **{f"{name}_seconds": each for name, each in seconds.items()},
                speedup=seconds["alone"] / seconds["by_rows"],
                **given,
                peak_rss_mb=bench.peak_rss_mb(),
            )
    return 0


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
