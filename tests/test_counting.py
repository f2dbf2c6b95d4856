"""The counting methods compared with slow implementations of their definitions."""

from collections.abc import Callable
from math import log, sqrt

from conure import ranking
from conure.metrics import Protocol

import numpy as np
import pytest

import data_loader
from tools.comparisons import counting


def real_items(data: data_loader.TaskData, row: int) -> list[int]:
    return [item for item in data.rows[row].tolist() if item not in (0, data.padding_id)]


def training_examples(data: data_loader.TaskData) -> list[tuple[int, int]]:
    return [(int(data.users[example]), int(data.targets[example])) for example in data.splits["train"]]


def check_scores(scores_of: counting.Scores, data: data_loader.TaskData, score: Callable[[int, int], float]) -> None:
    """Asserts that `scores_of` gives score(row, target) for all rows and all targets except <UNK>."""
    targets = range(1, len(data.target_vocabulary))
    expected = [[score(row, target) for target in targets] for row in range(len(data.rows))]
    assert np.ptp(expected) > 0
    for row, scores in enumerate(expected):
        assert scores_of(row, data.rows.shape[1])[1:] == pytest.approx(scores, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("places", [10, 2])
def test_markov_chain_by_definition(tiny, monkeypatch, places):
    data, _ = tiny
    monkeypatch.setattr(counting, "PLACES", places)
    follows = np.zeros((len(data.items), len(data.items)))
    for row, target in training_examples(data):
        items = [*real_items(data, row), target]
        for j in range(len(items)):
            for i in range(max(0, j - places), j):
                follows[items[i], items[j]] += 1 / (j - i)

    def score(row: int, target: int) -> float:
        last = list(enumerate(reversed(real_items(data, row)), start=1))[:places]
        return sum(follows[i, target] / follows[i].sum() / k for k, i in last if follows[i].any())

    check_scores(counting.markov(data), data, score)


def test_cosine_by_definition(tiny):
    _, data = tiny
    train = training_examples(data)

    def count(item: int | None, target: int | None) -> int:
        return sum(item in (None, *real_items(data, row)) and target in (None, own) for row, own in train)

    def score(row: int, target: int) -> float:
        items = {item for item in real_items(data, row) if count(item, target)}
        return sum(count(i, target) / sqrt(count(i, None) * count(None, target)) for i in items)

    check_scores(counting.cosine(data), data, score)


def test_naive_bayes_by_definition(tiny):
    _, data = tiny
    train = training_examples(data)

    def score(row: int, target: int) -> float:
        seen = [item for other, own in train if own == target for item in set(real_items(data, other))]
        kinds = len(data.items) - 2  # neither <UNK> nor padding
        likelihoods = [(seen.count(item) + 1) / (len(seen) + kinds) for item in set(real_items(data, row))]
        return log(sum(own == target for _, own in train) + 1) + sum(map(log, likelihoods))

    check_scores(counting.naive_bayes(data), data, score)


def test_counting_is_ranked_as_models_are(tiny, monkeypatch):
    """An example is scored by its whole row, a position by the items up to it, in blocks of any size."""
    first, data = tiny
    scores = {row: np.array([9.0, *np.roll([3.0, 2.0, 1.0], row)]) for row in range(len(data.rows))}
    examples = np.arange(len(data.targets))
    own = [scores[row][target] for row, target in zip(data.users, data.targets)]
    expected = [4 - int(score) for score in own]
    markov = counting.markov(first)
    for at_once in (1 << 26, 8):
        monkeypatch.setattr(ranking, "SCORES_AT_ONCE", at_once)
        scorer = counting.CountScorer(lambda row, seen: scores[row].copy(), data)
        assert ranking.rank_by(scorer, data, examples, Protocol()).ranks.tolist() == expected
        scorer, rows = counting.CountScorer(markov, first), first.splits["test"]
        ranks = ranking.rank_by(scorer, first, rows, Protocol(all_positions=True)).position_ranks
        wanted = []
        for row in rows:
            sequence = [*first.rows[row], first.targets[row]]
            for seen, label in enumerate(sequence[1:], start=1):
                if sequence[seen - 1] != first.padding_id:
                    others = markov(row, seen)[1:]
                    wanted.append((others >= others[label - 1]).sum())
        assert ranks.tolist() == wanted
