"""Learning curves of the tasks, from results.csv."""

import os
from typing import NamedTuple

from conure.errors import InputError
from conure.line_reader import missing
from conure.reporting import SCORES

import pandas as pd

Point = tuple[float, float]  # epoch, counted through tp and then ret; score


class History(NamedTuple):
    """Scores of a task through tp, pruning and ret."""

    task: int
    name: str  # of the metric; of two, if the stages differ
    curves: dict[str, list[Point]]  # tp and ret: validation scores
    kept: dict[str, Point]  # tp and ret: the selected epoch, the best on validation
    pruned: Point | None  # its validation score after pruning, where tp ends
    test: dict[str, Point]  # tp, pruned and ret: test score of the selected epoch


def histories(folder: str) -> list[History]:
    """Every task in results.csv; InputError if it is missing or another table."""
    path = os.path.join(folder, "results.csv")
    if not os.path.exists(path):
        raise InputError(f"{missing(path)}: the scripts write it beside their checkpoints")
    try:
        table = pd.read_csv(path, dtype={"task": int, "epoch": float}, float_precision="round_trip")
    except ValueError:
        table = pd.DataFrame()
    if not {"task", "state", "split", "epoch"} <= set(table) or not any(name.startswith(SCORES) for name in table):
        raise InputError(f"{path} is not the table that the scripts write: restore it")
    return [history(task, rows) for task, rows in table.groupby("task")]


def history(task: int, rows: pd.DataFrame) -> History:
    """One task's rows of results.csv as points; epochs of ret are counted from the end of tp, where pruning is."""
    names = sorted((name for name in rows if name.startswith(SCORES)), key=lambda name: not name.endswith("_all"))
    rows = rows.assign(name=rows[names].notna().idxmax(axis=1), score=rows[names].bfill(axis=1).iloc[:, 0])
    end = rows["epoch"].where(rows["state"] == "tp", 0.0).max()
    rows.loc[rows["state"] == "pruned", "epoch"] = end
    rows.loc[rows["state"] == "ret", "epoch"] += end
    parts = rows.groupby(["state", "split"])
    points = {key: list(zip(part["epoch"].tolist(), part["score"].tolist())) for key, part in parts}
    test = {state: points[state, "test"][-1] for state in ("tp", "pruned", "ret") if (state, "test") in points}
    curves = {state: points[state, "validation"] for state in ("tp", "ret") if (state, "validation") in points}
    kept = {
        state: point
        for state, curve in curves.items()
        for point in curve
        if state in test and point[0] == test[state][0]
    }
    pruned = points.get(("pruned", "validation"), [None])[-1]
    return History(int(task), ", then ".join(rows["name"].unique()), curves, kept, pruned, test)
