"""The TTL format: files of tokens, split without making a Python object of every token.

One user a line: task 1 `item,item,…`; later tasks `item,item,…,,target,target`. A token is any text without a comma
or white space at its ends. A byte-order mark, Windows line ends, a comma at the end of a line, empty lines and a
missing last newline change nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import pandas as pd

from settings import InputError

CHUNK_BYTES = 16 << 20
MAX_TOKEN_BYTES = 256  # longer ones are no item ids, and would slow down the comparison of all others
MAX_LINE_TOKENS = 10_000  # all rows are padded to the longest, so one freak line would take all memory
COMMA, NEWLINE, TAB, RETURN, SPACE = b",\n\t\r "


@dataclass
class Lines:
    """Lines of a file that are not empty, split into tokens; the arrays run over the tokens, in file order."""

    text: np.ndarray  # (bytes,) uint8
    starts: np.ndarray
    lengths: np.ndarray  # in bytes, none of them 0
    rows: np.ndarray  # which line, from 0
    is_source: np.ndarray  # part of the sequence, not a target

    def encode(self, chosen: np.ndarray, ids_of) -> np.ndarray:
        """Ids of the chosen tokens; `ids_of` maps a list of distinct tokens, in order of first appearance."""
        starts, lengths = self.starts[chosen], self.lengths[chosen]
        codes = factorize(self.text, starts, lengths)
        first = np.flatnonzero(np.diff(np.maximum.accumulate(codes), prepend=-1))
        text = self.text.tobytes()
        distinct = [text[s : s + n].decode() for s, n in zip(starts[first].tolist(), lengths[first].tolist())]
        return ids_of(distinct)[codes]

    def pad(self, ids: np.ndarray) -> np.ndarray:
        """(lines, longest) int32: the ids of the source tokens, with -1 on the left of shorter lines."""
        rows = self.rows[self.is_source]
        counts = np.bincount(rows)
        if (counts == counts[0]).all():
            return ids.reshape(len(counts), -1)
        padded = np.full((len(counts), counts.max()), -1, dtype=np.int32)
        from_right = np.cumsum(counts)[rows] - np.arange(len(rows))  # 1 for the last token of a line
        padded[rows, counts.max() - from_right] = ids
        return padded


def factorize(text: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A number for each token, equal for equal tokens, counting up from 0 in order of first appearance.

    Compares eight bytes at a time as one integer, so that no token becomes a Python object.
    """
    masks = np.array([(1 << 8 * n) - 1 for n in range(9)], dtype=np.uint64)
    padded = np.concatenate([text, np.zeros(8, np.uint8)])
    words = np.ndarray(len(text) + 1, dtype="<u8", buffer=padded, strides=(1,))  # the 8 bytes from each position on
    codes = np.zeros(len(starts), np.int64)
    for offset in range(0, lengths.max(), 8):
        word = words[np.minimum(starts + offset, len(text))] & masks[np.clip(lengths - offset, 0, 8)]
        word_codes, distinct = pd.factorize(word)
        codes = pd.factorize(codes * len(distinct) + word_codes)[0] if offset else word_codes
    return codes


def read_lines(path: str, with_targets: bool, digest) -> Iterator[Lines]:
    """The file in chunks of whole lines, checked; `digest` is fed its bytes. InputError names file and line."""
    found = False
    try:
        for first_line, chunk in chunks_of_lines(path, digest):
            lines = split_lines(chunk, first_line, with_targets, path)
            if lines is not None:
                found = True
                yield lines
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: put the task's file there or name it with --data_path") from None
    if not found:
        raise InputError(f"{path} is empty: it must hold one line a user")


