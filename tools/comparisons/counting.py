"""Methods without a model: they score targets by counts over the training set. <UNK> and padding are never counted.

The variants were chosen by validation on MovieLens with ties in random order; the docstrings give validation scores.
"""

from collections.abc import Callable

from conure import ranking
from conure.errors import InputError

import numpy as np
import torch

from data_loader import TaskData

PLACES = 10  # context of the Markov chain of task 1, in items
MAX_PAIRS = 1 << 27  # counting so many takes 11 GB if all are distinct

Scores = Callable[[int, int], np.ndarray]  # number of a row, and how many of its places are visible → (targets,)


class Table:
    """A sparse matrix from triples (row, column, value); values of duplicate places are summed."""

    def __init__(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, height: int, width: int):
        keys, place = np.unique(rows.astype(np.int64) * width + columns, return_inverse=True)
        self.values, self.columns, self.width = np.bincount(place, values), keys % width, width
        self.first = np.searchsorted(keys, np.arange(height + 1) * width)  # of each row in `values` and `columns`

    def weighted_sum(self, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        total = np.zeros(self.width)
        for row, weight in zip(rows, weights):
            part = slice(self.first[row], self.first[row + 1])
            total[self.columns[part]] += weight * self.values[part]
        return total


def only_items(data: TaskData, ids: np.ndarray) -> np.ndarray:
    """The ids, with padding replaced by 0."""
    return np.where(ids == data.padding_id, 0, ids)


def check_size(data: TaskData, distances: int = 1) -> None:
    pairs = len(data.splits["train"]) * data.rows.shape[1] * distances
    if pairs > MAX_PAIRS:
        raise InputError(f"{data.path}: too large for `counting`: {pairs:,} pairs of ids, limit {MAX_PAIRS:,}")


def pair_counts(data: TaskData) -> tuple[np.ndarray, Table]:
    """The items of each row (U, T), 0 for repeats; and how many training examples have an item and a target."""
    check_size(data)
    items = ranking.without_repeats(np.sort(only_items(data, data.rows), axis=1))
    train = data.splits["train"]
    example, place = np.nonzero(items[data.users[train]])
    pairs = items[data.users[train][example], place], data.targets[train][example], np.ones(len(example))
    return items, Table(*pairs, len(data.items), len(data.target_vocabulary))


def markov(data: TaskData) -> Scores:
    """Markov chain: Σ P(t | i) / k over the last ten items i, k = 1 for the last one.

    P(t | i) is the share of t among the items that follow i within ten places, each weighted by 1 / distance. MRR@5 at
    all positions is 0.058. With counts in place of shares it is 0.057; without weights in the counts 0.057; without
    weights in the sum 0.046; with the last item alone 0.044.
    """
    check_size(data, PLACES)
    train, size, pairs = data.splits["train"], len(data.items), []
    sequences = only_items(data, np.column_stack([data.rows[data.users[train]], data.targets[train]]))
    for k in range(1, PLACES + 1):
        both = (sequences[:, :-k] > 0) & (sequences[:, k:] > 0)
        pairs.append((sequences[:, :-k][both], sequences[:, k:][both], np.full(both.sum(), 1 / k)))
    before, after, weights = map(np.concatenate, zip(*pairs))
    follows, of_item = Table(before, after, weights, size, size), np.bincount(before, weights, size)

    def scores(row: int, seen: int) -> np.ndarray:
        last = only_items(data, data.rows[row, :seen][::-1][:PLACES])
        k = 1 + np.flatnonzero(of_item[last])
        return follows.weighted_sum(last[k - 1], 1 / (k * of_item[last[k - 1]]))

    return scores


def cosine(data: TaskData) -> Scores:
    """Σ n(i, t) / √(n(i) n(t)) over the items i of the row; n counts training examples with i, with t, or with both."""
    items, both = pair_counts(data)
    train, of_target = data.splits["train"], data.target_counts().clip(1)
    of_item = np.bincount(items[data.users[train]].ravel(), minlength=len(data.items)).clip(1)

    def scores(row: int, seen: int) -> np.ndarray:
        there = items[row][items[row] > 0]
        return both.weighted_sum(there, 1 / np.sqrt(of_item[there])) / np.sqrt(of_target)

    return scores


def naive_bayes(data: TaskData) -> Scores:
    """log P(c) + Σ log P(i | c) over the items i of the row: multinomial naive Bayes, Laplace smoothing in both terms.

    Bernoulli naive Bayes is as good (accuracy 0.719).
    """
    items, both = pair_counts(data)
    kinds = np.count_nonzero(only_items(data, np.arange(len(data.items))))
    of_class = np.bincount(both.columns, both.values, both.width) + kinds
    prior, both.values = np.log1p(data.target_counts()), np.log1p(both.values)

    def scores(row: int, seen: int) -> np.ndarray:
        there = items[row][items[row] > 0]
        return prior + both.weighted_sum(there, np.ones(len(there))) - len(there) * np.log(of_class)

    return scores


METHODS = (markov, cosine, cosine, naive_bayes)  # for tasks 1 to 4


class CountScorer(ranking.Scorer):
    """Ranks by `scores_of`. A state is a row's number, and how many of its places are visible."""

    device = torch.device("cpu")

    def __init__(self, scores_of: Scores, data: TaskData):
        self.scores_of, self.data, self.size = scores_of, data, len(data.target_vocabulary)

    def last_states(self, rows: np.ndarray) -> torch.Tensor:
        return self.states(rows)[:, -1]

    def states(self, rows: np.ndarray) -> torch.Tensor:
        seen = np.arange(1, self.data.rows.shape[1] + 1)
        return torch.from_numpy(np.stack(np.broadcast_arrays(rows[:, None], seen), axis=2))

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.scores_of(row, seen) for row, seen in states.tolist()]))
