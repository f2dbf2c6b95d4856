"""The TTL format: files of tokens, split without making a Python object of every token.

One user a line: task 1 `item,item,…`; later tasks `item,item,…,,target,target`. A token is any text without a comma
or white space at its ends. A byte-order mark, Windows line ends, a comma at the end of a line, empty lines and a
missing last newline change nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from conure.errors import InputError

import numpy as np
import pandas as pd

T = TypeVar("T")

CHUNK_BYTES = 1 << 20  # larger ones fall out of the cache: 16 MB take half as long again
MAX_TOKEN_BYTES = 256  # longer ones are no item ids, and would slow down the comparison of all others
MAX_LINE_TOKENS = 10_000  # all rows are padded to the longest, so one freak line would take all memory
MAX_NUMBER = 1 << 24  # of the table that numbers are looked up in, 64 MB
EIGHT = np.uint64(0x0101010101010101)  # times a byte: that byte eight times
LOWEST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], dtype=np.uint64)  # masks of the n lowest bytes
MAX_LINE_BYTES = MAX_LINE_TOKENS * (MAX_TOKEN_BYTES + 1)
COMMA, NEWLINE, TAB, RETURN, SPACE = b",\n\t\r "


@dataclass
class Lines:
    """Lines of a file that are not empty, split into tokens; the arrays run over the tokens, in file order."""

    text: np.ndarray  # (bytes,) uint8
    starts: np.ndarray
    lengths: np.ndarray  # in bytes, none of them 0
    rows: np.ndarray  # which line, from 0
    is_source: np.ndarray | slice  # part of the sequence, not a target; a slice if all are

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


class Encoder:
    """Ids of tokens; remembers those of numbers in a table, so that no known number becomes a Python object."""

    def __init__(self, ids_of: Callable[[list[str]], np.ndarray]):
        """`ids_of` gives the ids (n,) int32 of n distinct tokens, in order of first appearance."""
        self.ids_of = ids_of
        self.table = np.empty(0, np.int32)  # number → id, -1 if it was not seen yet

    def encode(self, lines: Lines, chosen: np.ndarray | slice) -> np.ndarray:
        """Ids (n,) int32 of the chosen tokens, which come in file order."""
        starts, lengths = lines.starts[chosen], lines.lengths[chosen]
        numbers = as_numbers(eight_bytes(lines.text, starts, lengths), lengths)
        if numbers is None or (highest := int(numbers.max())) > MAX_NUMBER:
            codes = factorize(lines.text, starts, lengths)
            first = np.flatnonzero(np.diff(np.maximum.accumulate(codes), prepend=-1))
            text = lines.text.tobytes()
            distinct = [text[s : s + n].decode() for s, n in zip(starts[first].tolist(), lengths[first].tolist())]
            return self.ids_of(distinct)[codes]
        if highest >= len(self.table):
            self.table = np.pad(self.table, (0, highest + 1 - len(self.table)), constant_values=-1)
        ids = self.table[numbers]
        unseen = np.flatnonzero(ids < 0)
        if len(unseen):
            new = pd.unique(numbers[unseen])
            self.table[new] = self.ids_of(new.astype(str).tolist())
            ids[unseen] = self.table[numbers[unseen]]
        return ids


def eight_bytes(text: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The first eight bytes from each start as one integer, with zeros behind shorter tokens."""
    padded = np.concatenate([text, np.zeros(8, np.uint8)])
    words = np.ndarray(len(text) + 1, dtype="<u8", buffer=padded, strides=(1,))  # the 8 bytes from each position on
    return words[starts] & LOWEST_BYTES[np.minimum(lengths, 8)]


