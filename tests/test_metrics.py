"""Metrics against their definitions, counted the slow way."""

import math

import numpy as np
import pytest
import torch

import metrics


def test_ranks_count_every_other_score_that_is_not_lower():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 6, (200, 12), generator=generator).float()  # many ties
    scores[3, 5] = scores[4, 0] = math.nan
    targets = torch.randint(0, 12, (200,), generator=generator)
    targets[4] = 0
    expected = [
        1 + sum(not row[item] < row[target] for item in range(12) if item != target)
        for row, target in zip(scores.tolist(), targets.tolist())
    ]
    assert metrics.target_ranks(scores, targets).tolist() == expected
    assert expected[4] == 12  # a target without a score is the last


def test_a_model_that_scores_all_alike_is_right_about_nothing():
    ranks = metrics.target_ranks(torch.zeros(3, 9), torch.tensor([0, 4, 8])).numpy()
    assert (ranks == 9).all() and metrics.accuracy_scores(ranks, 1) == {"accuracy": 0.0}


@pytest.mark.parametrize("k", [1, 5, 20])
def test_scores_by_definition(k):
    ranks = np.random.default_rng(1).integers(1, 30, 500)
    scores = metrics.ranking_scores(ranks, k)
    assert list(scores) == [f"mrr@{k}", f"hr@{k}", f"ndcg@{k}"]
    definitions = [lambda rank: 1 / rank, lambda rank: 1, lambda rank: 1 / math.log2(rank + 1)]
    for score, gain in zip(scores.values(), definitions):
        assert score == pytest.approx(sum(gain(int(rank)) for rank in ranks if rank <= k) / 500)


def test_accuracy_counts_first_places():
    ranks = np.array([1, 1, 2, 3])
    assert metrics.accuracy_scores(ranks, 1) == {"accuracy": 0.5}
    assert metrics.accuracy_scores(ranks, 2) == {"accuracy@2": 0.75}
