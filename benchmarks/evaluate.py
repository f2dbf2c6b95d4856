"""Throughput of evaluation, which ranks among all items, at TTL's size: `python -m benchmarks.evaluate --rows 4096`."""

import time
from dataclasses import dataclass
from typing import Annotated, Literal

from conure import launch
from conure.ranking import ModelScorer, Ranker
from conure.settings import Dilations, KernelSize, Length, Range, Width
from conure.vocabulary import Vocabulary

import numpy as np
import torch

import data_loader
from benchmarks import bench
from nextitnet import NextItNet
from pruning import Stage


@dataclass
class Hyperparameters:
    rows: Annotated[int, Range(10)] = 4096  # held-out rows to rank
    items: Annotated[int, Range(3)] = 645_974  # in the catalogue
    length: Length = 100  # of the sequences in the file, in items; the model reads one less
    channels: Width = 256  # width of the embedding and of every layer
    dilations: Dilations = (1, 4, 1, 4, 1, 4, 1, 4)  # one residual block each
    kernel_size: KernelSize = 3  # taps of every convolution
    leave_out: Literal["nothing", "known"] = "known"  # known: the row's items are no candidates
    output: str = ""  # .csv file to add a row to; empty: none


def make_data(hp: Hyperparameters) -> data_loader.TaskData:
    """Random rows, as the time does not depend on their content."""
    rows = np.random.default_rng(10).integers(1, hp.items, (hp.rows, hp.length), dtype=np.int32)
    vocabulary = Vocabulary()
    return data_loader.TaskData(
        rows=rows[:, :-1],
        users=np.arange(hp.rows),
        targets=rows[:, -1],
        items=vocabulary,
        target_vocabulary=vocabulary,
        splits={"train": np.arange(0)},
    )


def main(hp: Hyperparameters) -> None:
    torch.manual_seed(10)
    model = NextItNet(hp.items, hp.channels, hp.dilations, hp.kernel_size).to(bench.device())
    data, examples = make_data(hp), np.arange(hp.rows)
    ranker = Ranker(ModelScorer(model, data, Stage(1, "inference"), bench.device()), data, hp.leave_out)
    ranker.rank(examples[:256])  # warms up
    start = time.perf_counter()
    ranker.rank(examples)
    seconds = time.perf_counter() - start
    bench.report(
        "evaluate",
        hp.output,
        rows=hp.rows,
        items=hp.items,
        length=hp.length,
        channels=hp.channels,
        seconds=seconds,
        rows_per_s=hp.rows / seconds,
        seconds_for_100000_rows=seconds / hp.rows * 100_000,
        peak_rss_mb=bench.peak_rss_mb(),
    )


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
