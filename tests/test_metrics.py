"""Metrics against their definitions, counted the slow way."""

import math

from conure import matmul, metrics

import numpy as np
import pytest
import torch

import data_loader
from nextitnet import NextItNet
from pruning import Stage


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


@pytest.mark.parametrize("task", [1, 2])
def test_ranks_by_blocks_are_those_of_all_scores_at_once(monkeypatch, task):
    """Whatever the sizes of the blocks and however many examples a row has, `<UNK>` is left out and order is kept."""
    torch.manual_seed(1)
    model = NextItNet(items=50, channels=8, dilations=[1, 4], kernel_size=3)
    model.add_head(2, 31)
    rows, users, targets = torch.randint(50, (30, 12)), torch.randint(30, (40,)), torch.randint(1, 31, (40,))
    inputs, vocabulary = rows[users], data_loader.Vocabulary()
    arrays = {"rows": rows.int().numpy(), "users": users.numpy(), "targets": targets.int().numpy()}
    data = data_loader.TaskData(**arrays, items=vocabulary, target_vocabulary=vocabulary)
    monkeypatch.setattr(metrics, "EVALUATION_BATCH", 16)
    monkeypatch.setattr(metrics, "SCORES_AT_ONCE", 200)
    monkeypatch.setattr(metrics, "COMPARED_AT_ONCE", 7)
    monkeypatch.setattr(matmul, "CPU_COLUMNS", 9)
    stage, examples = Stage(task, "inference"), np.random.RandomState(1).permutation(40)
    ranks = metrics.rank_examples(model, data, examples, stage, torch.device("cpu"))
    with torch.no_grad():
        scores = model.scores(inputs, Stage(task, "inference"))[:, 1:]
    better = (scores > scores.gather(1, targets[:, None] - 1)).sum(dim=1).numpy()
    assert (ranks == 1 + better[examples]).all()


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
