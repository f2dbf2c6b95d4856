"""What a run prints and records: settings, hints, progress, RESULT lines, results.csv."""

import csv
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

from conure import checkpoint, metrics, processes
from conure.errors import InputError
from conure.files import whole_file
from conure.metrics import Protocol, Ranks
from conure.settings import printable

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data_loader import TaskData
from nextitnet import INITIAL_DEVIATION
from pruning import Stage

SECONDS_BETWEEN_LINES = 30  # of progress, if there is no terminal for a bar
COLUMNS = ("state", "task", "split", "epoch", "n", "seconds")  # of results.csv, besides scores
FEW_TARGETS = 100  # with one target a user, up to so many targets are probably classes
ADVICE = "README, Adding a task"
RANKED = {  # what `leave_out` means
    "nothing": "among all",
    "targets": "among all but the targets that the user has in training",
    "known": "among all but the row's items and the targets that the user has in training",
}
SCORES = ("mrr", "hr", "ndcg", "accuracy", "balanced_accuracy", "auc")  # how the names of scores begin


def announce(
    hp: Any,
    data: TaskData,
    model: nn.Module,
    trained: int,
    device: torch.device,
    precision: str,
    protocol: Protocol,
) -> None:
    """Prints settings, data, how its targets are ranked, parameter counts, device, precision, versions, and hints."""
    settings = " ".join(f"{name}={printable(value)}" for name, value in vars(hp).items())
    print(textwrap.fill(f"settings: {settings}", 100, subsequent_indent="  ", break_long_words=False))
    print("data:", "\n  ".join(data.describe()))
    print(f"ranks: {RANKED[protocol.leave_out]}")
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"parameters: {total:,}, of which this stage trains {trained:,}")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    count = processes.own_shard().count
    several = f"; {count} processes" if count > 1 else ""
    print(f"device: {device.type}{threads}; {precision}{several}")
    print("versions:", ", ".join(" ".join(version) for version in checkpoint.versions().items()))
    for hint in hints(hp, data, protocol):
        print(f"hint: {hint}")


def hints(hp: Any, data: TaskData, protocol: Protocol) -> Iterator[str]:
    """Settings that hardly train, classes that are learned as items, and items that are learned as classes."""
    steps = hp.epochs * -(-len(data.splits["train"]) // hp.batch_size)
    if steps * hp.learning_rate < INITIAL_DEVIATION:
        small = "" if data.is_task_1 else ", or --batch_size 128 --learning_rate 1e-3 as for small data"
        yield (
            f"{steps:,} steps at learning_rate {hp.learning_rate:g} move a conv weight by at most "
            f"{steps * hp.learning_rate:.1g}, and weights start at ±{INITIAL_DEVIATION}: give more --epochs{small}"
        )
    targets, several = len(data.target_vocabulary) - 1, len(data.targets) > len(data.rows)
    if not data.is_task_1 and protocol.metric == "ranking" and targets <= FEW_TARGETS and not several:
        yield f"every row has one of {targets} targets: if they are classes, use copies of task 4's scripts ({ADVICE})"
    if protocol.metric == "accuracy" and (several or targets > FEW_TARGETS):
        yield f"rows have some of {targets:,} targets: if they are items, use copies of task 3's scripts ({ADVICE})"


def standing(ranks: Ranks, protocol: Protocol, popular: float | None) -> str:
    """`mrr@5 0.040 ± 0.006 (popularity 0.015)`: the first score, half of its 95 % interval over users, the baseline.

    `popular`: the baseline's score, if it is known for the split. It says so if the interval reaches that.
    """
    name, score = metrics.first_score(ranks, protocol)
    low, high = metrics.interval([metrics.first_values(ranks, protocol)])
    beaten = "" if popular is None or low > popular else ": no better"
    baseline = "" if popular is None else f" (popularity {popular:.3f}{beaten})"
    return f"{name} {score:.3f} ± {(high - low) / 2:.3f}{baseline}"


class Progress:
    """A progress bar with loss, steps/s and time left; without a terminal a line every SECONDS_BETWEEN_LINES."""

    def __init__(self, steps: int, step: int):
        """`step`: the first one, 0 unless the run resumed."""
        off = not sys.stderr.isatty() or not processes.is_main()
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=off)
        self.steps, self.first, self.step = steps, step, step
        self.started = self.shown = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def advance(self, loss: Tensor) -> None:
        self.step += 1
        self.bar.update()
        now = time.monotonic()
        # Reading the loss waits for the device, so not at every step.
        if self.bar.disable and now - self.shown >= SECONDS_BETWEEN_LINES:
            rate = (self.step - self.first) / (now - self.started)
            left = tqdm.format_interval((self.steps - self.step) / rate)
            print(f"step {self.step}/{self.steps} loss {loss.item():.4f} {rate:.1f} steps/s {left} left", flush=True)
            self.shown = now
        elif not self.bar.disable and now - self.shown >= 0.5:
            self.bar.set_postfix_str(f"loss {loss.item():.4f}")
            self.shown = now

    def __exit__(self, *_) -> None:
        self.bar.close()


def result_line(row: dict[str, Any]) -> str:
    """`RESULT task=2 state=ret split=test epoch=30 mrr@5=0.0312 …`, scores with four decimals."""
    formats = {"seconds": ".1f", "epoch": "g"} | {name: ".4f" for name in row if name.startswith(SCORES)}
    return "RESULT " + " ".join(f"{name}={value:{formats.get(name, '')}}" for name, value in row.items())


def read_results(path: str) -> pd.DataFrame:
    """results.csv as text, so that no number is rounded; InputError if it is another kind of table."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
    except (ValueError, csv.Error):
        header, rows = [], []
    wrong = next((number for number, row in enumerate(rows, start=2) if len(row) != len(header)), None)
    reason = f"line {wrong} has another number of fields than the header" if wrong else ""
    absent = [name for name in COLUMNS if name not in header]
    if absent:
        reason = "its column `stage` is called `state` now" if "stage" in header else f"it has no column `{absent[0]}`"
    elif not any(name.startswith(SCORES) for name in header):
        reason = "it has no column of scores"
    if reason:
        raise InputError(f"{path} is not the table that this version writes ({reason}): move it away and run again")
    return pd.DataFrame(rows, columns=header)


class Results:
    """results.csv: the rows of other stages, kept as they are, and those of this one, kept when a run resumes."""

    def __init__(self, path: str, stage: Stage):
        self.path, self.task = path, stage.task
        self.own: list[dict[str, Any]] = []
        self.others = pd.DataFrame()
        if os.path.exists(path):
            table, states = read_results(path), ("tp", "pruned") if stage.mode == "tp" else ("ret",)
            self.others = table[(table["task"] != str(stage.task)) | ~table["state"].isin(states)]

    def add(self, state: str, split: str, epoch: float, scores: dict[str, float], seconds: float) -> None:
        """Prints a RESULT line and adds it to the file, which has a column for each field of any row."""
        row = {
            "task": self.task,
            "state": state,
            "split": split,
            "epoch": epoch,
            **scores,
            "seconds": round(seconds, 1),
        }
        tqdm.write(result_line(row))
        self.own.append(row)
        if not processes.is_main():
            return
        table = pd.concat([part for part in (self.others, pd.DataFrame(self.own)) if len(part)])
        with whole_file(self.path) as file:
            table.to_csv(file, index=False)
