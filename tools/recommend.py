"""Writes the best items, or classes, of a task for every row of a data file, in the tokens of the data.

READS  a serving file, from tools.export; a data file of any task, or any file of such lines
WRITES output, or the terminal: user,rank,target,score, a line for each recommendation; a score is the head's output,
       comparable within a row, and no probability
NEXT   your own shop window
"""

import contextlib
import sys
from dataclasses import dataclass
from typing import BinaryIO

from conure import launch
from conure.device import pick_device
from conure.errors import InputError
from conure.files import whole_file

import numpy as np
import pandas as pd

from tools import serving


@dataclass
class Hyperparameters(serving.Source):
    top_k: int = 10  # how many for each row
    exclude_seen: bool = False  # leave out what the row itself holds
    output: str = ""  # a .csv file; empty: the terminal


def output_file(path: str) -> contextlib.AbstractContextManager[BinaryIO]:
    return whole_file(path) if path else contextlib.nullcontext(sys.stdout.buffer)


def table(users: list[str], targets: np.ndarray, scores: np.ndarray, tokens: np.ndarray) -> pd.DataFrame:
    """`targets` and `scores` (B, k) as a row each, but where the score is -inf."""
    row, place = np.nonzero(scores > -np.inf)
    columns = {"user": np.array(users, dtype=object)[row], "rank": place + 1}
    return pd.DataFrame(columns | {"target": tokens[targets[row, place]], "score": scores[row, place]})


def main(hp: Hyperparameters) -> None:
    if hp.output:
        hp.check_output(hp.output)
    served = serving.Served(hp, pick_device(hp.device))
    if hp.exclude_seen and served.metric == "accuracy":
        raise InputError(f"--exclude_seen is for tasks of items: task {hp.task} has classes, of which no row holds one")
    tokens = np.array(served.targets.tokens, dtype=object)
    with output_file(hp.output) as file:
        header = True
        for users, ids in served.batches(hp.data_path, hp.ids):
            table(users, *served.best(ids, hp.top_k, hp.exclude_seen), tokens).to_csv(file, index=False, header=header)
            header = False
    print(served.said(), file=sys.stderr)
    if hp.output:
        print(f"wrote {hp.output}")


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
