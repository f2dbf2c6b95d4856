"""Files → ids → examples, splits and negative samplers.

Id 0 is `<UNK>`, which also separates a sequence from the place of its target; other ids count up in order of first
appearance in the file, as in the original's data_loader files. Rows of unequal length are padded on the left with the
token `0`.
"""

import ast
import hashlib
import io
import os
import re
from dataclasses import dataclass

from settings import InputError  # isort: skip (before torch, whose threads it tells how to wait)

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from files import whole_file
from ttl_format import read_lines

UNKNOWN = "<UNK>"  # id 0
PADDING = "0"  # an ordinary token to the original: it has an id, an embedding and a row in the softmax
MAX_INDEX_BYTES = 1 << 28  # two hundred times what 646,000 numbers take
SPLIT_SEED = 10  # the original's np.random.seed before it shuffles the rows


class Vocabulary:
    """Tokens and their ids, a bijection; id 0 is `<UNK>`."""

    def __init__(self, tokens: list[str] | None = None):
        self.tokens = tokens or [UNKNOWN]
        self.ids = {token: id for id, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def grow(self, tokens: list[str]) -> np.ndarray:
        """Ids of the tokens; new ones get the next ids in order."""
        for token in tokens:
            if self.ids.setdefault(token, len(self.tokens)) == len(self.tokens):
                self.tokens.append(token)
        return self.look_up(tokens)

    def look_up(self, tokens: list[str]) -> np.ndarray:
        """Ids of the tokens, 0 for those that are not here."""
        return np.array([self.ids.get(token, 0) for token in tokens], dtype=np.int32)

    def to_tensor(self) -> Tensor:
        """The tokens as one uint8 tensor, which a checkpoint keeps without pickling a list of strings."""
        return torch.frombuffer(bytearray("\n".join(self.tokens).encode()), dtype=torch.uint8)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_tensor().numpy()).hexdigest()

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "Vocabulary":
        return cls(tensor.numpy().tobytes().decode().split("\n"))

    def write(self, path: str) -> None:
        """Writes index.csv: a header `token,id`, then a line a token."""
        with whole_file(path) as file:
            pd.DataFrame({"token": self.tokens, "id": range(len(self))}).to_csv(file, index=False)


