"""The lines of a data file, checked and split into tokens.

One user a line: task 1 `item,item,…`; later tasks `item,item,…,,target,target`. A token is any text without a comma;
white space around it, a byte-order mark, Windows line ends, a comma at the end of a line, empty lines and a missing
last newline change nothing.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conure.errors import InputError

import numpy as np

CHUNK_BYTES = 1 << 23  # that are read at once, which bounds the memory that text takes
MAX_TOKEN_BYTES = 256  # longer ones are no ids
MAX_LINE_TOKENS = 10_000  # all rows are padded to the longest, so one freak line would take all memory
MAX_LINE_BYTES = MAX_LINE_TOKENS * (MAX_TOKEN_BYTES + 1)
MAX_NUMBER = 10**18  # from here on int64 ends, and a number is read as text
SAMPLE = 1000  # first lines of a file, which tell whether it has a header or quotes
WHITE = b" \t\r"  # is removed around tokens
CONTROL = bytes(set(range(32)).difference(WHITE + b"\n"))


@dataclass
class Lines:
    """Some lines of a file, empty ones left out: their sequences, and if asked for, their targets, the second part.

    The tokens come in file order, an object array of str, or where each is the decimal text of a number, int64.
    """

    numbers: np.ndarray  # (n,) int32: of the lines, from 1
    tokens: list[np.ndarray]  # one array a part
    counts: np.ndarray  # (parts, n) int64: tokens of each line


def missing(path: str) -> str:
    """`PATH does not exist`, and for a relative path, where it was looked for."""
    return f"{path} does not exist" + ("" if os.path.isabs(path) else f" in {os.getcwd()}")


def read_lines(path: str, with_targets: bool, digest: Any = None) -> Iterator[Lines]:
    """The file in chunks of whole lines; `digest`, if any, is updated with all its bytes.

    `with_targets`: whether each line must have `,,` and targets. InputError names file and line, and shows its text.
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
    """Pieces of the file that end with a line, each with the number of its first line."""
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
    """The lines of a piece of the file, the first of which is line `first`; None if all are empty."""
    if b"\r" in chunk:
        chunk = chunk.replace(b"\r\n", b"\n")
    lines = chunk.split(b"\n")
    numbers, lines = first + np.flatnonzero(list(map(len, lines))), list(filter(None, lines))
    if is_start and lines:
        refuse_table(path, numbers, lines)
    parts = split_parts(lines, with_targets)
    tokens = [numbers_in(part) for part in parts]  # which also tells that nothing is amiss with these lines
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
    """The sequences alone, or the sequences and the targets, which stand behind the first `,,` of a line."""
    if not with_targets:
        return [lines]
    pairs = [line.partition(b",,") for line in lines]
    return [[pair[0] for pair in pairs], [pair[2] for pair in pairs]]


def numbers_in(texts: list[bytes]) -> np.ndarray | None:
    """The numbers between commas (n,) int64; None unless each token of the texts is the decimal text of its number.

    So there is neither an empty token nor white space, and equal numbers are equal tokens.
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
    # With a zero in front of any number, the text is longer than what the numbers take.
    return numbers if highest < MAX_NUMBER and digits + commas == len(text) else None


def tokens_in(texts: list[bytes]) -> np.ndarray:
    """The tokens between commas (n,): int64 as `numbers_in`, or else an object array of str."""
    numbers = numbers_in(texts)
    return np.array(b",".join(texts).decode().split(","), dtype=object) if numbers is None else numbers


def tidy(line: bytes, with_targets: bool) -> bytes:
    """The line without white space around its tokens and a comma at its end; ValueError says what is wrong with it."""
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
    """InputError if the file's first lines have what tables have: quotes around tokens, or a line of names."""
    lines = lines[:SAMPLE]
    quoted = [place for place, line in enumerate(lines) if is_quoted(words(line))]
    if 2 * len(quoted) > len(lines):
        reason = "quotes around tokens, of which they would be a part; write the file without (csv.QUOTE_NONE)"
        raise refusal(path, numbers[quoted[0]], lines[quoted[0]], reason)
    header, *sequences = (words(line.partition(b",,")[0]) for line in lines)
    if sequences and header and not any(map(is_number, header)) and all(all(map(is_number, row)) for row in sequences):
        reason = "names above lines of numbers, which would be read as a user; remove this line"
        raise refusal(path, numbers[0], lines[0], reason)


def words(text: bytes) -> list[bytes]:
    """The tokens that are not empty."""
    return [token for field in text.split(b",") if (token := field.strip(WHITE))]


def is_quoted(tokens: list[bytes]) -> bool:
    """Whether quotes are around the whole line, or around most of its tokens that are no numbers."""
    texts = [token for token in tokens if not is_number(token)]
    around = sum(len(token) > 1 and token[:1] == token[-1:] == b'"' for token in texts)
    return 2 * around > len(texts) or (len(tokens) > 1 and tokens[0][:1] == tokens[-1][-1:] == b'"')


def is_number(token: bytes) -> bool:
    """Whether it is a number or a date, as tables have them."""
    return token.translate(None, b".-").isdigit()


def refusal(path: str, number: int, line: bytes, reason: str) -> InputError:
    """What is wrong with a line: file, line number and its text, cut short."""
    shown = line.decode(errors="replace").strip()
    shown = shown if len(shown) <= 60 else shown[:60] + "…"
    return InputError(f"{path}, line {number}: {reason}: {shown!r}")
