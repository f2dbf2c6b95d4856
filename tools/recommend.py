"""Write the top-k items or classes of a task for every row of a data file, as tokens of the data.

READS  a serving file, from tools.export; a data file of any task, or any file of `item,item,…` lines
WRITES output, or the terminal: user,rank,target,score, one recommendation a line; scores are logits, comparable within
       a user only
NEXT   your own application

Recommendations for tomorrow need rows that hold the whole history. Task files end earlier: with the default
`--history 0.8`, they stop at 80 % of each user's history, as the rest is what later tasks predict. So make a file of
whole histories for serving: give Data.from_interactions the flags that made the training data, but no --task, with
`--history 1 --min_rows 1` and a folder of its own:
    python -m Data.from_interactions --interactions TABLE … --history 1 --min_rows 1 --output_dir today
    python -m tools.recommend --task 2 --data_path today/original_desen_pretrain.csv --ids today/users.csv
"""

import contextlib
import sys
from dataclasses import dataclass
from typing import Literal

from conure import launch
from conure.device import pick_device
from conure.errors import InputError
from conure.files import whole_file
from conure.settings import Count

import numpy as np
import pandas as pd

from tools.serving.served import Served, Source


@dataclass
class Hyperparameters(Source):
    top_k: Count = 10  # recommendations per row
    exclude_seen: Literal["auto", "yes", "no"] = "auto"  # leave out the row's items; auto: if the ranks did (known)
    output: str = ""  # .csv file to write; empty: the terminal


def table(users: list[str], targets: np.ndarray, scores: np.ndarray, tokens: np.ndarray) -> pd.DataFrame:
    """One line for each of the `targets` (B, k) whose score is not -inf."""
    row, place = np.nonzero(scores > -np.inf)
    columns = {"user": np.array(users, dtype=object)[row], "rank": place + 1}
    return pd.DataFrame(columns | {"target": tokens[targets[row, place]], "score": scores[row, place]})


def main(hp: Hyperparameters) -> None:
    if hp.output:
        if not hp.output.endswith(".csv"):
            raise InputError(f"--output {hp.output}: the name must end with .csv")
        hp.check_output(hp.output)
    served = Served(hp, pick_device(hp.device))
    if hp.exclude_seen == "yes" and served.metric == "accuracy":
        raise InputError(f"--exclude_seen yes: task {hp.task} learns classes, which no row holds: leave it out")
    exclude_seen = hp.exclude_seen == "yes" or (hp.exclude_seen == "auto" and served.leave_out == "known")
    tokens = np.array(served.targets.tokens, dtype=object)
    with whole_file(hp.output) if hp.output else contextlib.nullcontext(sys.stdout.buffer) as file:
        for number, (users, ids) in enumerate(served.batches(hp.data_path, hp.ids)):
            best = table(users, *served.best(ids, hp.top_k, exclude_seen), tokens)
            best.to_csv(file, index=False, header=number == 0)
    print(served.summary(), file=sys.stderr)
    if served.metric != "accuracy":
        told = "left out" if exclude_seen else "recommended too"
        print(f"items that a row holds are {told} (--exclude_seen yes|no)", file=sys.stderr)
    if hp.output:
        print(f"wrote {hp.output}")


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
