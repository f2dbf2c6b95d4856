"""Markdown tables of scores over several seeds."""

import pandas as pd


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def header(*names: str) -> list[str]:
    return [line(*names), "|---" * len(names) + "|"]


def mean_and_spread(values: pd.Series, digits: int = 4) -> str:
    """`0.0599 ± 0.0022`: the mean and the standard deviation, which one value alone does not have."""
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def scores(table: pd.DataFrame) -> list[str]:
    """Markdown lines: a row a method, with its score on every task."""
    metric = table.drop_duplicates("task").set_index("task")["metric"]
    tasks = sorted(metric.index)
    columns = [f"task {task}, {metric[task]}" for task in tasks]
    lines = header("method", *columns, "trained, thousands", "MB for all tasks", "seconds")
    for method, rows in table.groupby("method", sort=False):
        by_task = rows.groupby("task")
        cells = [mean_and_spread(by_task.get_group(t)["score"]) if t in by_task.groups else "" for t in tasks]
        trained = " / ".join(f"{by_task.get_group(t)['trained'].max() / 1e3:.0f}" for t in by_task.groups)
        seconds = rows.groupby("seed")["seconds"].sum().median()
        all_tasks = f"{rows['bytes_all_tasks'].max() / 1e6:.1f}" if len(by_task) == len(tasks) else ""
        lines.append(line(method, *cells, trained, all_tasks, f"{seconds:.0f}"))
    return lines


def forgetting(table: pd.DataFrame) -> list[str]:
    """Markdown lines: a row a method and task, with its scores after each further task."""
    tasks = sorted(table["after"].unique())
    lines = header("method", "task", *(f"after task {task}" for task in tasks))
    for (method, task), rows in table.groupby(["method", "task"], sort=False):
        after = rows.groupby("after")["score"]
        cells = [mean_and_spread(after.get_group(t)) if t in after.groups else "" for t in tasks]
        lines.append(line(method, str(task), *cells))
    return lines
