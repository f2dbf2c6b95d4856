"""Metrics compared with slow implementations of their definitions."""

import math

from conure.metrics import (
    Protocol,
    Ranks,
    accuracy_scores,
    first_values,
    interval,
    ranking_scores,
    resampled_ratios,
    score,
)

import numpy as np
import pytest


def ranks_of(
    ranks: np.ndarray, raw: np.ndarray | None = None, positions: tuple = (), targets: tuple = (), logs: tuple = ()
) -> Ranks:
    ranks, positions = np.asarray(ranks), np.asarray(positions, int)
    users, logs = np.arange(len(ranks)), np.asarray(logs, float).reshape(len(ranks), -1)
    return Ranks(users, np.asarray(targets), ranks, ranks if raw is None else raw, positions, positions, logs)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_scores_by_definition(k):
    random = np.random.default_rng(1)
    ranks, raw, positions = random.integers(1, 30, (3, 500))
    scores = ranking_scores(ranks_of(ranks, raw, positions), k)
    assert list(scores) == [f"mrr@{k}_all", f"mrr@{k}", f"hr@{k}", f"ndcg@{k}", f"mrr@{k}_raw"]
    assert list(ranking_scores(ranks_of(ranks, raw), k)) == list(scores)[1:]

    def reciprocal(rank: int) -> float:
        return 1 / rank

    gains = [reciprocal, reciprocal, lambda rank: 1, lambda rank: 1 / math.log2(rank + 1), reciprocal]
    for value, gain, counted in zip(scores.values(), gains, [positions, ranks, ranks, ranks, raw]):
        assert value == pytest.approx(sum(gain(int(rank)) for rank in counted if rank <= k) / 500)


def test_classes_by_definition():
    """Four classes of unequal frequency, one of which never occurs; ties count as one half in the AUC."""
    random = np.random.default_rng(1)
    targets = random.choice([1, 2, 4], 300, p=[0.7, 0.2, 0.1])
    logs = random.integers(-4, 0, (300, 4)).astype(float)
    ranks = 1 + (logs >= logs[np.arange(300), targets - 1][:, None]).sum(axis=1) - 1
    scores = score(ranks_of(ranks, targets=targets, logs=logs), Protocol("accuracy", 1))
    right = ranks == 1
    assert scores["accuracy"] == pytest.approx(right.mean()) and scores["n"] == 300
    assert scores["balanced_accuracy"] == pytest.approx(np.mean([right[targets == c].mean() for c in (1, 2, 4)]))
    areas = []
    for c in (1, 2, 4):
        own, others = logs[targets == c, c - 1], logs[targets != c, c - 1]
        areas.append(np.mean([(a > b) + (a == b) / 2 for a in own for b in others]))
    assert scores["auc"] == pytest.approx(np.mean(areas))
    assert list(accuracy_scores(ranks_of(ranks, targets=targets, logs=logs), 2)) == [
        "accuracy@2",
        "balanced_accuracy@2",
        "auc",
    ]
    assert "auc" not in accuracy_scores(ranks_of([1, 1], targets=[2, 2], logs=[[0, 0], [0, 0]]), 1)


@pytest.mark.parametrize("protocol", [Protocol("accuracy", 2), Protocol(), Protocol(all_positions=True)], ids=str)
def test_the_first_score_is_the_mean_of_the_first_values(protocol):
    random = np.random.default_rng(1)
    ranks, raw, positions = random.integers(1, 9, (3, 100))
    positions, targets = positions if protocol.all_positions else (), random.integers(1, 3, 100)
    kept = Ranks.from_tensors(ranks_of(ranks, raw, positions, targets).to_tensors())
    assert next(iter(score(kept, protocol).values())) == pytest.approx(first_values(kept, protocol)[0].mean())


def test_an_interval_is_a_bootstrap_over_users():
    """Its width follows the central limit theorem; repeated rows of a user do not narrow it."""
    random = np.random.default_rng(1)
    values, users = random.random(400), np.arange(400)
    low, high = interval([(values, users)])
    error = values.std() / math.sqrt(400)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1) and low < values.mean() < high
    assert interval([(np.tile(values, 5), np.tile(users, 5))]) == pytest.approx((low, high))
    assert interval([(np.ones(9), np.arange(9))]) == (1, 1)


def test_the_interval_of_a_ratio_is_paired():
    """Values that are all twice as large leave no doubt; otherwise its width follows the delta method."""
    random, users = np.random.default_rng(1), np.arange(400)
    theirs, ours = random.random(400), random.random(400)
    assert interval([(2 * theirs, users)], [theirs]) == pytest.approx((2, 2))
    low, high = interval([(ours, users)] * 3, [theirs] * 3)
    ratio = ours.mean() / theirs.mean()
    error = (ours - ratio * theirs).std() / math.sqrt(400) / theirs.mean()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1) and low < ratio < high


def test_variance_over_runs_widens_an_interval():
    sums, counts = np.full((5, 50), 0.5), np.ones((5, 50))
    assert np.ptp(resampled_ratios(sums, counts)) == 0
    sums *= np.arange(5)[:, None]
    means = resampled_ratios(sums, counts)
    assert means.mean() == pytest.approx(1, abs=0.03) and means.std() == pytest.approx(
        sums.std() / math.sqrt(5), rel=0.1
    )
