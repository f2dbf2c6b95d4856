"""Files → ids → examples and splits.

Id 0 is `<UNK>`, and also the separator that ends a row of a later task. Rows shorter than the longest are padded on the
left with the token `0`.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from conure.errors import InputError
from conure.line_reader import read_lines
from conure.vocabulary import UNKNOWN, Encoder, Vocabulary

import numpy as np
import torch
from torch import Tensor

PADDING = "0"  # an ordinary token, as in the original: it has an id, an embedding and a row in the softmax
BLOCK_IDS = 1 << 23  # 32 MB; smaller arrays may not return their memory to the system when they are freed


class Split(NamedTuple):
    """How examples are held out: half of them for validation, half for test."""

    test_fraction: float = 0.2  # of the examples or, by user, of the users
    seed: int = 10  # of the shuffle; the original's np.random.seed
    by: str = "example"  # or "user": training has no example of a held-out user


def pad_left(ids: np.ndarray, lengths: np.ndarray, width: int, padding: int) -> np.ndarray:
    """Rows (n, width) from the concatenated ids (lengths.sum(),) of n rows; shorter rows are padded on the left."""
    if len(ids) == len(lengths) * width:
        return ids.reshape(len(lengths), width)
    rows = np.full((len(lengths), width), padding, dtype=np.int32)
    rows[np.arange(width) >= width - lengths[:, None]] = ids
    return rows


@dataclass
class Encoded:
    """A data file as ids."""

    digest: str  # SHA-256 of the file
    rows: np.ndarray  # (U, L) int32: sequences, padded on the left; for a later task the separator 0 follows
    lines: np.ndarray  # (U,) int32: each row's line in the file, from 1
    users: np.ndarray  # (N,) int32: the row of each target; empty for task 1
    targets: np.ndarray  # (N,) int32; empty for task 1
    items: Vocabulary
    target_vocabulary: Vocabulary


def encode(
    path: str, with_targets: bool, items: Vocabulary | None, target_vocabulary: Vocabulary | None = None
) -> Encoded:
    """Reads the file as ids. A vocabulary that is not given is built from the whole file, held-out examples included.

    If padding is needed and the file has no `0`, a new vocabulary gets it as its last item. InputError names the file
    and the line.
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
    while blocks:  # from the last one, so that each is freed once it is copied
        part = pad_left(*blocks.pop(), longest, padding)
        rows[end - len(part) : end, :longest] = part
        end -= len(part)
    users = np.repeat(np.arange(len(rows) if with_targets else 0, dtype=np.int32), np.concatenate(target_counts))
    return Encoded(digest.hexdigest(), rows, lines, users, np.concatenate(targets), items, target_vocabulary)


def _ids_of(vocabulary: Vocabulary | None) -> tuple[Vocabulary, Callable[[list[str]], np.ndarray]]:
    """The vocabulary, or a new one that grows, and its method that returns ids."""
    grown = Vocabulary()
    return (grown, grown.grow) if vocabulary is None else (vocabulary, vocabulary.look_up)


class Batch(NamedTuple):
    """Examples, several of which may share a row: example i is `inputs[row_of[i]]` with `targets[i]`."""

    rows: np.ndarray  # (R,) row numbers in the task's data
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
    split: Split = field(default_factory=Split)  # how `splits` were made
    rows: np.ndarray  # (U, T) int32, padded on the left
    users: np.ndarray  # (N,) int32
    targets: np.ndarray  # (N,) int32
    items: Vocabulary
    target_vocabulary: Vocabulary  # of the targets; `items` itself for task 1
    padding_id: int = -1  # id of `0`; -1 if it is no item
    unknown_items: int = 0  # elements of the sequences, padding included, whose token is not in `items`
    unknown_targets: int = 0
    # Example numbers of train, validation, test, and heldout = validation + test.
    splits: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what looks like a mistake in the file

    @property
    def is_task_1(self) -> bool:
        """Whether the targets are the next items."""
        return self.target_vocabulary is self.items

    def target_counts(self) -> np.ndarray:
        """(targets,): the number of training examples of each target."""
        return np.bincount(self.targets[self.splits["train"]], minlength=len(self.target_vocabulary))

    def batch(self, examples: np.ndarray) -> Batch:
        """These examples (B,), sorted by row."""
        examples = examples[np.argsort(self.users[examples], kind="stable")]
        rows, row_of = np.unique(self.users[examples], return_inverse=True)
        ids = (torch.from_numpy(each).long() for each in (self.rows[rows], row_of, self.targets[examples]))
        return Batch(rows, *ids)

    def describe(self) -> list[str]:
        """Lines to print: the file, counts of rows, ids and examples, and notes."""
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
                f"not in the vocabulary, read as {UNKNOWN}: {self.unknown_items:,} of {self.rows.size:,} items, "
                f"{self.unknown_targets:,} of {len(self.targets):,} targets"
            )
        return lines


