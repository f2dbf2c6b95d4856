"""Tokens ↔ ids: the vocabulary, its file index.csv, and the encoder that maps a data file's tokens to ids.

Id 0 is `<UNK>`. Other ids count up in order of first appearance in the file, as in the original's data_loader files.
"""

import hashlib
import io
import os
import shlex
from collections.abc import Callable

from conure.errors import InputError
from conure.files import whole_file
from conure.line_reader import missing
from conure.settings import Running

import numpy as np
import pandas as pd
import torch
from torch import Tensor

UNKNOWN = "<UNK>"  # id 0
MAX_INDEX_BYTES = 1 << 28  # 30 times the index of TTL's 645,974 items
MAX_TABLE = 1 << 24  # smaller numbers are looked up in a table, of at most 64 MB


class Vocabulary:
    """A bijection between tokens and ids; id 0 is `<UNK>`."""

    def __init__(self, tokens: list[str] | None = None):
        self.tokens = tokens or [UNKNOWN]
        self.ids = {token: id for id, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def grow(self, tokens: list[str]) -> np.ndarray:
        """Ids (n,) int32 of n distinct tokens; new tokens get the next ids in order."""
        before = len(self)
        ids = np.array([self.ids.setdefault(token, len(self.ids)) for token in tokens], dtype=np.int32)
        self.tokens += [tokens[place] for place in np.flatnonzero(ids >= before)]
        return ids

    def look_up(self, tokens: list[str]) -> np.ndarray:
        """Ids (n,) int32 of n tokens, 0 for unknown ones."""
        return np.array([self.ids.get(token, 0) for token in tokens], dtype=np.int32)

    def to_tensor(self) -> Tensor:
        """The tokens as one uint8 tensor, which a checkpoint stores in place of a list of strings."""
        return torch.frombuffer(bytearray("\n".join(self.tokens).encode()), dtype=torch.uint8)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_tensor().numpy()).hexdigest()

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "Vocabulary":
        return cls(tensor.numpy().tobytes().decode().split("\n"))

    def check_index(self, path: str) -> None:
        """InputError if index.csv holds other ids, which other checkpoints need; a damaged one may be overwritten."""
        try:
            there = read_index(path).tokens
        except InputError:
            return
        if there != self.tokens:
            raise InputError(
                f"{path} holds the ids of other data, which the checkpoints made from it need: give another "
                "--index_path and --checkpoint_dir"
            )

    def write(self, path: str) -> None:
        """Writes index.csv: the header `token,id`, then one line per token."""
        with whole_file(path) as file:
            pd.DataFrame({"token": self.tokens, "id": range(len(self))}).to_csv(file, index=False)


def read_index(path: str) -> Vocabulary:
    """The vocabulary in index.csv, as `Vocabulary.write` writes it; InputError if it is missing or anything else."""
    command = "python conure_tp_t1.py" + ("" if path == Running.index_path else f" --index_path {shlex.quote(path)}")
    again = f"run `{command}` with its other flags as before, which rewrites it and keeps a finished stage"
    full = os.path.abspath(path)
    if not os.path.exists(path):
        raise InputError(f"{missing(path)}: run `{command}` first, which writes it")
    if os.path.getsize(path) > MAX_INDEX_BYTES:
        raise InputError(f"{full} is no item index (more than {MAX_INDEX_BYTES:,} bytes): {again}")
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
            raise ValueError("its tokens must be distinct and without line breaks")
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{full} is no item index ({reason}): {again}") from None
    return Vocabulary(tokens)


class Encoder:
    """Maps tokens to ids chunk by chunk. Numbers go through a lookup table, which is much faster than a dict."""

    def __init__(self, ids_of: Callable[[list[str]], np.ndarray]):
        """`ids_of` returns the ids (n,) int32 of n distinct tokens: a vocabulary's `grow` or `look_up`."""
        self.ids_of = ids_of
        self.table = np.empty(0, np.int32)  # number → id, -1 for numbers not seen yet

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Ids (n,) int32 of n tokens: an object array of str, or int64 numbers that stand for their decimal text."""
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
