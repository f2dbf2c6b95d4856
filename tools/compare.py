"""Compare two chains task by task: the paired difference of their test scores, with a 95 % interval.

Both chains must have learned a task from the same data with the same split. The difference is taken example by example;
its interval is a bootstrap over users. If the ranks of the two leave out different targets, the ranks among all targets
are compared.

READS  the newest checkpoint in folder A and in folder B, which hold the ranks of the test examples
NEXT   repeat it with other seeds and splits: one pair of runs shows the variance over users, not that over seeds
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
    a: str = positional()  # checkpoint folder of one chain
    b: str = positional()  # checkpoint folder of the other


def tasks_of(folder: str) -> dict[int, dict[str, Any]]:
    return checkpoint.load(checkpoint.newest(folder))[0]["tasks"]


def check_comparable(task: int, a: dict[str, Any], b: dict[str, Any]) -> None:
    """InputError if the two records differ in data, split, metric or top_k."""
    found = [(each["data_digest"], each["split"], *scored_by(each)) for each in (a, b)]
    for first, second, meant in zip(*found, ("data", "splits", "metrics", "values of top_k")):
        if first != second:
            shown = "" if meant == "data" else f" ({first} and {second})"
            raise InputError(f"task {task}: the two folders differ in {meant}{shown}: compare chains that share them")


def scored_by(record: dict[str, Any]) -> tuple[str, int]:
    return record["protocol"]["metric"], record["protocol"]["top_k"]


def values(record: dict[str, Any], raw: bool) -> tuple[np.ndarray, np.ndarray]:
    """A task's first test metric of each example, and their users; `raw`: by the ranks among all targets."""
    ranks = Ranks.from_tensors(record["ranks"])
    if raw:
        ranks = replace(ranks, ranks=ranks.raw, position_ranks=ranks.raw[:0])
    return metrics.first_values(ranks, Protocol(**record["protocol"]))


def main(hp: Hyperparameters) -> None:
    a, b = tasks_of(hp.a), tasks_of(hp.b)
    for task in sorted(a.keys() & b.keys()):
        check_comparable(task, a[task], b[task])
        raw = a[task]["protocol"] != b[task]["protocol"]  # they leave out different targets, so compare all targets
        (first, users), (second, _) = values(a[task], raw), values(b[task], raw)
        name = next(name for name in a[task]["results"][a[task]["state"]]["test"] if name.endswith("_raw") or not raw)
        low, high = metrics.interval([(second - first, users)])
        verdict = "b is better" if low > 0 else "a is better" if high < 0 else "no difference that this test part shows"
        means, count = f"a {first.mean():.4f}, b {second.mean():.4f}", len(np.unique(users))
        difference = f"b - a {np.mean(second - first):+.4f} [{low:+.4f}, {high:+.4f}]"
        print(f"task {task}, {name}: {means}, {difference}, {count:,} users: {verdict}")


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
