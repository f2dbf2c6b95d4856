"""What the benchmarks share: BENCH lines and rows of results, the machine's name and its matrix rate."""

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

import pandas as pd
import torch

WARM_UP = 3  # calls that are not timed


def report(what: str, output: str, **values: Any) -> None:
    """Prints `BENCH what=… name=value …`; adds it, with date, machine and versions, to the table `output`, if any."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    print("BENCH", " ".join(f"{name}={value}" for name, value in ({"what": what} | shown).items()), flush=True)
    row = {"date": datetime.date.today().isoformat(), "machine": machine(), "torch": str(torch.__version__)} | shown
    if output:
        earlier = [pd.read_csv(output, dtype=str)] if Path(output).exists() else []
        pd.concat([*earlier, pd.DataFrame([row])]).to_csv(output, index=False)


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if os.name == "posix" else None
    return f"{model[1].strip() if model else platform.machine()}, {torch.get_num_threads()} threads"


def take_turns(functions: dict[str, Callable[[], Any]], count: int) -> dict[str, float]:
    """Median seconds of `count` calls of each, warm, one after the other, so that all meet the machine in its moods.

    On a GPU until it has done its work.
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


def matmul_gflops(dtype: torch.dtype, size: int = 2048) -> float:
    """The rate of a large square matrix product."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device()) for _ in range(2))
    seconds = take_turns({"product": lambda: a @ b}, count=15)["product"]
    return 2 * size**3 / seconds / 1e9


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
