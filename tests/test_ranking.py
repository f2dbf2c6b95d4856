"""Ranks compared with a slow implementation of their definition."""

import math
from pathlib import Path
from types import SimpleNamespace

from conure import matmul, ranking
from conure.metrics import Protocol
from conure.vocabulary import Vocabulary

import numpy as np
import pytest
import torch

import data_loader
from data_loader import Split, TaskData
from nextitnet import NextItNet
from pruning import Stage

CPU = torch.device("cpu")


def test_ties_rank_above_the_target():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 6, (200, 12), generator=generator).float()  # many ties
    scores[3, 5] = scores[4, 0] = math.nan
    targets = torch.randint(0, 12, (200,), generator=generator)
    targets[4] = 0
    expected = [
        1 + sum(not row[item] < row[target] for item in range(12) if item != target)
        for row, target in zip(scores.tolist(), targets.tolist())
    ]
    assert ranking.target_ranks(scores, targets).tolist() == expected
    assert expected[4] == 12  # a target whose score is NaN ranks last


def test_constant_scores_rank_every_target_last():
    assert (ranking.target_ranks(torch.zeros(3, 9), torch.tensor([0, 4, 8])) == 9).all()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(ranking, "EVALUATION_BATCH", 16)
    monkeypatch.setattr(ranking, "SCORES_AT_ONCE", 200)
    monkeypatch.setattr(ranking, "COMPARED_AT_ONCE", 7)
    monkeypatch.setattr(matmul, "CPU_COLUMNS", 9)


def make_model() -> NextItNet:
    torch.manual_seed(1)
    model = NextItNet(items=50, channels=8, dilations=[1, 4], kernel_size=3)
    model.add_head(2, 31)
    return model


@pytest.fixture
def data() -> dict[int, TaskData]:
    """Tasks 1 and 2: 30 rows with repeats and padding; some items have the token of a target; all in random order."""
    random = np.random.default_rng(1)
    tokens = ["<UNK>", "0", *map(str, range(1, 49))]
    items = Vocabulary(tokens)
    targets = Vocabulary(["<UNK>", *random.permutation(tokens[2:])[:20].tolist(), *"abcdefghij"])
    rows = random.integers(2, 50, (30, 12)).astype(np.int32)
    rows[np.arange(12) < random.integers(0, 10, 30)[:, None]] = 1

    def task(users: np.ndarray, wanted: np.ndarray, vocabulary: Vocabulary) -> TaskData:
        splits = dict(zip(("train", "validation", "test"), np.array_split(random.permutation(len(users)), 3)))
        arrays = {"rows": rows, "users": users, "targets": wanted.astype(np.int32)}
        return TaskData(**arrays, items=items, target_vocabulary=vocabulary, splits=splits, padding_id=1)

    first = task(np.arange(30), random.integers(2, 50, 30), items)
    return {1: first, 2: task(random.integers(0, 30, 200), random.integers(1, 31, 200), targets)}


class Fixed(ranking.Scorer):
    """The same scores for all rows."""

    def __init__(self, scores: np.ndarray):
        self.fixed, self.size, self.device = torch.from_numpy(scores), len(scores), CPU

    def last_states(self, rows: np.ndarray) -> torch.Tensor:
        return torch.empty(len(rows), 0)

    def states(self, rows: np.ndarray) -> torch.Tensor:
        return torch.empty(len(rows), 12, 0)

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        return self.fixed.repeat(len(states), 1)


