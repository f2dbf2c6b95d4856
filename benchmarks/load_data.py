"""Throughput of reading a data file: `python -m benchmarks.load_data --rows 1000000 --length 100`.

Writes a file of task 1 with long-tailed item frequencies and reads it in fresh processes.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Annotated

from conure import launch
from conure.settings import Count, Length, Range

import numpy as np

import data_loader
from benchmarks import bench


@dataclass
class Hyperparameters:
    rows: Annotated[int, Range(10)] = 1_000_000  # sequences
    length: Length = 100  # items in each
    items: Annotated[int, Range(3)] = 645_974  # in the catalogue
    path: str = ""  # data file to read; empty: make one
    times: Count = 3  # number of runs; the median is reported
    output: str = ""  # .csv file to add a row to; empty: none


def make_file(path: str, rows: int, length: int, items: int) -> None:
    generator = np.random.default_rng(10)
    with open(path, "w") as file:
        for start in range(0, rows, 20_000):
            uniform = generator.random((min(20_000, rows - start), length))
            ids = (items**uniform).astype(np.int64) * 7919 % items + 1  # frequent ids are scattered over the range
            file.writelines(",".join(row) + "\n" for row in ids.astype(str).tolist())


def read(path: str) -> tuple[float, float, float]:
    """Seconds, bytes of the encoded rows, and peak resident bytes of this process."""
    start = time.perf_counter()
    data = data_loader.load_sequences(path, data_loader.Split(0.2))
    taken = time.perf_counter() - start
    return taken, data.rows.nbytes + data.targets.nbytes, bench.peak_rss_mb() * 1e6


def read_elsewhere(path: str) -> tuple[float, float, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load_data", "--path", path], check=True, stdout=subprocess.PIPE, text=True
    )
    return tuple(map(float, done.stdout.split()))


def main(hp: Hyperparameters) -> None:
    if hp.path:
        print(*read(hp.path))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "task1.csv")
        make_file(path, hp.rows, hp.length, hp.items)
        size = os.path.getsize(path) / 1e6
        taken, arrays, peaks = zip(*(read_elsewhere(path) for _ in range(hp.times)))
    seconds = statistics.median(taken)
    bench.report(
        "load_data",
        hp.output,
        rows=hp.rows,
        length=hp.length,
        items=hp.items,
        file_mb=size,
        seconds=seconds,
        mb_per_s=size / seconds,
        peak_rss_over_array=max(peaks) / arrays[0],
    )


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