def chunks_of_lines(path: str, digest) -> Iterator[tuple[int, bytes]]:
    """Pieces of the file that end with a line, each with the number of its first line."""
    line, rest = 1, []
    with open(path, "rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
            if line == 1 and not rest:
                block = block.removeprefix(b"\xef\xbb\xbf")
            cut = block.rfind(b"\n") + 1
            rest.append(block[:cut])
            if cut:
                chunk = b"".join(rest)
                yield line, chunk
                line += chunk.count(b"\n")
                rest = []
            rest.append(block[cut:])
    if last := b"".join(rest):
        yield line, last + b"\n"


class Refusal:
    """Raises InputError for a place in a chunk, with file, line number and the offending line, cut short."""

    def __init__(self, path: str, first_line: int, chunk: bytes):
        self.path, self.first_line, self.chunk = path, first_line, chunk

    def line(self, index: int, reason: str) -> NoReturn:
        """`index` counts the lines of the chunk from 0, empty ones too."""
        shown = self.chunk.split(b"\n")[index].decode(errors="replace").strip()
        shown = shown if len(shown) <= 60 else shown[:60] + "…"
        raise InputError(f"{self.path}, line {self.first_line + index}: {reason}: {shown!r}")

    def byte(self, position: int, reason: str) -> NoReturn:
        self.line(self.chunk.count(b"\n", 0, position), reason)


def split_lines(chunk: bytes, first_line: int, with_targets: bool, path: str) -> Lines | None:
    """The tokens of a chunk that ends with a line; None if all its lines are empty."""
    text, refuse = np.frombuffer(chunk, np.uint8), Refusal(path, first_line, chunk)
    check_characters(text, refuse)
    ends = np.flatnonzero((text == COMMA) | (text == NEWLINE))
    starts = np.concatenate([[0], ends[:-1] + 1])
    closes_line = text[ends] == NEWLINE
    rows = np.cumsum(closes_line) - closes_line
    if (longest := np.bincount(rows)).max() > MAX_LINE_TOKENS:
        refuse.line(int(longest.argmax()), f"more than {MAX_LINE_TOKENS:,} tokens")
    if (text <= SPACE).sum() > closes_line.sum():
        starts, ends = strip(text, starts, ends, refuse)
    lengths = ends - starts
    if lengths.max() > MAX_TOKEN_BYTES:
        refuse.byte(int(starts[lengths.argmax()]), f"a token of more than {MAX_TOKEN_BYTES} bytes")
    # An empty line is its one empty token; a comma at the end of a line leaves one empty token too.
    kept = ~((lengths == 0) & closes_line)
    if not kept.any():
        return None
    places, rows = np.unique(rows[kept], return_inverse=True)  # places: of the lines that are not empty
    starts, lengths = starts[kept], lengths[kept]
    empty = lengths == 0
    if with_targets:
        is_source = source_tokens(rows, empty, places, refuse)[~empty]
    elif empty.any():
        refuse.line(places[rows[empty.argmax()]], "an empty item (`,,` belongs to the files of tasks 2 and later)")
    else:
        is_source = np.ones(len(rows), bool)
    return Lines(text, starts[~empty], lengths[~empty], rows[~empty], is_source)


def check_characters(text: np.ndarray, refuse: Refusal) -> None:
    control = (text < SPACE) & (text != NEWLINE) & (text != TAB) & (text != RETURN)
    if control.any():
        refuse.byte(int(control.argmax()), "a control character, so this is no text file")
    if text.max() >= 128:
        try:
            refuse.chunk.decode()
        except UnicodeDecodeError as error:
            refuse.byte(error.start, "not UTF-8 text")


def strip(text: np.ndarray, starts: np.ndarray, ends: np.ndarray, refuse: Refusal) -> tuple[np.ndarray, np.ndarray]:
    """The tokens' bounds without the white space around them."""
    solid = np.append(np.flatnonzero(text > SPACE), len(text))  # commas included, which bound every token
    starts = np.minimum(solid[np.searchsorted(solid, starts)], ends)
    ends = np.maximum(np.append(-1, solid)[np.searchsorted(solid, ends)] + 1, starts)
    white = np.flatnonzero((text == TAB) | (text == RETURN))
    token = np.minimum(np.searchsorted(ends, white, side="right"), len(ends) - 1)
    if (inside := (starts[token] < white) & (white < ends[token])).any():
        refuse.byte(int(white[inside.argmax()]), "a tab or carriage return inside a token")
    return starts, ends


def source_tokens(rows: np.ndarray, empty: np.ndarray, places: np.ndarray, refuse: Refusal) -> np.ndarray:
    """Which tokens stand before the `,,` of their line, which is the line's one empty token."""
    position = np.arange(len(rows))
    line_start = np.searchsorted(rows, np.arange(len(places)))
    line_end = np.append(line_start[1:], len(rows))
    separator = np.minimum.reduceat(np.where(empty, position, len(rows)), line_start)
    for wrong, reason in (
        (separator == len(rows), "no `,,` between the sequence and its targets"),
        (separator == line_start, "no item before `,,`"),
        (separator == line_end - 1, "no target after `,,`"),
        (np.add.reduceat(empty, line_start, dtype=int) > 1, "an empty item or target besides the `,,`"),
    ):
        if wrong.any():
            refuse.line(places[wrong.argmax()], reason)
    return position < separator[rows]