@pytest.mark.parametrize("leave_out", ["nothing", "targets", "known"])
@pytest.mark.parametrize("task", [1, 2])
def test_popularity_ranks_by_what_is_in_training(small_blocks, data, task, leave_out):
    data, protocol = data[task], Protocol(leave_out=leave_out, all_positions=task == 1)
    train, examples = data.splits["train"], data.splits["test"]
    chosen = [*data.targets[train].tolist(), *(data.rows[train].ravel().tolist() if task == 1 else [])]
    counts = np.array([chosen.count(id) * (task == 2 or id != 1) for id in range(len(data.target_vocabulary))])
    expected = ranking.rank_by(Fixed(counts - np.arange(len(counts)) / 1000), data, examples, protocol)
    found = ranking.rank_by_popularity(data, examples, protocol)
    for name in ("users", "targets", "ranks", "raw", "position_users", "position_ranks"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def slow_rank(scores: np.ndarray, target: int, left_out: set[int]) -> int:
    return 1 + sum(
        scores[other] >= scores[target] for other in range(1, len(scores)) if other not in {target, *left_out}
    )


def tokens_of(vocabulary: Vocabulary, ids: np.ndarray) -> set[str]:
    return {vocabulary.tokens[id] for id in ids}


@pytest.mark.parametrize("leave_out", ["nothing", "targets", "known"])
@pytest.mark.parametrize("task", [1, 2])
def test_ranks_leave_out_what_the_user_is_known_to_have_chosen(small_blocks, data, task, leave_out):
    """In the order of the examples, for small blocks and any number of examples per row."""
    data, model, stage = data[task], make_model(), Stage(task, "inference")
    examples = np.concatenate([data.splits["test"], data.splits["validation"]])
    protocol = Protocol(leave_out=leave_out)
    ranks = ranking.rank(model, data, examples, stage, CPU, protocol)
    with torch.no_grad():
        scores = model.scores(torch.from_numpy(data.rows[data.users[examples]]).long(), stage).numpy()
    train, raw, expected = data.splits["train"], [], []
    for example, row in zip(examples, scores):
        user, target = data.users[example], data.targets[example]
        left_out = set(data.targets[train[data.users[train] == user]]) if leave_out != "nothing" else set()
        if leave_out == "known":
            there = tokens_of(data.items, data.rows[user])
            left_out |= {id for token, id in data.target_vocabulary.ids.items() if token in there}
        raw.append(slow_rank(row, target, set()))
        expected.append(slow_rank(row, target, left_out))
    assert ranks.raw.tolist() == raw and ranks.ranks.tolist() == expected
    assert (raw == expected) == (leave_out == "nothing" or (leave_out, task) == ("targets", 1))
    assert (ranks.users == data.users[examples]).all() and (ranks.targets == data.targets[examples]).all()
    assert ranks.log_probabilities.shape == (len(examples), 0) and len(ranks.position_ranks) == 0


@pytest.mark.parametrize("leave_out", ["nothing", "known"])
@pytest.mark.parametrize("most", [1 << 14, 60])
def test_the_next_item_is_ranked_at_every_position(small_blocks, data, monkeypatch, leave_out, most):
    """Positions of padding do not count; if there are too many positions, those of the first rows count."""
    monkeypatch.setattr(ranking, "MAX_POSITIONS", most)
    data, model, stage = data[1], make_model(), Stage(1, "inference")
    examples = data.splits["test"]
    ranks = ranking.rank(model, data, examples, stage, CPU, Protocol(leave_out=leave_out, all_positions=True))
    users, expected = [], []
    for example in examples:
        inputs = data.rows[example]
        sequence = [*inputs, data.targets[example]]
        with torch.no_grad():
            scores = model.head(1)(model(torch.from_numpy(inputs).long()[None], stage)[0]).numpy()
        own = [
            slow_rank(scores[t], sequence[t + 1], set(sequence[: t + 1]) if leave_out == "known" else set())
            for t in range(len(inputs))
            if sequence[t] != 1
        ]
        if len(expected) + len(own) > most:
            break
        expected += own
        users += [example] * len(own)
    assert ranks.position_ranks.tolist() == expected and ranks.position_users.tolist() == users
    assert len(expected) > 40 and (len(set(users)) < len(examples)) == (most == 60)


def test_ranks_of_classes_come_with_log_probabilities(small_blocks, data):
    data, model, stage = data[2], make_model(), Stage(2, "inference")
    ranks = ranking.rank(model, data, data.splits["test"], stage, CPU, Protocol("accuracy", 1))
    with torch.no_grad():
        scores = model.scores(torch.from_numpy(data.rows[ranks.users]).long(), stage)[:, 1:]
    assert ranks.log_probabilities == pytest.approx(scores.log_softmax(dim=1).numpy(), abs=1e-5)


def write_task(path: Path, again: int) -> TaskData:
    """Task 2 of 400 users with one target each; for `again` users the target is an item of their row."""
    lines = [f"a,b{user},c,,{'c' if user < again else 'd'}\n" for user in range(400)]
    path.write_text("".join(lines))
    items = Vocabulary(["<UNK>", "a", "c", "d"])
    return data_loader.load_examples(str(path), Split(0.01), items)


def test_leave_out_auto_depends_on_how_often_items_recur(tmp_path):
    hp = SimpleNamespace(leave_out="auto", top_k=5)
    for again, expected in ((1, "known"), (40, "targets")):
        assert ranking.protocol_of(hp, "ranking", write_task(tmp_path / "2.csv", again)).leave_out == expected
    assert ranking.protocol_of(SimpleNamespace(top_k=1), "accuracy", None) == Protocol("accuracy", 1)
