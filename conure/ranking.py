"""Exact ranks of targets among all items or classes, or among those that the user is not known to have chosen."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from conure import processes
from conure.errors import InputError
from conure.matmul import wide_linear
from conure.metrics import Protocol, Ranks

import numpy as np
import torch
from torch import Tensor

from data_loader import TaskData, pad_left
from nextitnet import NextItNet
from pruning import Stage

EVALUATION_BATCH = 256  # fixed, because a matrix product's last bits may depend on its shape
COMPARED_AT_ONCE = 8192  # scores of a row, few enough to stay in a CPU's cache
SCORES_AT_ONCE = 1 << 26  # 256 MB for any number of items
MAX_POSITIONS = 1 << 14  # ranked in a split; or as many as it has examples, if those are more
MAX_CLASSES = 1000  # up to which probabilities are kept, for the AUC
RARELY = 0.01  # share of recurring targets up to which `auto` leaves out a row's items


def left_out(hp: Any, data: TaskData) -> str:
    """The hyperparameter `leave_out`, where the data decide what `auto` means; "nothing" for a task without it."""
    if getattr(hp, "leave_out", "nothing") != "auto":
        return getattr(hp, "leave_out", "nothing")
    if recurring(data) <= RARELY:
        return "known"
    return "nothing" if data.is_task_1 else "targets"  # task 1 has one target a row


def protocol_of(hp: Any, metric: str, data: TaskData) -> Protocol:
    """How a task with these hyperparameters is scored."""
    return Protocol(metric, hp.top_k, left_out(hp, data), getattr(hp, "all_positions", False))


def as_targets(data: TaskData) -> Callable[[np.ndarray], np.ndarray]:
    """A function from item ids, of any shape, to the ids int32 of the targets with the same tokens, 0 for none."""
    if data.is_task_1:
        return lambda items: items
    targets = data.target_vocabulary.look_up(data.items.tokens)
    if data.padding_id >= 0:
        targets[data.padding_id] = 0  # a target `0` is not padding
    return targets.__getitem__


def recurring(data: TaskData) -> float:
    """The share of recurring targets: training targets that are among their row's items."""
    train, to_targets = data.splits["train"], as_targets(data)
    parts = np.array_split(train, len(train) * data.rows.shape[1] // SCORES_AT_ONCE + 1)
    again = ((to_targets(data.rows[data.users[part]]) == data.targets[part, None]).any(axis=1).sum() for part in parts)
    return sum(map(int, again)) / max(len(train), 1)


class Known:
    """The targets that the user of each row is known to have chosen."""

    def __init__(self, data: TaskData, leave_out: str):
        self.data = data
        self.to_targets = as_targets(data) if leave_out == "known" else None
        train = data.splits["train"] if leave_out != "nothing" else np.empty(0, np.int64)
        by_row = train[np.argsort(data.users[train], kind="stable")]
        self.targets = data.targets[by_row]
        self.first = np.searchsorted(data.users[by_row], np.arange(len(data.rows) + 1))  # of each row in `targets`

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """(R, M) distinct target ids, filled up with 0. With "known" the row's items come first, in their positions."""
        begin, end = self.first[rows], self.first[rows + 1]
        counts = end - begin
        places = np.repeat(begin - np.concatenate([[0], counts[:-1].cumsum()]), counts) + np.arange(counts.sum())
        known = pad_left(self.targets[places], counts, int(counts.max(initial=0)), 0)
        if self.to_targets:
            known = np.concatenate([self.to_targets(self.data.rows[rows]), known], axis=1)
        return without_repeats(known)


def without_repeats(ids: np.ndarray) -> np.ndarray:
    """(R, M) → the same, with 0 for every id that already occurred in its row."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = 0
    distinct = np.empty_like(ids)
    np.put_along_axis(distinct, order, ordered, axis=1)
    return distinct


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Ranks (B,), from 1, of `targets` (B,) by `scores` (B, n). Ties and NaN count against the model."""
    own = scores.gather(1, targets[:, None])
    lower = sum((part < own).sum(dim=1, dtype=torch.int32) for part in scores.split(COMPARED_AT_ONCE, dim=1))
    return scores.shape[1] - lower.long()


def known_before(scores: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """How many of `known` (B, M) rank before the target, (B,); id 0 and the target itself do not count."""
    before = ~(scores.gather(1, known) < scores.gather(1, targets[:, None]))
    return (before & (known > 0) & (known != targets[:, None])).sum(dim=1)


class Scorer(ABC):
    """Scores all targets of a task for rows of its data."""

    device: torch.device
    size: int  # of the targets, <UNK> included

    @abstractmethod
    def last_states(self, rows: np.ndarray) -> Tensor:
        """(R, C): the state of each whole row, as `scores` takes it."""

    @abstractmethod
    def states(self, rows: np.ndarray) -> Tensor:
        """(R, T, C): the state at each position, which depends on the row up to there."""

    @abstractmethod
    def scores(self, states: Tensor) -> Tensor:
        """(B, size) from states (B, C), with B at most `at_once`; the next call may overwrite the result."""


class ModelScorer(Scorer):
    """Scores by the model, with the weights that a stage reads. InputError if the model has diverged."""

    def __init__(self, model: NextItNet, data: TaskData, stage: Stage, device: torch.device):
        model.eval()
        self.model, self.data, self.stage, self.device = model, data, stage, device
        self.head = model.head(stage.task)
        self.size = self.head.out_features
        self.buffer = torch.empty(at_once(self.size), self.size, device=device)

    def inputs(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.data.rows[rows]).long().to(self.device)

    def last_states(self, rows: np.ndarray) -> Tensor:
        return self.model.user_representation(self.inputs(rows), self.stage)

    def states(self, rows: np.ndarray) -> Tensor:
        return self.model(self.inputs(rows), self.stage)

    def scores(self, states: Tensor) -> Tensor:
        if not states.isfinite().all():
            raise InputError("the model's hidden states are not finite: train it again with a lower --learning_rate")
        scores = self.buffer[: len(states)]
        wide_linear(states, self.head.weight, self.head.bias, out=scores)
        return scores


def at_once(size: int) -> int:
    """How many rows of scores are computed at once."""
    return min(EVALUATION_BATCH, max(1, SCORES_AT_ONCE // size))


def positions(data: TaskData, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Task 1: rows (R,) of the examples, the next item at each position (R, T), and where neither is padding (R, T).

    If there are too many positions, only the first rows.
    """
    rows = data.users[examples]
    labels = np.column_stack([data.rows[rows][:, 1:], data.targets[examples]])
    real = (labels != data.padding_id) & (data.rows[rows] != data.padding_id)
    enough = np.searchsorted(real.sum(axis=1).cumsum(), max(MAX_POSITIONS, len(examples)), side="right")
    rows, labels, real = (each[: max(enough, 1)] for each in (rows, labels, real))
    return rows, labels, real


class Ranker:
    """Ranks a task's targets; each of several processes ranks its share."""

    def __init__(self, scorer: Scorer, data: TaskData, leave_out: str = "nothing"):
        self.scorer, self.data, self.known = scorer, data, Known(data, leave_out)
        self.at_once = at_once(scorer.size)

    def scores(self, states: Tensor) -> Tensor:
        scores = self.scorer.scores(states)
        scores[:, 0] = -torch.inf  # <UNK> is no candidate
        return scores

    def to_device(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(ids).long().to(self.scorer.device)

    def batches(self, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """This process's batches: their slice of `rows`, the rows in it, and the known targets of each."""
        shard = processes.own_shard()
        for start in range(shard.number * EVALUATION_BATCH, len(rows), shard.count * EVALUATION_BATCH):
            part = slice(start, min(start + EVALUATION_BATCH, len(rows)))
            yield part, rows[part], self.known.of_rows(rows[part])

    @torch.no_grad()
    def rank(self, examples: np.ndarray, probabilities: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ranks (N,) of the examples' targets without what is left out, ranks (N,) among all targets, and with
        `probabilities` the log probabilities (N, size - 1) of all targets but `<UNK>`.

        Each row is encoded once, however many examples it has.
        """
        rows, row_of = np.unique(self.data.users[examples], return_inverse=True)
        by_row = np.argsort(row_of, kind="stable")
        first = np.searchsorted(row_of[by_row], np.arange(len(rows) + 1))  # of each row's examples in `by_row`
        ranks = torch.zeros(2, len(examples), dtype=torch.int64, device=self.scorer.device)
        logs = torch.zeros(len(examples), (self.scorer.size - 1) * probabilities, device=self.scorer.device)
        for batch, batch_rows, known in self.batches(rows):
            states = self.scorer.last_states(batch_rows)
            for begin in range(first[batch.start], first[batch.stop], self.at_once):
                part = by_row[begin : min(begin + self.at_once, first[batch.stop])]
                own = row_of[part] - batch.start
                scores, targets = self.scores(states[own]), self.to_device(self.data.targets[examples[part]])
                raw = target_ranks(scores, targets)
                ranks[:, part] = torch.stack([raw - known_before(scores, targets, self.to_device(known[own])), raw])
                if probabilities:
                    logs[part] = scores[:, 1:].float().log_softmax(dim=1)
        return (*processes.total(ranks).cpu().numpy(), processes.total(logs).cpu().numpy())

    @torch.no_grad()
    def rank_positions(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Task 1: rows (M,) and ranks (M,) of the next item at all positions of the examples' rows but padding.

        What is left out at a position is limited to the items before it.
        """
        rows, labels, real = positions(self.data, examples)
        first = np.concatenate([[0], real.sum(axis=1).cumsum()])  # of each row's positions among all
        ranks = torch.zeros(first[-1], dtype=torch.int64, device=self.scorer.device)
        for batch, batch_rows, known in self.batches(rows):
            row, place = real[batch].nonzero()
            states = self.scorer.states(batch_rows)[self.to_device(row), self.to_device(place)]
            for begin in range(0, len(row), self.at_once):
                part = slice(begin, begin + self.at_once)
                earlier = np.where(np.arange(known.shape[1]) <= place[part, None], known[row[part]], 0)
                scores, targets = self.scores(states[part]), self.to_device(labels[batch][row[part], place[part]])
                before = known_before(scores, targets, self.to_device(earlier))
                places = slice(first[batch.start] + begin, first[batch.start] + begin + len(targets))
                ranks[places] = target_ranks(scores, targets) - before
        return np.repeat(rows, np.diff(first)), processes.total(ranks).cpu().numpy()


def rank_by(scorer: Scorer, data: TaskData, examples: np.ndarray, protocol: Protocol) -> Ranks:
    """Ranks of the targets of `examples`, in their order, by a scorer."""
    ranker = Ranker(scorer, data, protocol.leave_out)
    ranks, raw, logs = ranker.rank(examples, protocol.metric == "accuracy" and scorer.size <= MAX_CLASSES)
    positions = ranker.rank_positions(examples if protocol.all_positions else examples[:0])
    return Ranks(data.users[examples], data.targets[examples], ranks, raw, *positions, logs)


def rank_by_popularity(data: TaskData, examples: np.ndarray, protocol: Protocol) -> Ranks:
    """The baseline: ranks of the targets of `examples`, in their order, by how often a target is in training.

    In task 1 the items at all positions count. Ties are ranked by id.
    """
    known, counts = Known(data, protocol.leave_out), data.target_counts()
    if data.is_task_1:
        counts += np.bincount(data.rows[data.users[data.splits["train"]]].ravel(), minlength=len(counts))
        if data.padding_id >= 0:
            counts[data.padding_id] = 0
    counts[0] = -1  # <UNK> comes last
    places = np.empty(len(counts), np.int64)
    places[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)

    def ranks(rows: np.ndarray, targets: np.ndarray, seen: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(rows), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            left_out, own = known.of_rows(rows[part]), places[targets[part]]
            left_out = np.where(np.arange(left_out.shape[1]) <= seen[part, None], left_out, 0)
            found.append(own - ((left_out > 0) & (places[left_out] < own[:, None])).sum(axis=1))
        return np.concatenate([np.empty(0, np.int64), *found])

    rows, labels, real = positions(data, examples if protocol.all_positions else examples[:0])
    row, place = real.nonzero()
    users, targets = data.users[examples], data.targets[examples]
    own = ranks(users, targets, np.full(len(users), np.iinfo(np.int64).max))
    at_positions = ranks(rows[row], labels[row, place], place)
    return Ranks(users, targets, own, places[targets], rows[row], at_positions, np.zeros((len(users), 0)))


def rank(
    model: NextItNet, data: TaskData, examples: np.ndarray, stage: Stage, device: torch.device, protocol: Protocol
) -> Ranks:
    """Ranks of the targets of `examples`, in their order, by a model. InputError if it has diverged."""
    return rank_by(ModelScorer(model, data, stage, device), data, examples, protocol)


def rank_held_out(
    model: NextItNet, data: TaskData, stage: Stage, device: torch.device, protocol: Protocol
) -> dict[str, Ranks]:
    """Ranks of validation, of test, and of both together: heldout, which is the original's test part."""
    ranks = {split: rank(model, data, data.splits[split], stage, device, protocol) for split in ("validation", "test")}
    return ranks | {"heldout": ranks["validation"] + ranks["test"]}
