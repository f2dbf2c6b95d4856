"""Files → ids → examples and splits.

Id 0 is `<UNK>`, which also separates a sequence from the place of its target; other ids count up in order of first
appearance in the file, as in the original's data_loader files. Rows of unequal length are padded on the left with the
token `0`.
"""

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from conure.errors import InputError
from conure.files import whole_file
from conure.line_reader import missing, read_lines

import numpy as np
import pandas as pd
import torch
from torch import Tensor

UNKNOWN = "<UNK>"  # id 0
PADDING = "0"  # an ordinary token to the original: it has an id, an embedding and a row in the softmax
MAX_INDEX_BYTES = 1 << 28  # two hundred times what 646,000 numbers take
MAX_TABLE = 1 << 24  # numbers below have a place in a table, of 64 MB at most
BLOCK_IDS = 1 << 23  # 32 MB; the memory of smaller arrays may stay with the process once they are freed


class Split(NamedTuple):
    """Which examples are held out, half of them for validation, half for test."""

    test_fraction: float = 0.2  # of the examples, or of the users
    seed: int = 10  # the original's np.random.seed before it shuffles the rows
    by: str = "example"  # or "user": whoever is held out is nowhere in training


class Vocabulary:
    """Tokens and their ids, a bijection; id 0 is `<UNK>`."""

    def __init__(self, tokens: list[str] | None = None):
        self.tokens = tokens or [UNKNOWN]
        self.ids = {token: id for id, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def grow(self, tokens: list[str]) -> np.ndarray:
        """Ids of the tokens, all different; new ones get the next ids in order."""
        before = len(self)
        ids = np.array([self.ids.setdefault(token, len(self.ids)) for token in tokens], dtype=np.int32)
        self.tokens += [tokens[place] for place in np.flatnonzero(ids >= before)]
        return ids

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

    def check_index(self, path: str) -> None:
        """InputError if index.csv holds other ids, which other checkpoints need; one that is unreadable serves none."""
        try:
            there = read_index(path).tokens
        except InputError:
            return
        if there != self.tokens:
            raise InputError(
                f"{path} holds the ids of other data, without which its checkpoints cannot be trained on: give another "
                "--index_path and --checkpoint_dir"
            )

    def write(self, path: str) -> None:
        """Writes index.csv: a header `token,id`, then a line a token."""
        with whole_file(path) as file:
            pd.DataFrame({"token": self.tokens, "id": range(len(self))}).to_csv(file, index=False)


def read_index(path: str) -> Vocabulary:
    """The vocabulary in index.csv, as `Vocabulary.write` writes it; InputError if it is anything else."""
    again = "run `python conure_tp_t1.py` as before, which writes it again and leaves a finished stage alone"
    if not os.path.exists(path):
        raise InputError(f"{missing(path)}: run `python conure_tp_t1.py` first, which writes it")
    if os.path.getsize(path) > MAX_INDEX_BYTES:
        raise InputError(f"{path} has more than {MAX_INDEX_BYTES:,} bytes, so it is no item index: {again}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            table = pd.read_csv(io.StringIO(file.read()), dtype=str, keep_default_na=False)
        if list(table.columns) != ["token", "id"]:
            raise ValueError("its first line must be `token,id`")
        tokens = table["token"].tolist()
        wrong_id = table["id"].to_numpy() != np.arange(len(table)).astype(str)
        if wrong_id.any():
            place = int(wrong_id.argmax())
            raise ValueError(f"line {place + 2}: the id must be {place}, not {str(table['id'][place])[:40]!r}")
        if tokens[:1] != [UNKNOWN]:
            raise ValueError(f"the token of id 0 must be {UNKNOWN}")
        if len(set(tokens)) < len(tokens) or any("\n" in token for token in tokens):
            raise ValueError("its tokens must differ from each other and have no line ends")
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{path} is no item index ({reason}): {again}") from None
    return Vocabulary(tokens)


class Encoder:
    """Gives tokens their ids, chunk by chunk; those of numbers are kept in a table, which no dict comes near."""

    def __init__(self, ids_of: Callable[[list[str]], np.ndarray]):
        """`ids_of` gives the ids (n,) int32 of n distinct tokens: a vocabulary's `grow` or `look_up`."""
        self.ids_of = ids_of
        self.table = np.empty(0, np.int32)  # number → id, -1 if it was not seen yet

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Ids (n,) int32 of n tokens: text, or int64 numbers that stand for their decimal text."""
        highest = MAX_TABLE if tokens.dtype == object else int(tokens.max())
        if highest >= MAX_TABLE:
            codes, distinct = pd.factorize(tokens)  # in order of first appearance
            return self.ids_of(list(map(str, distinct.tolist())))[codes]
        if highest >= len(self.table):
            self.table = np.pad(self.table, (0, highest + 1 - len(self.table)), constant_values=-1)
        ids = self.table[tokens]
        unseen = np.flatnonzero(ids < 0)
        new = pd.unique(tokens[unseen])
        self.table[new] = self.ids_of(new.astype(str).tolist())
        ids[unseen] = self.table[tokens[unseen]]
        return ids


def pad_left(ids: np.ndarray, lengths: np.ndarray, width: int, padding: int) -> np.ndarray:
    """Rows (n, width) of the ids of n rows, (lengths.sum(),), with padding in front of rows that are shorter."""
    if len(ids) == len(lengths) * width:
        return ids.reshape(len(lengths), width)
    rows = np.full((len(lengths), width), padding, dtype=np.int32)
    rows[np.arange(width) >= width - lengths[:, None]] = ids
    return rows


@dataclass
class Encoded:
    """A data file in ids."""

    digest: str  # SHA-256 of the file
    rows: np.ndarray  # (U, L) int32: the sequences, padded on the left, and where targets follow, the separator 0
    lines: np.ndarray  # (U,) int32: the line of each row, from 1
    users: np.ndarray  # (N,) int32: the row of each target; empty for task 1
    targets: np.ndarray  # (N,) int32; empty for task 1
    items: Vocabulary
    target_vocabulary: Vocabulary


def encode(
    path: str, with_targets: bool, items: Vocabulary | None, target_vocabulary: Vocabulary | None = None
) -> Encoded:
    """The file in ids; a vocabulary that is not given is made of the file's own tokens, held-out ones included.

    If `0` stands nowhere in a file of its own vocabulary but is needed for padding, it becomes the last item.
    InputError names the file, and the line that cannot be read.
    """
    items, item_ids = _ids_of(items)
    target_vocabulary, target_ids = _ids_of(target_vocabulary)
    encode_items, encode_targets = Encoder(item_ids), Encoder(target_ids)
    digest, lines, blocks, pieces = hashlib.sha256(), [], [], []
    targets, target_counts = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    for chunk in read_lines(path, with_targets, digest):
        lines.append(chunk.numbers)
        pieces.append((encode_items(chunk.tokens[0]), chunk.counts[0]))
        if sum(len(ids) for ids, _ in pieces) >= BLOCK_IDS:
            blocks.append(tuple(map(np.concatenate, zip(*pieces))))
            pieces = []
        if with_targets:
            targets.append(encode_targets(chunk.tokens[1]))
            target_counts.append(chunk.counts[1])
    blocks += pieces
    longest = max(int(lengths.max()) for _, lengths in blocks)
    shortest = min(int(lengths.min()) for _, lengths in blocks)
    padding = item_ids([PADDING])[0] if shortest < longest else 0
    lines = np.concatenate(lines)
    rows, end = np.zeros((len(lines), longest + with_targets), dtype=np.int32), len(lines)
    pieces.clear()
    while blocks:  # from the last one on, so that each is freed once it is in place
        part = pad_left(*blocks.pop(), longest, padding)
        rows[end - len(part) : end, :longest] = part
        end -= len(part)
    users = np.repeat(np.arange(len(rows) if with_targets else 0, dtype=np.int32), np.concatenate(target_counts))
    return Encoded(digest.hexdigest(), rows, lines, users, np.concatenate(targets), items, target_vocabulary)


def _ids_of(vocabulary: Vocabulary | None) -> tuple[Vocabulary, Callable[[list[str]], np.ndarray]]:
    """The vocabulary, or a new one that grows, and what gives the ids of tokens."""
    grown = Vocabulary()
    return (grown, grown.grow) if vocabulary is None else (vocabulary, vocabulary.look_up)


class Batch(NamedTuple):
    """Examples, of which several may have one row: example i is `inputs[row_of[i]]` with `targets[i]`."""

    rows: np.ndarray  # (R,) their numbers
    inputs: Tensor  # (R, T) int64
    row_of: Tensor  # (B,) int64, ascending
    targets: Tensor  # (B,) int64


@dataclass(kw_only=True)
class TaskData:
    """All examples of one task. Example i is `rows[users[i]]` with `targets[i]`.

    Task 1: rows (N, L-1) are the sequences without their last item, which is the target; one example a row.
    Later tasks: rows (U, L+1) are the sequences and the separator 0; one example for each target in a line.
    """

    path: str = ""
    digest: str = ""  # SHA-256 of the file
    split: Split = field(default_factory=Split)  # that made `splits`
    rows: np.ndarray  # (U, T) int32, padded on the left
    users: np.ndarray  # (N,) int32
    targets: np.ndarray  # (N,) int32
    items: Vocabulary
    target_vocabulary: Vocabulary  # of the targets; `items` itself for task 1
    padding_id: int = -1  # of `0`; -1: it is no item
    unknown_items: int = 0  # places in the sequences, padding included, whose token is not in `items`
    unknown_targets: int = 0
    # Of example numbers: train, validation, test, and heldout = the last two.
    splits: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what may not be meant

    def batch(self, examples: np.ndarray) -> Batch:
        """These examples (B,), in the order of their rows."""
        examples = examples[np.argsort(self.users[examples], kind="stable")]
        rows, row_of = np.unique(self.users[examples], return_inverse=True)
        ids = (torch.from_numpy(each).long() for each in (self.rows[rows], row_of, self.targets[examples]))
        return Batch(rows, *ids)

    def describe(self) -> list[str]:
        """Lines on where the data come from and how many there are."""
        splits = ", ".join(f"{len(self.splits[name]):,} {name}" for name in ("train", "validation", "test"))
        lines = [
            self.path,
            f"{len(self.rows):,} rows of {self.rows.shape[1]}; {len(self.items):,} item ids; "
            f"{len(self.target_vocabulary):,} target ids",
            f"{len(self.targets):,} examples: {splits}",
        ]
        lines += self.notes
        if self.unknown_items or self.unknown_targets:
            lines.append(
                f"read as {UNKNOWN}: {self.unknown_items:,} of {self.rows.size:,} items, "
                f"{self.unknown_targets:,} of {len(self.targets):,} targets"
            )
        return lines


def load_sequences(path: str, split: Split, items: Vocabulary | None = None) -> TaskData:
    """Task 1's data. Without `items` the vocabulary is made of the file's own tokens, held-out rows included."""
    encoded = encode(path, False, items)
    rows, items = encoded.rows, encoded.items
    notes = _check_padding(path, encoded, rows)
    if _has_one_item(rows, items, rows[:, -1:]):
        raise InputError(
            f"{path}, line {encoded.lines[0]}: one item only, as in every line; task 1 needs a next item to predict"
        )
    return TaskData(
        path=os.path.abspath(path),
        digest=encoded.digest,
        split=split,
        rows=rows[:, :-1],
        users=np.arange(len(rows), dtype=np.int32),
        targets=rows[:, -1],
        items=items,
        target_vocabulary=items,
        padding_id=items.ids.get(PADDING, -1),
        unknown_items=rows.size - np.count_nonzero(rows),
        splits=_split(np.arange(len(rows)), split, path),  # by user or example: each row is one
        notes=notes,
    )


def load_examples(path: str, split: Split, items: Vocabulary, target_vocabulary: Vocabulary | None = None) -> TaskData:
    """A later task's data. Without `target_vocabulary` it is made of the file's targets, held-out ones included."""
    encoded = encode(path, True, items, target_vocabulary)
    rows, targets = encoded.rows, encoded.targets
    notes = _check_padding(path, encoded, rows[:, :-1])
    if len(encoded.target_vocabulary) < 3:
        raise InputError(f"{path}: every target is the same; a task needs at least two to tell apart")
    item = rows[0, -2]
    if item and _has_one_item(rows[:, :-1], items, item):
        raise InputError(
            f"{path}, line {encoded.lines[0]}: the item `{items.tokens[item]}` alone, as in every line; a task needs "
            "sequences that tell users apart"
        )
    return TaskData(
        path=os.path.abspath(path),
        digest=encoded.digest,
        split=split,
        rows=rows,
        users=encoded.users,
        targets=targets,
        items=items,
        target_vocabulary=encoded.target_vocabulary,
        padding_id=items.ids.get(PADDING, -1),
        unknown_items=rows.size - np.count_nonzero(rows) - len(rows),
        unknown_targets=len(targets) - np.count_nonzero(targets),
        splits=_split(encoded.users, split, path),
        notes=notes,
    )


def _check_padding(path: str, encoded: Encoded, sequences: np.ndarray) -> list[str]:
    """A note on rows (U, L) that hold padding alone; InputError if most do, or if padding is on the right.

    `0` may be an item too. So it is taken for padding on the right only if most rows end with it and do not start with
    it, or a tenth of them (three or more) end with two of it; and if they are more than twice as many as those that
    start with it and do not end with it.
    """
    padding = encoded.items.ids.get(PADDING)
    if padding is None:
        return []
    first, last = sequences[:, 0] == padding, sequences[:, -1] == padding
    right, left = last & ~first, first & ~last
    twice = right & (sequences[:, -2:] == padding).all(axis=1)
    often = 2 * right.sum() > len(right) or twice.sum() >= max(3, len(right) / 10)
    if often and right.sum() > 2 * left.sum():
        raise InputError(
            f"{path}, line {encoded.lines[right.argmax()]}: padding (`{PADDING}`) at the end, as in {right.sum():,} of "
            f"{len(right):,} lines: remove it, as shorter rows are padded on the left when they are read"
        )
    alone = np.flatnonzero(first & last)
    alone = alone[(sequences[alone] == padding).all(axis=1)]
    if len(alone) == 0:
        return []
    share = f"as in {len(alone):,} of {len(sequences):,} lines"
    where = f"{path}, line {encoded.lines[alone[0]]}: nothing but padding (`{PADDING}`), {share}"
    if 2 * len(alone) > len(sequences):
        raise InputError(f"{where}: give each user a sequence of items")
    return [where]


def _has_one_item(rows: np.ndarray, items: Vocabulary, item: np.ndarray) -> bool:
    """Whether all rows (U, L) hold nothing but `item`, (U, 1) or one for all, and padding."""
    padding = items.ids.get(PADDING, -1)
    blocks = (slice(start, start + 4096) for start in range(0, len(rows), 4096))  # most often the first one tells
    item = np.broadcast_to(item, (len(rows), 1))
    return all(((rows[block] == item[block]) | (rows[block] == padding)).all() for block in blocks)


def _split(users: np.ndarray, split: Split, path: str) -> dict[str, np.ndarray]:
    """Example numbers of train, validation, test, and heldout = the last two; `users` (N,): the row of each example.

    By example it is the original's split; by user the same is done to the rows, which take their examples along.
    """
    groups = users if split.by == "user" else np.arange(len(users))
    count = int(groups.max()) + 1
    held_out = int(split.test_fraction * count)
    if held_out < 2 or held_out == count:
        raise InputError(
            f"{path}: {count} {split.by}s are too few to hold out {split.test_fraction:g} of them for validation and "
            "test"
        )
    place = np.argsort(np.random.RandomState(split.seed).permutation(count))[groups]  # of each example's group
    order = np.argsort(place, kind="stable")
    cuts = np.searchsorted(place[order], [count - held_out, count - held_out + held_out // 2])
    train, validation, test = np.split(order, cuts)
    return {"train": train, "validation": validation, "test": test, "heldout": np.concatenate([validation, test])}