def load_sequences(path: str, split: Split, items: Vocabulary | None = None) -> TaskData:
    """Task 1's data. Without `items` the vocabulary is built from the whole file, held-out rows included."""
    encoded = encode(path, False, items)
    rows, items = encoded.rows, encoded.items
    notes = _check_padding(path, encoded, rows)
    if _has_one_item(rows, items, rows[:, -1:]):
        raise InputError(
            f"{path}, line {encoded.lines[0]}: one item only, as in every line: give sequences of several items"
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
        splits=_split(np.arange(len(rows)), split, path),  # each row is one example of one user
        notes=notes,
    )


def load_examples(path: str, split: Split, items: Vocabulary, target_vocabulary: Vocabulary | None = None) -> TaskData:
    """A later task's data. Without `target_vocabulary` it is built from the whole file, held-out targets included."""
    encoded = encode(path, True, items, target_vocabulary)
    rows, targets = encoded.rows, encoded.targets
    notes = _check_padding(path, encoded, rows[:, :-1])
    if len(encoded.target_vocabulary) < 3:
        raise InputError(f"{path}: all targets are the same: give at least two different ones")
    item = rows[0, -2]
    if item and _has_one_item(rows[:, :-1], items, item):
        raise InputError(
            f"{path}, line {encoded.lines[0]}: only the item `{items.tokens[item]}`, as in every line: give sequences "
            "that differ between users"
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
    """Notes rows (U, L) of padding alone; InputError if most rows are, or if rows are padded on the right.

    `0` may also be an item. A row counts as padded on the right if it ends with `0` and does not start with it, as
    padded on the left if it is the other way round. The error needs two things: most rows are padded on the right, or a
    tenth of all rows (at least three) by two or more; and they are more than twice as many as those padded on the left.
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
            f"{len(right):,} lines: remove it; short rows are padded on the left when they are read"
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
    """Whether all rows (U, L) hold only `item`, (U, 1) or one for all rows, and padding."""
    padding = items.ids.get(PADDING, -1)
    blocks = (slice(start, start + 4096) for start in range(0, len(rows), 4096))  # the first one mostly decides
    item = np.broadcast_to(item, (len(rows), 1))
    return all(((rows[block] == item[block]) | (rows[block] == padding)).all() for block in blocks)


def _split(users: np.ndarray, split: Split, path: str) -> dict[str, np.ndarray]:
    """Example numbers of train, validation, test, and heldout = validation + test; `users` (N,): each example's row.

    By example it is the original's split. By user rows are split in the same way, each with all its examples.
    """
    groups = users if split.by == "user" else np.arange(len(users))
    count = int(groups.max()) + 1
    held_out = int(split.test_fraction * count)
    if held_out < 2 or held_out == count:
        raise InputError(
            f"{path}: {count} {split.by}s are too few to hold out {split.test_fraction:g} of them for validation and "
            "test: give more data or another --test_fraction"
        )
    place = np.argsort(np.random.RandomState(split.seed).permutation(count))[groups]  # of each example's group
    order = np.argsort(place, kind="stable")
    cuts = np.searchsorted(place[order], [count - held_out, count - held_out + held_out // 2])
    train, validation, test = np.split(order, cuts)
    return {"train": train, "validation": validation, "test": test, "heldout": np.concatenate([validation, test])}