def as_numbers(words: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
    """The numbers whose decimal digits the words are; None unless all tokens are such, with no zero in front.

    Then equal numbers are equal tokens. All eight digits of a word are added up in three steps.
    """
    leading_zero = ((words & np.uint64(0xFF)) == ord("0")) & (lengths > 1)
    if lengths.max() > 8 or leading_zero.any():
        return None
    digits = (words ^ (EIGHT * np.uint64(ord("0")) & LOWEST_BYTES[lengths])) << (8 * (8 - lengths)).astype(np.uint64)
    if ((digits | (digits + EIGHT * np.uint64(0x76))) & (EIGHT * np.uint64(0x80))).any():  # a byte above 9
        return None
    for width, mask in ((1, 0x00FF00FF00FF00FF), (2, 0x0000FFFF0000FFFF), (4, 0x00000000FFFFFFFF)):
        higher = digits >> np.uint64(8 * width)
        digits *= np.uint64(10**width)
        digits += higher
        digits &= np.uint64(mask)
    return digits.astype(np.int64)


def factorize(text: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A number for each token, equal for equal tokens, counting up from 0 in order of first appearance."""
    codes = np.zeros(len(starts), np.int64)
    for offset in range(0, lengths.max(), 8):
        words = eight_bytes(text, np.minimum(starts + offset, len(text)), np.maximum(lengths - offset, 0))
        word_codes, distinct = pd.factorize(words)
        codes = pd.factorize(codes * len(distinct) + word_codes)[0] if offset else word_codes
    return codes


def read_lines(path: str, with_targets: bool, digest) -> Iterator[Lines]:
    """The file in chunks of whole lines, checked; `digest` is fed its bytes. InputError names file and line."""
    found = False
    try:
        chunks = ((*chunk, with_targets, path) for chunk in chunks_of_lines(path, digest))
        for lines in one_ahead(split_lines, chunks):
            if lines is not None:
                found = True
                yield lines
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: put the task's file there or name it with --data_path") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name the task's file with --data_path") from None
    if not found:
        raise InputError(f"{path} is empty: it must hold one line a user")


def one_ahead(function: Callable[..., T], arguments: Iterable[tuple]) -> Iterator[T]:
    """function(*each) for each of the arguments; another thread is at the next one while the last is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for each in arguments:
            ready, coming = coming, thread.submit(function, *each)
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()


def chunks_of_lines(path: str, digest) -> Iterator[tuple[bytes, int]]:
    """Pieces of the file that end with a line, each with the number of its first line."""
    line, rest = 1, []
    with open(path, "rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
            if sum(map(len, rest)) > MAX_LINE_BYTES:
                raise InputError(f"{path}, line {line}: longer than {MAX_LINE_BYTES:,} bytes, so this is no task file")
            if line == 1 and not rest:
                block = block.removeprefix(b"\xef\xbb\xbf")
            cut = block.rfind(b"\n") + 1
            rest.append(block[:cut])
            if cut:
                chunk = b"".join(rest)
                yield chunk, line
                line += chunk.count(b"\n")
                rest = []
            rest.append(block[cut:])
    if last := b"".join(rest):
        yield last + b"\n", line


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
    ends = np.flatnonzero((text == COMMA) | (text == NEWLINE)).astype(np.int32)
    starts = np.concatenate([ends[:1] * 0, ends[:-1] + 1])
    closes_line = text[ends] == NEWLINE
    rows = np.cumsum(closes_line, dtype=np.int32) - closes_line
    places = np.arange(rows[-1] + 1)  # which line of the chunk each row is
    if (longest := np.bincount(rows)).max() > MAX_LINE_TOKENS:
        refuse.line(int(longest.argmax()), f"more than {MAX_LINE_TOKENS:,} tokens")
    if np.count_nonzero(text <= SPACE) > len(longest):
        starts, ends = strip(text, starts, ends, refuse)
    lengths = ends - starts
    if lengths.max() > MAX_TOKEN_BYTES:
        refuse.byte(int(starts[lengths.argmax()]), f"a token of more than {MAX_TOKEN_BYTES} bytes")
    if not lengths.all():
        # An empty line is its one empty token; a comma at the end of a line leaves one empty token too.
        kept = (lengths > 0) | ~closes_line
        if not kept.any():
            return None
        rows, starts, lengths = rows[kept], starts[kept], lengths[kept]
        opens_line = np.diff(rows, prepend=-1) > 0
        places, rows = rows[opens_line], np.cumsum(opens_line, dtype=np.int32) - 1
    empty = lengths == 0
    if with_targets:
        is_source = source_tokens(rows, empty, places, refuse)[~empty]
    elif empty.any():
        refuse.line(places[rows[empty.argmax()]], "an empty item (`,,` belongs to the files of tasks 2 and later)")
    else:
        is_source = slice(None)
    tokens = ~empty if empty.any() else slice(None)
    return Lines(text, starts[tokens], lengths[tokens], rows[tokens], is_source)


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
