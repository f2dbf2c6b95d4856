"""Metrics of ranks, and their confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import torch
from torch import Tensor

RESAMPLES = 2000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles of the resampled means


@dataclass(frozen=True)
class Protocol:
    """How a task is evaluated."""

    metric: str = "ranking"  # one of METRICS
    top_k: int = 5
    leave_out: str = "nothing"  # or "targets": the user's in training; or "known": these and the row's items
    all_positions: bool = False  # also rank the next item at every position


@dataclass
class Ranks:
    """The ranks, from 1, of the targets of N examples and, with `all_positions`, of the next items at M positions."""

    users: np.ndarray  # (N,) row of each example
    targets: np.ndarray  # (N,)
    ranks: np.ndarray  # (N,) among the targets that are not left out
    raw: np.ndarray  # (N,) among all targets
    position_users: np.ndarray  # (M,) row of each position
    position_ranks: np.ndarray  # (M,) as `ranks`
    log_probabilities: np.ndarray  # (N, classes); (N, 0) unless the metric is accuracy

    def __add__(self, other: "Ranks") -> "Ranks":
        names = [field.name for field in fields(self)]
        return Ranks(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in names))

    def to_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores: everything but the log probabilities."""
        names = [field.name for field in fields(self) if field.name != "log_probabilities"]
        return {name: torch.from_numpy(getattr(self, name).astype(np.int32)) for name in names}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Ranks":
        ranks = {name: tensor.numpy() for name, tensor in tensors.items()}
        return cls(**ranks, log_probabilities=np.zeros((len(ranks["users"]), 0)))


def reciprocal_ranks(ranks: np.ndarray, k: int) -> np.ndarray:
    return np.where(ranks <= k, 1 / ranks, 0.0)


def mean_reciprocal_rank(ranks: np.ndarray, k: int) -> float:
    return float(reciprocal_ranks(ranks, k).mean())


def hit_rate(ranks: np.ndarray, k: int) -> float:
    return float((ranks <= k).mean())


def ndcg(ranks: np.ndarray, k: int) -> float:
    """Each example has one relevant target, so the ideal DCG is 1."""
    return float(np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0).mean())


def balanced_accuracy(targets: np.ndarray, ranks: np.ndarray, k: int) -> float:
    """The recall at k of each class that occurs, averaged over classes."""
    return float(pd.Series(ranks <= k).groupby(targets).mean().mean())


def auc(targets: np.ndarray, log_probabilities: np.ndarray) -> float:
    """One-versus-rest area under the ROC curve, averaged over the classes that occur.

    `log_probabilities` (N, classes): class id c has column c - 1. By the Mann-Whitney U statistic; ties count a half.
    """
    ranks, areas = pd.DataFrame(log_probabilities).rank().to_numpy(), []
    for target in np.unique(targets):
        own = ranks[targets == target, target - 1]
        above = own.sum() - len(own) * (len(own) + 1) / 2  # pairs in which the class's row scores higher
        areas.append(above / (len(own) * (len(ranks) - len(own))))
    return float(np.mean(areas))


def ranking_scores(ranks: Ranks, k: int) -> dict[str, float]:
    """MRR, HR and NDCG at k, preceded by the MRR at all positions if they were ranked; `_raw`: nothing left out."""
    scores = {f"mrr@{k}_all": mean_reciprocal_rank(ranks.position_ranks, k)} if len(ranks.position_ranks) else {}
    scores |= {f"mrr@{k}": mean_reciprocal_rank(ranks.ranks, k)}
    scores |= {f"hr@{k}": hit_rate(ranks.ranks, k), f"ndcg@{k}": ndcg(ranks.ranks, k)}
    return scores | {f"mrr@{k}_raw": mean_reciprocal_rank(ranks.raw, k)}


def accuracy_scores(ranks: Ranks, k: int) -> dict[str, float]:
    """Top-k accuracy, balanced accuracy and, if two classes occur, AUC."""
    suffix = "" if k == 1 else f"@{k}"
    scores = {f"accuracy{suffix}": hit_rate(ranks.ranks, k)}
    scores |= {f"balanced_accuracy{suffix}": balanced_accuracy(ranks.targets, ranks.ranks, k)}
    if np.ptp(ranks.targets) and ranks.log_probabilities.size:
        scores["auc"] = auc(ranks.targets, ranks.log_probabilities)
    return scores


# Metric → the scores of a task. Training keeps the weights with the best first score on validation.
METRICS = {"ranking": ranking_scores, "accuracy": accuracy_scores}


def score(ranks: Ranks, protocol: Protocol) -> dict[str, float]:
    """The task's scores, and the number of examples, `n`."""
    return {**METRICS[protocol.metric](ranks, protocol.top_k), "n": len(ranks.ranks)}


def first_score(ranks: Ranks, protocol: Protocol) -> tuple[str, float]:
    """The name and the value of the task's first score."""
    return next(iter(score(ranks, protocol).items()))


def first_values(ranks: Ranks, protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
    """The values (N,) whose mean is the task's first score, and the user of each (N,)."""
    if protocol.metric == "accuracy":
        return (ranks.ranks <= protocol.top_k).astype(float), ranks.users
    if len(ranks.position_ranks):
        return reciprocal_ranks(ranks.position_ranks, protocol.top_k), ranks.position_users
    return reciprocal_ranks(ranks.ranks, protocol.top_k), ranks.users


def resampled_ratios(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """(RESAMPLES,) ratios of two sums by a bootstrap that resamples users, each with all of their values, and runs.

    `above`, `below` (runs, users): what each user adds to the two sums in each run.
    """
    random, (runs, users), ratios = np.random.default_rng(10), above.shape, []
    for _ in range(RESAMPLES):
        weights = np.bincount(random.integers(users, size=users), minlength=users)
        drawn = random.integers(runs, size=runs)
        ratios.append((above @ weights)[drawn].sum() / (below @ weights)[drawn].sum())
    return np.array(ratios)


def interval(
    runs: Sequence[tuple[np.ndarray, np.ndarray]], over: Sequence[np.ndarray] | None = None
) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean over runs, each given by values (N,) and the user of each (N,).

    With `over`, other values (N,) of the same examples in each run, it is that of the ratio of the two means.
    """
    users, user = np.unique(np.concatenate([users for _, users in runs]), return_inverse=True)
    values = [values for values, _ in runs]
    parts = np.split(user, np.cumsum(list(map(len, values)))[:-1])
    above, below = (
        np.stack([np.bincount(part, of_run, len(users)) for part, of_run in zip(parts, each)])
        for each in (values, over or map(np.ones_like, values))
    )
    low, high = np.percentile(resampled_ratios(above, below), INTERVAL)
    return float(low), float(high)
