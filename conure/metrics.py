"""Metrics counted from ranks, and how well they are known."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import torch
from torch import Tensor

RESAMPLES = 2000  # of a bootstrap
INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Protocol:
    """How a task is evaluated."""

    metric: str = "ranking"  # one of METRICS
    top_k: int = 5
    leave_out: str = "nothing"  # or "targets": of the training part; or "known": those and the row's items
    all_positions: bool = False  # rank the next item at every position too


@dataclass
class Ranks:
    """Where the targets of N examples rank, from 1; and of M positions, if those are asked for."""

    users: np.ndarray  # (N,) the row of each example
    targets: np.ndarray  # (N,)
    ranks: np.ndarray  # (N,) without what is left out
    raw: np.ndarray  # (N,) among all
    position_users: np.ndarray  # (M,)
    position_ranks: np.ndarray  # (M,) without what is left out
    log_probabilities: np.ndarray  # (N, classes); (N, 0) unless the metric is accuracy

    def __add__(self, other: "Ranks") -> "Ranks":
        names = [field.name for field in fields(self)]
        return Ranks(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in names))

    def to_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: all but the log probabilities."""
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
    """One relevant item per row, so the ideal gain is 1."""
    return float(np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0).mean())


def balanced_accuracy(targets: np.ndarray, ranks: np.ndarray, k: int) -> float:
    """The mean over the classes that occur of the share of their rows that are right."""
    return float(pd.Series(ranks <= k).groupby(targets).mean().mean())


def auc(targets: np.ndarray, log_probabilities: np.ndarray) -> float:
    """The area under the ROC curve of each class against the others, (N, classes), averaged over those that occur.

    Class id c has column c - 1. By ranks (Mann and Whitney); equal scores count a half.
    """
    ranks, areas = pd.DataFrame(log_probabilities).rank().to_numpy(), []
    for target in np.unique(targets):
        own = ranks[targets == target, target - 1]
        above = own.sum() - len(own) * (len(own) + 1) / 2  # pairs in which the class's own row has the higher score
        areas.append(above / (len(own) * (len(ranks) - len(own))))
    return float(np.mean(areas))


def ranking_scores(ranks: Ranks, k: int) -> dict[str, float]:
    """MRR, HR and NDCG at k, first that of all positions if they were ranked; `_raw`: nothing is left out."""
    scores = {f"mrr@{k}_all": mean_reciprocal_rank(ranks.position_ranks, k)} if len(ranks.position_ranks) else {}
    scores |= {f"mrr@{k}": mean_reciprocal_rank(ranks.ranks, k)}
    scores |= {f"hr@{k}": hit_rate(ranks.ranks, k), f"ndcg@{k}": ndcg(ranks.ranks, k)}
    return scores | {f"mrr@{k}_raw": mean_reciprocal_rank(ranks.raw, k)}


def accuracy_scores(ranks: Ranks, k: int) -> dict[str, float]:
    """The share of rows whose class is among the k best, of all and averaged over classes; the AUC, if two occur."""
    suffix = "" if k == 1 else f"@{k}"
    scores = {f"accuracy{suffix}": hit_rate(ranks.ranks, k)}
    scores |= {f"balanced_accuracy{suffix}": balanced_accuracy(ranks.targets, ranks.ranks, k)}
    if np.ptp(ranks.targets) and ranks.log_probabilities.size:
        scores["auc"] = auc(ranks.targets, ranks.log_probabilities)
    return scores


# What a task reports; the first score of each selects the best state on validation.
METRICS = {"ranking": ranking_scores, "accuracy": accuracy_scores}


def score(ranks: Ranks, protocol: Protocol) -> dict[str, float]:
    """The task's metrics, and the number of examples, `n`."""
    return {**METRICS[protocol.metric](ranks, protocol.top_k), "n": len(ranks.ranks)}


def first_values(ranks: Ranks, protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
    """What the task's first score is the mean of, (N,), and the user of each, (N,)."""
    if protocol.metric == "accuracy":
        return (ranks.ranks <= protocol.top_k).astype(float), ranks.users
    if len(ranks.position_ranks):
        return reciprocal_ranks(ranks.position_ranks, protocol.top_k), ranks.position_users
    return reciprocal_ranks(ranks.ranks, protocol.top_k), ranks.users


def resampled_means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(RESAMPLES,) means of a score by bootstrap over users, and over runs: users come with all that they have.

    `sums`, `counts` (runs, users): of each user's scores in each run, and how many they are.
    """
    random, (runs, users), means = np.random.default_rng(10), sums.shape, []
    for _ in range(RESAMPLES):
        weights = np.bincount(random.integers(users, size=users), minlength=users)
        drawn = random.integers(runs, size=runs)
        means.append((sums @ weights)[drawn].sum() / (counts @ weights)[drawn].sum())
    return np.array(means)


def interval(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """The 95 % interval of a mean over one or several runs, each with values (N,) and the user of each (N,)."""
    users, user = np.unique(np.concatenate([users for _, users in runs]), return_inverse=True)
    parts = np.split(user, np.cumsum([len(values) for values, _ in runs])[:-1])
    sums = [np.bincount(part, values, len(users)) for part, (values, _) in zip(parts, runs)]
    counts = [np.bincount(part, minlength=len(users)) for part in parts]
    low, high = np.percentile(resampled_means(np.stack(sums), np.stack(counts)), INTERVAL)
    return float(low), float(high)
