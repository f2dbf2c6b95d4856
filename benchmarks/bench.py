"""Shared by the benchmarks: output, interleaved timing, the machine's name and its matrix-product throughput."""

import datetime
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conure.device import pick_device
from conure.errors import InputError
from conure.files import whole_file
from conure.matmul import product

import pandas as pd
import torch

WARM_UP = 3  # untimed calls
ABOUT_THE_RUN = ("date", "machine", "torch")  # columns of every table of results


def report(what: str, output: str, **values: Any) -> None:
    """Prints `BENCH what=… name=value …`; adds a row, with date, machine and version, to the table `output`, if given.

    InputError if `output` is no table of a benchmark; it is not changed then.
    """
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    print("BENCH", " ".join(f"{name}={value}" for name, value in ({"what": what} | shown).items()), flush=True)
    if output:
        about = dict(zip(ABOUT_THE_RUN, (datetime.date.today().isoformat(), machine(), str(torch.__version__))))
        table = pd.concat([rows_of(output), pd.DataFrame([about | shown])])
        with whole_file(output) as file:
            table.to_csv(file, index=False)


def rows_of(path: str) -> pd.DataFrame:
    """The rows of a table that `report` wrote, none if there is no file; InputError if it is no such table."""
    if not os.path.exists(path):
        return pd.DataFrame()
    try:
        table = pd.read_csv(path, dtype=str)
    except (ValueError, OSError):
        table = pd.DataFrame()
    if not {*ABOUT_THE_RUN} <= {*table}:
        raise InputError(f"--output {path} is not a benchmark's table: give another name")
    return table


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if os.name == "posix" else None
    return f"{model[1].strip() if model else platform.machine()}, {torch.get_num_threads()} threads"


def interleaved(functions: dict[str, Callable[[], Any]], count: int) -> dict[str, float]:
    """Median seconds of `count` calls of each function after warm-up, interleaved so that all meet the same load.

    On a GPU each call is synchronised.
    """
    times = {name: [] for name in functions}
    for _ in range(WARM_UP + count):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[WARM_UP:]) for name, each in times.items()}


def matmul_gflops(dtype: torch.dtype, size: int = 2048) -> dict[str, float]:
    """GFLOP/s of a large square matrix product, by torch.mm and by conure.matmul."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device()) for _ in range(2))
    seconds = interleaved({"mm": lambda: torch.mm(a, b), "product": lambda: product(a, b)}, count=15)
    return {name: 2 * size**3 / each / 1e9 for name, each in seconds.items()}


def device() -> torch.device:
    return pick_device("auto")


def peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
