"""Exact ranks among all items or classes, and the metrics counted from them."""

from conure import processes
from conure.errors import InputError
from conure.matmul import wide_linear

import numpy as np
import torch
from torch import Tensor

from data_loader import TaskData
from nextitnet import NextItNet
from pruning import Stage

EVALUATION_BATCH = 256  # one size for all, because a matrix product's last bits may depend on the shape
COMPARED_AT_ONCE = 8192  # scores of a row, which a CPU's cache then still holds when they are counted
SCORES_AT_ONCE = 1 << 26  # 256 MB, whatever the number of items


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Ranks (B,), from 1, of `targets` (B,) by `scores` (B, n): every other score that is not lower ranks before it.

    So ties and NaN count against the model.
    """
    own = scores.gather(1, targets[:, None])
    lower = sum((part < own).sum(dim=1, dtype=torch.int32) for part in scores.split(COMPARED_AT_ONCE, dim=1))
    return scores.shape[1] - lower.long()


@torch.no_grad()
def rank_examples(
    model: NextItNet, data: TaskData, examples: np.ndarray, stage: Stage, device: torch.device
) -> np.ndarray:
    """The rank of each example's target among all, in the order of `examples`; each process ranks its share.

    A row is encoded once, however many of the examples are of it. InputError if the model has diverged.
    """
    model.eval()
    shard, head = processes.own_shard(), model.head(stage.task)
    rows, row_of = np.unique(data.users[examples], return_inverse=True)
    by_row = np.argsort(row_of, kind="stable")
    first = np.searchsorted(row_of[by_row], np.arange(len(rows) + 1))  # of each row's examples in `by_row`
    ranks = torch.zeros(len(examples), dtype=torch.int64, device=device)
    at_once = min(EVALUATION_BATCH, max(1, SCORES_AT_ONCE // head.out_features))
    buffer = torch.empty(at_once, head.out_features, device=device)
    for start in range(shard.number * EVALUATION_BATCH, len(rows), shard.count * EVALUATION_BATCH):
        stop = min(start + EVALUATION_BATCH, len(rows))
        inputs = torch.from_numpy(data.rows[rows[start:stop]]).long()
        users = model.user_representation(inputs.to(device), stage)
        if not users.isfinite().all():
            raise InputError("the model's states are not finite: train it again with a lower --learning_rate")
        for begin in range(first[start], first[stop], at_once):
            part = by_row[begin : min(begin + at_once, first[stop])]
            targets = torch.from_numpy(data.targets[examples[part]]).long()
            scores = buffer[: len(part)]
            wide_linear(users[row_of[part] - start], head.weight, head.bias, out=scores)
            scores[:, 0] = -torch.inf  # <UNK> is no item and no class, and nobody's target
            ranks[part] = target_ranks(scores, targets.to(device))
    return processes.total(ranks).cpu().numpy()


def mean_reciprocal_rank(ranks: np.ndarray, k: int) -> float:
    return float(np.where(ranks <= k, 1 / ranks, 0.0).mean())


def hit_rate(ranks: np.ndarray, k: int) -> float:
    return float((ranks <= k).mean())


def ndcg(ranks: np.ndarray, k: int) -> float:
    """One relevant item per row, so the ideal gain is 1."""
    return float(np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0).mean())


def ranking_scores(ranks: np.ndarray, k: int) -> dict[str, float]:
    return {f"mrr@{k}": mean_reciprocal_rank(ranks, k), f"hr@{k}": hit_rate(ranks, k), f"ndcg@{k}": ndcg(ranks, k)}


def accuracy_scores(ranks: np.ndarray, k: int) -> dict[str, float]:
    """The share of rows whose class is among the k best; k = 1 is accuracy as usual."""
    return {"accuracy" if k == 1 else f"accuracy@{k}": hit_rate(ranks, k)}


# What a task reports; the first score of each selects the best state on validation.
METRICS = {"ranking": ranking_scores, "accuracy": accuracy_scores}


def score(ranks: np.ndarray, metric: str, k: int) -> dict[str, float]:
    return {**METRICS[metric](ranks, k), "n": len(ranks)}


def evaluate(
    model: NextItNet, data: TaskData, stage: Stage, metric: str, k: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """For each held-out split (validation, test, and heldout: both) its `METRICS[metric]` and number of rows `n`."""
    ranks = {split: rank_examples(model, data, data.splits[split], stage, device) for split in ("validation", "test")}
    ranks["heldout"] = np.concatenate(list(ranks.values()))
    return {split: score(each, metric, k) for split, each in ranks.items()}
