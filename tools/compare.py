"""Compare two checkpoint folders task by task: the difference of their test scores, and how well it is known.

Both must have learned a task from the same data with the same split. The difference is paired: each test example counts
with what one chain gains on it over the other. Its interval comes from a bootstrap over users (95 %). If the ranks of
the two leave out other targets, those among all targets are compared.

READS  the newest checkpoint of A and of B, and the ranks of the test examples that it keeps
NEXT   the same with other seeds and splits: an interval of one pair of runs leaves out what another seed would change
"""

from dataclasses import dataclass, replace
from typing import Any

from conure import checkpoint, launch, metrics
from conure.errors import InputError
from conure.metrics import Protocol, Ranks
from conure.settings import positional

import numpy as np


@dataclass
class Hyperparameters:
    a: str = positional()  # a checkpoint folder
    b: str = positional()  # another one


def tasks_of(folder: str) -> dict[int, dict[str, Any]]:
    return checkpoint.load(checkpoint.newest(folder))[0]["tasks"]


def check_comparable(task: int, a: dict[str, Any], b: dict[str, Any]) -> None:
    """InputError if the records of two tasks are not of the same test examples, or have other metrics."""
    found = [(each["data_digest"], each["split"], *scored_by(each)) for each in (a, b)]
    for first, second, meant in zip(*found, ("data", "splits", "metrics", "values of top_k")):
        if first != second:
            shown = "" if meant == "data" else f" ({first} and {second})"
            raise InputError(f"task {task} has other {meant} in the two folders{shown}: compare what was scored alike")


def scored_by(record: dict[str, Any]) -> tuple[str, int]:
    return record["protocol"]["metric"], record["protocol"]["top_k"]


def values(record: dict[str, Any], raw: bool) -> tuple[np.ndarray, np.ndarray]:
    """What a task's first test score is the mean of, and the user of each; `raw`: by the ranks among all targets."""
    ranks = Ranks.from_tensors(record["ranks"])
    if raw:
        ranks = replace(ranks, ranks=ranks.raw, position_ranks=ranks.raw[:0])
    return metrics.first_values(ranks, Protocol(**record["protocol"]))


def main(hp: Hyperparameters) -> None:
    a, b = tasks_of(hp.a), tasks_of(hp.b)
    for task in sorted(a.keys() & b.keys()):
        check_comparable(task, a[task], b[task])
        raw = a[task]["protocol"] != b[task]["protocol"]  # one of them left other targets out: then nothing is
        (first, users), (second, _) = values(a[task], raw), values(b[task], raw)
        name = next(name for name in a[task]["results"][a[task]["state"]]["test"] if name.endswith("_raw") or not raw)
        low, high = metrics.interval([(second - first, users)])
        verdict = "b is better" if low > 0 else "a is better" if high < 0 else "no difference that this test part shows"
        means, count = f"a {first.mean():.4f}, b {second.mean():.4f}", len(np.unique(users))
        difference = f"b - a {np.mean(second - first):+.4f} [{low:+.4f}, {high:+.4f}]"
        print(f"task {task}, {name}: {means}, {difference}, {count:,} users: {verdict}")


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
