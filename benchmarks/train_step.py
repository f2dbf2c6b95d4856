"""Time of a training step with the original's settings: `python -m benchmarks.train_step --task 1`.

The throughput of a large matrix product is measured in the same process. A multiply-add counts as 2 FLOPs, one with
padding as none. With --compare, baselines are interleaved: for task 1 the published implementation; for later tasks a
step that computes the states of all positions; with dropout the same step without dropout.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from conure import launch, losses, samplers, training
from conure.losses import Objective
from conure.settings import Below1, Count, Dilations, KernelSize, Length, Range, Rank, Task, UpTo1, Width

import numpy as np
import torch
from torch import Tensor

import pruning
from benchmarks import bench
from benchmarks.published import Published
from data_loader import Batch
from nextitnet import Grid, NextItNet, read_by
from pruning import Stage


@dataclass
class Hyperparameters:
    task: Task = 1  # the task to train in tp; 1: next item at every position
    items: Annotated[int, Range(3)] = 3308  # in the catalogue
    targets: Annotated[int, Range(3)] = 3000  # number of targets of each later task
    length: Length = 50  # of the sequences in the file, in items; the model reads one less in task 1, else one more
    batch_size: Count = 32  # examples a step
    per_user: Count = 1  # examples per user in a batch of a later task, which encodes a user once
    channels: Width = 256  # width of the embedding and of every layer
    dilations: Dilations = (1, 4, 1, 4, 1, 4, 1, 4)  # one residual block each
    kernel_size: KernelSize = 3  # taps of every convolution
    negative_fraction: UpTo1 = 0.2  # share of the items sampled as negatives in a step; 1: full softmax
    earlier_items: bool = False  # in task 1: add the items before a position to its negatives
    dropout: Below1 = 0.0  # dropout probability
    lora_rank: Rank = 0  # rank of each later task's LoRA update of the item embedding; 0: none
    readout_rank: Rank = 0  # rank of the item sum in each later task's readout; 0: the last hidden state
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products
    compile: bool = False  # use torch.compile
    steps: Count = 9  # timed steps; the median is reported
    compare: bool = False  # time the baselines too
    output: str = ""  # .csv file to add a row to; empty: none


class FullSequence(NextItNet):
    """Computes the states of all positions and uses the last one."""

    def user_representation(self, ids: Tensor, stage: Stage) -> Tensor:
        return self(ids, stage)[:, -1]


def make_model(hp: Hyperparameters, network: type[NextItNet] = NextItNet) -> NextItNet:
    model = network(hp.items, hp.channels, hp.dilations, hp.kernel_size)
    for learned in range(1, hp.task):
        pruning.prune(model, learned, [0.7] * learned)
        model.add_head(learned + 1, hp.targets)
        if hp.lora_rank:
            model.add_update(learned + 1, hp.lora_rank)
        if hp.readout_rank:
            model.add_readout(learned + 1, hp.readout_rank)
    model.dropout.p = hp.dropout
    return model.to(bench.device())


def make_loss(hp: Hyperparameters, batch: Batch) -> losses.Loss:
    if hp.task == 1:
        negatives = samplers.LogUniformSampler(hp.items, hp.negative_fraction)
        return losses.NextItemLoss(negatives, None, hp.earlier_items)
    known = np.zeros((len(batch.rows), hp.per_user), np.int64)
    known.flat[: hp.batch_size] = batch.targets
    return losses.TargetLoss(known.__getitem__, 0.02)


def random_batch(hp: Hyperparameters, time: int) -> Batch:
    row_of = torch.arange(hp.batch_size) // hp.per_user
    rows = np.arange(int(row_of[-1]) + 1)
    inputs = torch.randint(1, hp.items, (len(rows), time))
    return Batch(rows, inputs, row_of, torch.randint(1, hp.items if hp.task == 1 else hp.targets, (hp.batch_size,)))


def stepper(
    objective: Callable[..., Tensor], trained: list[torch.nn.Parameter], batch: Sequence[Any]
) -> Callable[[], None]:
    """A function that takes one optimiser step."""
    adam = training.adam(trained, 1e-4, 0.9)

    def step() -> None:
        adam.zero_grad()
        objective(*batch).backward()
        adam.step()

    return step


def operations(hp: Hyperparameters, time: int) -> float:
    """FLOPs of a step's matrix products, in the convolutions and the softmax."""
    outputs, products = Grid(1, 0) if hp.task > 1 else Grid(time, 1), 0
    for dilation in (factor * dilation for dilation in reversed(hp.dilations) for factor in (2, 1)):
        inputs, geometry = read_by(outputs, dilation, hp.kernel_size, time)
        taps = (geometry.padding - tap * geometry.dilation for tap in range(hp.kernel_size))
        pairs = sum(max(0, outputs.count - -(-max(0, before) // geometry.stride)) for before in taps)
        products += 3 * pairs
        outputs = inputs
    if hp.task > 1:
        products -= pairs  # the embedding is frozen
    rows, states, scored = hp.batch_size, hp.batch_size * time, max(1, int(hp.items * hp.negative_fraction))
    if hp.task > 1:
        rows = states = -(-hp.batch_size // hp.per_user)
        scored = hp.targets
    return 2 * products * rows * hp.channels**2 + 3 * 2 * states * hp.channels * scored


def megabytes(module: torch.nn.Module) -> float:
    """Size of the module's state dict."""
    return sum(tensor.nbytes for tensor in module.state_dict().values()) / 1e6


def steppers(hp: Hyperparameters, model: NextItNet, time: int) -> dict[str, Callable[[], None]]:
    """Our step and, with --compare, the baselines; all on one batch."""
    stage, precision = Stage(hp.task, "tp"), getattr(torch, hp.precision)
    batch = random_batch(hp, time)
    loss, generator = make_loss(hp, batch), torch.Generator(bench.device()).manual_seed(10)

    def step_of(model: NextItNet) -> Callable[[], None]:
        objective = Objective(loss, model, stage, generator, precision)
        return stepper(objective, model.train_only(stage), [batch])

    steps = {"ours": step_of(model)}
    if hp.compare and hp.dropout:
        plain = copy.deepcopy(model)
        plain.dropout.p = 0.0
        steps["without_dropout"] = step_of(plain)
    if hp.compare and hp.task == 1:
        published = Published(hp.items, hp.channels, hp.dilations, hp.kernel_size).to(bench.device())
        on_device = [each.to(bench.device()) for each in (batch.inputs, batch.targets)]
        steps["published"] = stepper(published, list(published.parameters()), on_device)
    elif hp.compare:
        steps["full"] = step_of(make_model(hp, FullSequence))
    if hp.compile:
        model.compiled = torch.compile(model.states)
    return steps


def main(hp: Hyperparameters) -> None:
    torch.manual_seed(10)
    time = hp.length - 1 if hp.task == 1 else hp.length + 1
    model = make_model(hp)
    steps = steppers(hp, model, time)
    precision = getattr(torch, hp.precision)
    before = bench.matmul_gflops(precision)
    seconds = bench.interleaved(steps, hp.steps)
    after = bench.matmul_gflops(precision)
    rates = {name: max(before[name], after[name]) for name in before}
    gflops = operations(hp, time) / seconds["ours"] / 1e9
    varied = ("task", "items", "length", "batch_size", "per_user", "channels", "negative_fraction", "precision")
    bench.report(
        "train_step",
        hp.output,
        **{name: getattr(hp, name) for name in varied},
        compile=hp.compile,
        seconds_per_step=seconds["ours"],
        gflops=gflops,
        share_of_matmul_peak=gflops / max(rates.values()),
        mm_gflops=rates["mm"],
        product_gflops=rates["product"],
        peak_rss_mb=bench.peak_rss_mb(),
        model_mb=megabytes(model),
        heads_mb=megabytes(model.heads),
        times_published=seconds["published"] / seconds["ours"] if "published" in seconds else "",
        share_of_full_step=seconds["ours"] / seconds["full"] if "full" in seconds else "",
        dropout=hp.dropout,
        times_without_dropout=seconds["ours"] / seconds["without_dropout"] if "without_dropout" in seconds else "",
    )


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
