"""Markdown tables of a comparison: scores with their intervals, differences, forgetting."""

from collections.abc import Sequence

from conure import metrics

import numpy as np
import pandas as pd

Runs = Sequence[tuple[np.ndarray, np.ndarray]]  # per seed: the score and the user of each example


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def header(*names: str) -> list[str]:
    return [line(*names), "|---" * len(names) + "|"]


def columns(table: pd.DataFrame) -> dict[int, str]:
    """The heading of each task's column."""
    first = table.drop_duplicates("task").sort_values("task")
    return {task: f"task {task}, {metric}" for task, metric in zip(first["task"], first["metric"])}


def score(runs: Runs) -> str:
    """`0.0251 [0.0236, 0.0266]`: the mean over all runs, and its 95 % interval."""
    low, high = metrics.interval(runs)
    return f"{mean(runs):.4f} [{low:.4f}, {high:.4f}]"


def mean(runs: Runs) -> float:
    return float(np.mean([values.mean() for values, _ in runs]))


def difference(ours: Runs, theirs: Runs) -> str:
    """`+0.0031 [+0.0012, +0.0050]`: ours minus theirs, paired by example."""
    runs = [(own - other, users) for (own, users), (other, _) in zip(ours, theirs)]
    low, high = metrics.interval(runs)
    return f"{mean(runs):+.4f} [{low:+.4f}, {high:+.4f}]"


def ratio(ours: Runs, theirs: Runs) -> str:
    """`1.17 [1.02, 1.33]`: ours over theirs, paired by example; empty if theirs is 0."""
    if mean(theirs) == 0:
        return ""
    with np.errstate(divide="ignore", invalid="ignore"):  # theirs may be 0 for the users that a bootstrap draws
        low, high = metrics.interval(ours, [values for values, _ in theirs])
    return f"{mean(ours) / mean(theirs):.2f} [{low:.2f}, {high:.2f}]"


def score_lines(table: pd.DataFrame, runs: dict[tuple[str, int], Runs]) -> list[str]:
    """A row per method: its score on every task and its costs."""
    tasks = columns(table)
    lines = header("method", *tasks.values(), "trained, thousands", "MB for all tasks", "seconds")
    for method, rows in table.groupby("method", sort=False):
        cells = [score(runs[method, task]) if (method, task) in runs else "" for task in tasks]
        trained = " / ".join(f"{count / 1e3:.0f}" for count in rows.groupby("task")["trained"].max())
        seconds = rows.groupby("seed")["seconds"].sum().median()
        all_tasks = f"{rows['bytes_all_tasks'].max() / 1e6:.1f}" if rows["task"].nunique() == len(tasks) else ""
        lines.append(line(method, *cells, trained, all_tasks, f"{seconds:.0f}"))
    return lines


def gain_lines(table: pd.DataFrame, runs: dict[tuple[str, int], Runs], method: str) -> list[str]:
    """Two tables with a row for every other method: how much better `method` is on each task, and how many times."""
    tasks, lines = columns(table), []
    for word, compare in (("minus", difference), ("over", ratio)):
        lines += ["", *header(f"{method} {word}", *tasks.values())]
        for other in table["method"].unique():
            pairs = [(runs.get((method, task)), runs.get((other, task))) for task in tasks]
            if other != method:
                lines.append(line(other, *(compare(*pair) if all(pair) else "" for pair in pairs)))
    return lines


def forgetting_lines(table: pd.DataFrame) -> list[str]:
    """A row per method and task: its mean score after each further task."""
    tasks = sorted(table["after"].unique())
    lines = header("method", "task", *(f"after task {task}" for task in tasks))
    for (method, task), rows in table.groupby(["method", "task"], sort=False):
        after = rows.groupby("after")["score"].mean()
        lines.append(line(method, str(task), *(f"{after[t]:.4f}" if t in after else "" for t in tasks)))
    return lines