def read_index(path: str) -> Vocabulary:
    """The vocabulary in index.csv: ours, or the original's Python dict literal. InputError if it is neither."""
    again = "run `python conure_tp_t1.py` as before, which writes it again and leaves a finished stage alone"
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist: run `python conure_tp_t1.py` first, which writes it")
    if os.path.getsize(path) > MAX_INDEX_BYTES:
        raise InputError(f"{path} has more than {MAX_INDEX_BYTES:,} bytes, so it is no item index: {again}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        index = _parse_literal(text) if text.startswith("{") else _parse_csv(text)
        index = index.sort_values("id")
        tokens = index["token"].tolist()
        if not np.array_equal(index["id"], np.arange(len(tokens))) or tokens[:1] != [UNKNOWN]:
            raise ValueError(f"its ids must be 0, 1, 2, … and 0 be {UNKNOWN}")
        if len(set(tokens)) < len(tokens) or any("\n" in token for token in tokens):
            raise ValueError("its tokens must differ from each other and have no line ends")
    except (ValueError, KeyError, SyntaxError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{path} is no item index ({reason}): {again}") from None
    return Vocabulary(tokens)


def _parse_csv(text: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(text), dtype={"token": str, "id": np.int64}, keep_default_na=False)


def _parse_literal(text: str) -> pd.DataFrame:
    """{'token': id, …} pair by pair: as a whole it would take a hundred times its size, or be nested without end."""
    pair = re.compile(r"""[{,]\s*u?('(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")\s*:\s*(\d{1,9})L?\s*""")
    tokens, ids, position = [], [], 0
    while match := pair.match(text, position):
        token = match[1]
        tokens.append(ast.literal_eval(token) if "\\" in token else token[1:-1])
        ids.append(int(match[2]))
        position = match.end()
    if text[position:].strip() != "}":
        raise ValueError(f"no pair of token and id at {text[position : position + 20]!r}")
    return pd.DataFrame({"token": tokens, "id": ids})


@dataclass
class TaskData:
    """All examples of one task. Example i is `rows[users[i]]` with `targets[i]`.

    Task 1: rows (N, L-1) are the sequences without their last item, which is the target; one example a row.
    Later tasks: rows (U, L+1) are the sequences and the separator 0; one example for each target in a line.
    """

    path: str
    digest: str  # SHA-256 of the file
    rows: np.ndarray  # (U, T) int32, padded on the left
    users: np.ndarray  # (N,) int32
    targets: np.ndarray  # (N,) int32
    items: Vocabulary
    target_vocabulary: Vocabulary  # of the targets; `items` itself for task 1
    padding_id: int
    unknown_items: int  # places in the sequences, padding included, whose token is not in `items`
    unknown_targets: int
    splits: dict[str, np.ndarray]  # of example numbers: train, validation, test, and heldout = the last two

    def batch(self, examples: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs (B, T) and targets (B,), int64, of these examples."""
        inputs = torch.from_numpy(self.rows[self.users[examples]]).long()
        targets = torch.from_numpy(self.targets[examples]).long()
        return inputs.to(device), targets.to(device)

    def describe(self) -> list[str]:
        """Lines on where the data come from and how many there are."""
        splits = ", ".join(f"{len(self.splits[name]):,} {name}" for name in ("train", "validation", "test"))
        lines = [
            self.path,
            f"{len(self.rows):,} rows of {self.rows.shape[1]}; {len(self.items):,} item ids; "
            f"{len(self.target_vocabulary):,} target ids",
            f"{len(self.targets):,} examples: {splits}",
        ]
        if self.unknown_items or self.unknown_targets:
            lines.append(
                f"read as {UNKNOWN}: {self.unknown_items:,} of {self.rows.size:,} items, "
                f"{self.unknown_targets:,} of {len(self.targets):,} targets"
            )
        return lines


def load_sequences(path: str, test_fraction: float, items: Vocabulary | None = None) -> TaskData:
    """Task 1's data. Without `items` the vocabulary is made of the file's own tokens, held-out rows included."""
    items, fixed = items or Vocabulary(), items is not None
    digest = hashlib.sha256()
    parts = []
    for lines in read_lines(path, False, digest):
        ids = lines.encode(lines.is_source, items.look_up if fixed else items.grow)
        parts.append(lines.pad(ids))
    rows = _join(parts, items, fixed)
    if rows.shape[1] < 2:
        raise InputError(f"{path}: every sequence has one item only; task 1 needs a next item to predict")
    return TaskData(
        path=os.path.abspath(path),
        digest=digest.hexdigest(),
        rows=rows[:, :-1],
        users=np.arange(len(rows), dtype=np.int32),
        targets=rows[:, -1],
        items=items,
        target_vocabulary=items,
        padding_id=items.ids.get(PADDING, -1),
        unknown_items=int((rows == 0).sum()),
        unknown_targets=0,
        splits=_split(len(rows), test_fraction, path),
    )


def load_examples(
    path: str, test_fraction: float, items: Vocabulary, target_vocabulary: Vocabulary | None = None
) -> TaskData:
    """A later task's data. Without `target_vocabulary` it is made of the file's targets, held-out ones included."""
    target_vocabulary, fixed = target_vocabulary or Vocabulary(), target_vocabulary is not None
    digest = hashlib.sha256()
    parts, targets, users, row_count = [], [], [], 0
    for lines in read_lines(path, True, digest):
        parts.append(lines.pad(lines.encode(lines.is_source, items.look_up)))
        targets.append(lines.encode(~lines.is_source, target_vocabulary.look_up if fixed else target_vocabulary.grow))
        users.append((row_count + lines.rows[~lines.is_source]).astype(np.int32))
        row_count += len(parts[-1])
    rows = _join(parts, items, fixed=True)
    targets = np.concatenate(targets)
    if len(target_vocabulary) < 3:
        raise InputError(f"{path}: every target is the same; a task needs at least two to tell apart")
    return TaskData(
        path=os.path.abspath(path),
        digest=digest.hexdigest(),
        rows=np.pad(rows, ((0, 0), (0, 1))),  # the separator
        users=np.concatenate(users),
        targets=targets,
        items=items,
        target_vocabulary=target_vocabulary,
        padding_id=items.ids.get(PADDING, -1),
        unknown_items=int((rows == 0).sum()),
        unknown_targets=int((targets == 0).sum()),
        splits=_split(len(targets), test_fraction, path),
    )


def _split(count: int, test_fraction: float, path: str) -> dict[str, np.ndarray]:
    """The original's split, its held-out part halved: example numbers of train, validation, test, and heldout."""
    shuffled = np.random.RandomState(SPLIT_SEED).permutation(count)
    held_out = int(test_fraction * count)
    if held_out < 2 or held_out == count:
        raise InputError(
            f"{path}: {count} examples are too few to hold out {test_fraction:g} of them for validation and test"
        )
    train, heldout = np.split(shuffled, [count - held_out])
    validation, test = np.split(heldout, [held_out // 2])
    return {"train": train, "validation": validation, "test": test, "heldout": heldout}


def _join(parts: list[np.ndarray], items: Vocabulary, fixed: bool) -> np.ndarray:
    """The chunks' rows as one (N, L) array, shorter ones padded on the left with the id of `0`.

    If `0` stands nowhere in the file but is needed for padding, it becomes the last item.
    """
    width = max(part.shape[1] for part in parts)
    ragged = any(part.shape[1] < width or (part < 0).any() for part in parts)
    padding_id = (items.look_up if fixed or not ragged else items.grow)([PADDING])[0]
    rows = np.full((sum(map(len, parts)), width), padding_id, dtype=np.int32)
    filled = 0
    for part in parts:
        place = rows[filled : filled + len(part), width - part.shape[1] :]
        np.copyto(place, part, where=part >= 0)
        filled += len(part)
    return rows


class LogUniformSampler:
    """Negatives for the sampled softmax: distinct ids, id i drawn with probability ~ log((i + 2) / (i + 1)).

    TensorFlow's default candidate sampler, which takes small ids for frequent items.
    """

    def __init__(self, items: int, negative_fraction: float):
        self.items = items
        self.count = max(1, int(items * negative_fraction))
        ids = torch.arange(items, dtype=torch.float64)
        self.log_miss = torch.log1p(-torch.log1p(1 / (ids + 1)) / np.log(items + 1))  # log(1 - p)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, int]:
        """`count` distinct ids (S,), in order of drawing, and the number of draws that it took to find them."""
        drawn = torch.empty(0, dtype=torch.int64)
        while True:
            uniform = torch.rand(2 * self.count, generator=generator, dtype=torch.float64)
            more = (torch.exp(uniform * np.log(self.items + 1)) - 1).long().clamp(max=self.items - 1)
            drawn = torch.cat([drawn, more])
            found = torch.from_numpy(np.flatnonzero(~pd.Series(drawn.numpy()).duplicated()))
            if len(found) >= self.count:
                found = found[: self.count]
                return drawn[found], int(found[-1]) + 1

    def expected_count(self, ids: Tensor, draws: int) -> Tensor:
        """The probability that an id is among the distinct ids of so many draws, float32, of the shape of `ids`."""
        return -torch.expm1(draws * self.log_miss.to(ids.device)[ids]).float()


class TargetSampler:
    """One negative for each positive target, drawn from the probabilities of all others."""

    def __init__(self, probabilities: np.ndarray):
        """`probabilities` (targets - 1,): entry i belongs to target id i + 1; `<UNK>` is never drawn."""
        self.cumulative = torch.from_numpy(np.cumsum(probabilities) / np.sum(probabilities))

    def draw(self, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Ids (B,), on the device of `targets`."""
        positive = targets.cpu() - 1
        after = self.cumulative[positive]
        before = torch.where(positive > 0, self.cumulative[positive - 1], 0.0)
        point = torch.rand(len(targets), generator=generator, dtype=torch.float64) * (1 - (after - before))
        point = torch.where(point < before, point, point + (after - before))  # jumps over the positive's own interval
        ids = torch.searchsorted(self.cumulative, point, right=True).clamp(max=len(self.cumulative) - 1) + 1
        return ids.to(targets.device)


def static_probabilities(targets: np.ndarray, size: int, rho: float) -> np.ndarray:
    """LambdaFM's static sampler: p ~ exp(-(rank + 1) / (size * rho)), rank by falling frequency from 0.

    `targets` are all examples' target ids, held-out ones included as in the original; `size` counts `<UNK>`. Returns
    (size - 1,), entry i for id i + 1; of equally frequent targets the smaller id ranks first.
    """
    frequency = np.bincount(targets, minlength=size)[1:]
    rank = np.empty(size - 1)
    rank[np.argsort(-frequency, kind="stable")] = np.arange(size - 1)
    weight = np.exp(-rank / (size * rho))  # the + 1 of the formula cancels out, and could make all of them 0
    return weight / weight.sum()


def uniform_probabilities(size: int) -> np.ndarray:
    """Equal probabilities for target ids 1..size - 1."""
    return np.full(size - 1, 1 / (size - 1))
