"""Files → ids → examples and splits.

Id 0 is `<UNK>`, which also separates a sequence from the place of its target; other ids count up in order of first
appearance in the file, as in the original's data_loader files. Rows of unequal length are padded on the left with the
token `0`.
"""

import ast
import hashlib
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from conure import processes
from conure.errors import InputError
from conure.files import load_sealed, save_sealed, whole_file
from conure.ttl_format import Encoder, read_lines

import numpy as np
import pandas as pd
import torch
from torch import Tensor

UNKNOWN = "<UNK>"  # id 0
PADDING = "0"  # an ordinary token to the original: it has an id, an embedding and a row in the softmax
MAX_INDEX_BYTES = 1 << 28  # two hundred times what 646,000 numbers take
CACHE_FROM_BYTES = 32_000_000  # smaller files are read in less than a second
CACHE_LAYOUT = 1  # of what the cache holds
SPLIT_SEED = 10  # the original's np.random.seed before it shuffles the rows


class Vocabulary:
    """Tokens and their ids, a bijection; id 0 is `<UNK>`."""

    def __init__(self, tokens: list[str] | None = None):
        self.tokens = tokens or [UNKNOWN]
        self.ids = {token: id for id, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def grow(self, tokens: list[str]) -> np.ndarray:
        """Ids of the tokens, all different; new ones get the next ids in order."""
        new = [token for token in tokens if token not in self.ids]
        self.ids.update(zip(new, range(len(self), len(self) + len(new))))
        self.tokens += new
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

    def write(self, path: str, overwrite: bool) -> None:
        """Writes index.csv: a header `token,id`, then a line a token.

        InputError if it holds other ids, which other checkpoints need, and is not to be overwritten.
        """
        if not processes.is_main():
            return
        try:
            there = read_index(path).tokens
        except InputError:  # none, or one that is of no use to any checkpoint
            there = self.tokens
        if there != self.tokens and not overwrite:
            raise InputError(
                f"{path} holds the ids of other data, without which its checkpoints cannot be trained on: give another "
                "--index_path (and --checkpoint_dir), or --overwrite"
            )
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
class Encoded:
    """A data file in ids."""

    digest: str  # SHA-256 of the file
    rows: np.ndarray  # (U, L) int32: the sequences, padded on the left, and where targets follow, the separator 0
    users: np.ndarray  # (N,) int32: the row of each target; empty for task 1
    targets: np.ndarray  # (N,) int32; empty for task 1
    items: Vocabulary
    target_vocabulary: Vocabulary


def encode(
    path: str, with_targets: bool, items: Vocabulary | None, target_vocabulary: Vocabulary | None = None
) -> Encoded:
    """The file in ids; a vocabulary that is not given is made of the file's own tokens, held-out ones included.

    If `0` stands nowhere in a file of its own vocabulary but is needed for padding, it becomes the last item.
    """
    items, item_ids = _ids_of(items)
    target_vocabulary, target_ids = _ids_of(target_vocabulary)
    item_encoder, target_encoder = Encoder(item_ids), Encoder(target_ids)
    digest, table = hashlib.sha256(), RowTable()
    users, targets = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    for lines in read_lines(path, with_targets, digest):
        if with_targets:
            users.append((table.count + lines.rows[~lines.is_source]).astype(np.int32))
            targets.append(target_encoder.encode(lines, ~lines.is_source))
        part = lines.pad(item_encoder.encode(lines, lines.is_source))
        table.add(np.pad(part, ((0, 0), (0, 1))) if with_targets else part)
    rows = table.rows(lambda: item_ids([PADDING])[0])
    return Encoded(digest.hexdigest(), rows, np.concatenate(users), np.concatenate(targets), items, target_vocabulary)


def _ids_of(vocabulary: Vocabulary | None) -> tuple[Vocabulary, Callable[[list[str]], np.ndarray]]:
    """The vocabulary, or a new one that grows, and what gives the ids of tokens."""
    grown = Vocabulary()
    return (grown, grown.grow) if vocabulary is None else (vocabulary, vocabulary.look_up)


class RowTable:
    """Rows that come chunk by chunk, in one array that grows in place, or is copied when a longer row widens it."""

    def __init__(self):
        self.table, self.count, self.ragged = np.empty((0, 0), np.int32), 0, False

    def add(self, part: np.ndarray) -> None:
        """`part` (n, width) int32, with -1 for padding, on the left."""
        needed, width = self.count + len(part), max(self.table.shape[1], part.shape[1])
        self.ragged |= part.min() < 0 or 0 < self.count and part.shape[1] != self.table.shape[1]
        if width > self.table.shape[1]:
            narrow, self.table = self.table[: self.count], np.empty((needed, width), np.int32)
            self._put(0, narrow)
        elif needed > len(self.table):
            self.table.resize((needed + needed // 8, width), refcheck=False)
        self._put(self.count, part)
        self.count = needed

    def _put(self, start: int, part: np.ndarray) -> None:
        place = self.table[start : start + len(part)]
        place[:, : place.shape[1] - part.shape[1]] = -1
        place[:, place.shape[1] - part.shape[1] :] = part

    def rows(self, padding_id: Callable[[], int]) -> np.ndarray:
        """All rows (N, longest); `padding_id` is asked for only if there is padding."""
        self.table.resize((self.count, self.table.shape[1]), refcheck=False)
        if self.ragged:
            id = padding_id()
            for start in range(0, self.count, 1 << 16):
                block = self.table[start : start + (1 << 16)]
                np.copyto(block, id, where=block < 0)
        return self.table


def read_encoded(
    path: str, with_targets: bool, items: Vocabulary | None, target_vocabulary: Vocabulary | None = None
) -> Encoded:
    """As `encode`; a large file is read once, and its ids are kept in `.cache` beside it, which may be deleted."""
    if not os.path.exists(path) or os.path.getsize(path) < CACHE_FROM_BYTES:
        return encode(path, with_targets, items, target_vocabulary)
    if not processes.is_main():
        processes.wait()
    kept = os.path.join(os.path.dirname(path), ".cache", f"{os.path.basename(path)}.pt")
    encoded = _read_cache(kept, path, with_targets, items, target_vocabulary)
    if encoded is None:
        encoded = encode(path, with_targets, items, target_vocabulary)
        _write_cache(kept, encoded, with_targets, items is None, target_vocabulary is None)
    if processes.is_main():
        processes.wait()
    return encoded


def _write_cache(kept: str, encoded: Encoded, with_targets: bool, own_items: bool, own_targets: bool) -> None:
    """`own_items` and `own_targets`: whether the vocabulary is made of the file's own tokens."""
    if not processes.is_main():
        return
    content = {"layout": CACHE_LAYOUT, "with_targets": with_targets, "own": [own_items, own_targets]}
    content |= {
        "digest": encoded.digest,
        "vocabularies": [encoded.items.to_tensor(), encoded.target_vocabulary.to_tensor()],
    }
    content |= {name: torch.from_numpy(getattr(encoded, name)) for name in ("rows", "users", "targets")}
    try:
        save_sealed(kept, content)
    except InputError as error:
        print(f"the next start will read the data anew: {error}")


def _read_cache(
    kept: str, path: str, with_targets: bool, items: Vocabulary | None, target_vocabulary: Vocabulary | None
) -> Encoded | None:
    """What `encode` would give, memory-mapped; None if `kept` is not there, damaged, or of another file or ids."""
    content = load_sealed(kept, mmap=True)[0] if os.path.isfile(kept) else None
    if content is None or content.get("layout") != CACHE_LAYOUT or content["with_targets"] != with_targets:
        return None
    for wanted, found, own in zip((items, target_vocabulary), content["vocabularies"], content["own"]):
        if not (own if wanted is None else torch.equal(wanted.to_tensor(), found)):
            return None
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != content["digest"]:
            return None
    arrays = (content[name].numpy() for name in ("rows", "users", "targets"))
    return Encoded(content["digest"], *arrays, *map(Vocabulary.from_tensor, content["vocabularies"]))


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

    def batch(self, examples: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs (B, T) and targets (B,), int64, of these examples."""
        inputs = torch.from_numpy(self.rows[self.users[examples]]).long()
        return inputs, torch.from_numpy(self.targets[examples]).long()

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
    encoded = read_encoded(path, False, items)
    rows, items = encoded.rows, encoded.items
    if rows.shape[1] < 2:
        raise InputError(f"{path}: every sequence has one item only; task 1 needs a next item to predict")
    return TaskData(
        path=os.path.abspath(path),
        digest=encoded.digest,
        rows=rows[:, :-1],
        users=np.arange(len(rows), dtype=np.int32),
        targets=rows[:, -1],
        items=items,
        target_vocabulary=items,
        padding_id=items.ids.get(PADDING, -1),
        unknown_items=rows.size - np.count_nonzero(rows),
        unknown_targets=0,
        splits=_split(len(rows), test_fraction, path),
    )


def load_examples(
    path: str, test_fraction: float, items: Vocabulary, target_vocabulary: Vocabulary | None = None
) -> TaskData:
    """A later task's data. Without `target_vocabulary` it is made of the file's targets, held-out ones included."""
    encoded = read_encoded(path, True, items, target_vocabulary)
    rows, targets = encoded.rows, encoded.targets
    if len(encoded.target_vocabulary) < 3:
        raise InputError(f"{path}: every target is the same; a task needs at least two to tell apart")
    return TaskData(
        path=os.path.abspath(path),
        digest=encoded.digest,
        rows=rows,
        users=encoded.users,
        targets=targets,
        items=items,
        target_vocabulary=encoded.target_vocabulary,
        padding_id=items.ids.get(PADDING, -1),
        unknown_items=rows.size - np.count_nonzero(rows) - len(rows),
        unknown_targets=len(targets) - np.count_nonzero(targets),
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
