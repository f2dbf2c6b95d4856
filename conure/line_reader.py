"""The lines of a data file, checked and split into tokens.

One user a line: task 1 `item,item,…`; later tasks `item,item,…,,target,target`. A token is any text without a comma.
Ignored are white space around tokens, a byte-order mark, Windows line ends, a comma at the end of a line, empty lines
and a missing last newline.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conure.errors import InputError

import numpy as np

CHUNK_BYTES = 1 << 23  # read at once, which bounds the memory for text
MAX_TOKEN_BYTES = 256  # longer ones are no ids
MAX_LINE_TOKENS = 10_000  # all rows are padded to the longest, so one freak line could take all memory
MAX_LINE_BYTES = MAX_LINE_TOKENS * (MAX_TOKEN_BYTES + 1)
MAX_NUMBER = 10**18  # int64 may overflow from here on, so such numbers are read as text
SAMPLE = 1000  # first lines of a file, which are checked for a header and quotes
WHITE = b" \t\r"  # stripped from tokens
CONTROL = bytes(set(range(32)).difference(WHITE + b"\n"))


@dataclass
class Lines:
    """Some non-empty lines of a file in one or two parts: their sequences and, for later tasks, their targets.

    Tokens are in file order: int64 if each is the decimal text of a number, otherwise an object array of str.
    """

    numbers: np.ndarray  # (n,) int32: line numbers, from 1
    tokens: list[np.ndarray]  # one array per part
    counts: np.ndarray  # (parts, n) int64: number of tokens in each line


def missing(path: str) -> str:
    """`PATH does not exist`, for a relative path with the folder that was searched."""
    return f"{path} does not exist" + ("" if os.path.isabs(path) else f" in {os.getcwd()}")


def read_lines(path: str, with_targets: bool, digest: Any = None) -> Iterator[Lines]:
    """Yields the file in chunks of whole lines, and updates `digest`, if any, with all its bytes.

    `with_targets`: whether each line must have `,,` and targets. InputError names file and line, and quotes the line.
    """
    begun = False
    for first, chunk in read_chunks(path, digest):
        lines = split_lines(path, first, chunk, with_targets, is_start=not begun)
        if lines is not None:
            begun = True
            yield lines
    if not begun:
        raise InputError(f"{path} is empty: it must hold one line a user")


def read_chunks(path: str, digest: Any) -> Iterator[tuple[int, bytes]]:
    """Yields pieces of whole lines, each with the number of its first line."""
    first = 1
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                rest = b"" if chunk.endswith(b"\n") else file.readline(MAX_LINE_BYTES + 1)
                if len(rest) > MAX_LINE_BYTES:
                    reason = f"longer than {MAX_LINE_BYTES:,} bytes, so this is no task file"
                    raise refusal(path, first + chunk.count(b"\n"), rest, reason)
                chunk += rest
                if digest is not None:
                    digest.update(chunk)
                yield first, chunk.removeprefix(b"\xef\xbb\xbf") if first == 1 else chunk
                first += chunk.count(b"\n")
    except FileNotFoundError:
        raise InputError(f"{missing(path)}: put the task's file there or name it with --data_path") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name the task's file with --data_path") from None


def split_lines(path: str, first: int, chunk: bytes, with_targets: bool, is_start: bool) -> Lines | None:
    """The lines of a piece of the file that begins at line `first`; None if all are empty."""
    if b"\r" in chunk:
        chunk = chunk.replace(b"\r\n", b"\n")
    lines = chunk.split(b"\n")
    numbers, lines = first + np.flatnonzero(list(map(len, lines))), list(filter(None, lines))
    if is_start and lines:
        refuse_table(path, numbers, lines)
    parts = split_parts(lines, with_targets)
    tokens = [numbers_in(part) for part in parts]  # None if a line is malformed, or has white space or text
    if any(part is None for part in tokens):
        for place, line in enumerate(lines):
            try:
                lines[place] = tidy(line, with_targets)
            except ValueError as error:
                raise refusal(path, numbers[place], line, str(error)) from None
        numbers, lines = numbers[np.array(lines, dtype=bool)], list(filter(None, lines))
        if not lines:
            return None
        parts = split_parts(lines, with_targets)
        tokens = [tokens_in(part) for part in parts]
    counts = np.array([[text.count(b",") + 1 for text in part] for part in parts])
    longest = int(counts.sum(axis=0).argmax())
    if counts[:, longest].sum() > MAX_LINE_TOKENS:
        raise refusal(path, numbers[longest], lines[longest], f"more than {MAX_LINE_TOKENS:,} tokens")
    return Lines(numbers.astype(np.int32), tokens, counts)


def split_parts(lines: list[bytes], with_targets: bool) -> list[list[bytes]]:
    """The sequences, and with `with_targets` also the targets, which follow the first `,,` of a line."""
    if not with_targets:
        return [lines]
    pairs = [line.partition(b",,") for line in lines]
    return [[pair[0] for pair in pairs], [pair[2] for pair in pairs]]


def numbers_in(texts: list[bytes]) -> np.ndarray | None:
    """The comma-separated numbers (n,) int64; None unless each token is the decimal text of its number.

    This rules out empty tokens, white space and leading zeros, so equal numbers are equal tokens.
    """
    text = b",".join(texts)
    commas = np.frombuffer(text, dtype=np.uint8) == ord(",")
    empty_token = not text or commas[0] or commas[-1] or (commas[:-1] & commas[1:]).any()
    if empty_token or text.translate(None, b"0123456789,"):
        return None
    numbers = np.fromstring(text, dtype=np.int64, sep=",")
    highest = int(numbers.max())
    digits = len(numbers) + sum(np.count_nonzero(numbers >= 10**n) for n in range(1, len(str(highest))))
    commas = len(numbers) - 1
    # A leading zero makes the text longer than the digits and commas of the numbers.
    return numbers if highest < MAX_NUMBER and digits + commas == len(text) else None


def tokens_in(texts: list[bytes]) -> np.ndarray:
    """The comma-separated tokens (n,): int64 by `numbers_in`, or otherwise an object array of str."""
    numbers = numbers_in(texts)
    return np.array(b",".join(texts).decode().split(","), dtype=object) if numbers is None else numbers


def tidy(line: bytes, with_targets: bool) -> bytes:
    """The line without white space around tokens and without a comma at its end; ValueError if it is malformed."""
    tokens = [token.strip(WHITE) for token in line.split(b",")]
    if tokens == [b""]:
        return b""
    if tokens[-1] == b"":
        tokens.pop()
    text, empty = b",".join(tokens), tokens.count(b"")
    if len(text.translate(None, CONTROL)) < len(text):
        raise ValueError("a control character, so this is no text file")
    if b"\t" in text or b"\r" in text:
        raise ValueError("a tab or carriage return inside a token")
    if max(map(len, tokens)) > MAX_TOKEN_BYTES:
        raise ValueError(f"a token of more than {MAX_TOKEN_BYTES} bytes")
    try:
        text.decode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    if empty and not with_targets:
        raise ValueError("an empty item (`,,` belongs to the files of tasks 2 and later)")
    if with_targets:
        if not empty:
            raise ValueError("no `,,` between the sequence and its targets")
        if tokens[0] == b"":
            raise ValueError("no item before `,,`")
        if tokens[-1] == b"":
            raise ValueError("no target after `,,`")
        if empty > 1:
            raise ValueError("an empty item or target besides the `,,`")
    return text


def refuse_table(path: str, numbers: np.ndarray, lines: list[bytes]) -> None:
    """InputError if the file's first lines look like a table's: quotes around tokens, or a header."""
    lines = lines[:SAMPLE]
    quoted = [place for place, line in enumerate(lines) if is_quoted(words(line))]
    if 2 * len(quoted) > len(lines):
        reason = "quotes around tokens would become part of them; write the file without quotes (csv.QUOTE_NONE)"
        raise refusal(path, numbers[quoted[0]], lines[quoted[0]], reason)
    header, *sequences = (words(line.partition(b",,")[0]) for line in lines)
    if sequences and header and not any(map(is_number, header)) and all(all(map(is_number, row)) for row in sequences):
        reason = "a header, which would be read as a user; remove this line"
        raise refusal(path, numbers[0], lines[0], reason)


def words(text: bytes) -> list[bytes]:
    """The non-empty tokens."""
    return [token for field in text.split(b",") if (token := field.strip(WHITE))]


def is_quoted(tokens: list[bytes]) -> bool:
    """Whether quotes enclose the whole line, or most of its tokens that are not numbers."""
    texts = [token for token in tokens if not is_number(token)]
    around = sum(len(token) > 1 and token[:1] == token[-1:] == b'"' for token in texts)
    return 2 * around > len(texts) or (len(tokens) > 1 and tokens[0][:1] == tokens[-1][-1:] == b'"')


def is_number(token: bytes) -> bool:
    """Whether it looks like a number or a date."""
    return token.translate(None, b".-").isdigit()


def refusal(path: str, number: int, line: bytes, reason: str) -> InputError:
    """The error for a line: file, line number, reason, and the start of its text."""
    shown = line.decode(errors="replace").strip()
    shown = shown if len(shown) <= 60 else shown[:60] + "…"
    return InputError(f"{path}, line {number}: {reason}: {shown!r}")
