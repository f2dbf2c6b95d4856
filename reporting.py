"""What a run prints and records: progress, RESULT lines, results.csv."""

import os
import sys
import time
from typing import Any

import pandas as pd
from torch import Tensor
from tqdm import tqdm

from settings import InputError

SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal to draw a bar on
SCORES = ("mrr", "hr", "ndcg", "accuracy")  # how the names of scores begin


class Progress:
    """A bar with loss, steps/s and time left on a terminal; elsewhere a line now and then."""

    def __init__(self, steps: int):
        self.bar = tqdm(total=steps, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())
        self.steps, self.step = steps, 0
        self.started = self.shown = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def advance(self, loss: Tensor) -> None:
        self.step += 1
        self.bar.update()
        now = time.monotonic()
        # Reading the loss waits for the device, so it is not done at every step.
        if self.bar.disable and now - self.shown >= SECONDS_BETWEEN_LINES:
            rate = self.step / (now - self.started)
            left = tqdm.format_interval((self.steps - self.step) / rate)
            print(f"step {self.step}/{self.steps} loss {loss.item():.4f} {rate:.1f} steps/s {left} left", flush=True)
            self.shown = now
        elif not self.bar.disable and now - self.shown >= 0.5:
            self.bar.set_postfix_str(f"loss {loss.item():.4f}")
            self.shown = now

    def __exit__(self, *_) -> None:
        self.bar.close()


def result_line(row: dict[str, Any]) -> str:
    """`RESULT task=2 stage=ret split=test epoch=30 mrr@5=0.0312 …`: scores to four decimals."""
    formats = {"seconds": ".1f", "epoch": "g"} | {name: ".4f" for name in row if name.startswith(SCORES)}
    return "RESULT " + " ".join(f"{name}={value:{formats.get(name, '')}}" for name, value in row.items())


def append_result(path: str, row: dict[str, Any]) -> None:
    """Adds a row to results.csv, whose columns are all the fields that any of its rows has."""
    rows = []
    if os.path.exists(path):
        try:
            rows = [pd.read_csv(path, dtype=str, keep_default_na=False)]  # as text, so that no number is rounded again
        except (ValueError, UnicodeDecodeError):
            raise InputError(f"{path} is not the table that earlier runs wrote: move it away to go on") from None
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    pd.concat([*rows, pd.DataFrame([row])]).to_csv(f"{path}.tmp", index=False)
    os.replace(f"{path}.tmp", path)
