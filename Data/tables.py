"""Tables as people have them: CSV, TSV, RecBole's atomic files, MovieLens' `::` files, `|` between columns, all of them
also as .gz, and parquet.

Three kinds of columns are read: tokens, which are ids and classes, keep their text (`0042` stays `0042`); what rows are
ordered by becomes numbers or dates; conditions see numbers where all values of a column are numbers, otherwise text.
"""

import codecs
import csv
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from tokenize import TokenError
from typing import BinaryIO

from conure.errors import InputError
from conure.line_reader import MAX_TOKEN_BYTES

import numpy as np
import pandas as pd

SEPARATORS = ("::", "\t", ",", "|", ";")  # the first of them that is in the first line separates the columns
RECBOLE_TYPE = re.compile(r":(token|float|token_seq|float_seq)$")  # behind the names in an atomic file's header
NO_TOKEN = ["", r"\N"]  # the second is how MySQL writes it
NO_VALUE = [*NO_TOKEN, "NA", "NaN", "nan", "NULL", "null", "None"]  # among numbers
SURPLUS = "a value more than the first line has"  # the column for it
UNFIT = re.compile(r"[,\x00-\x1f]|^<UNK>$")  # tokens that the task files cannot hold
UNFIT_USER = re.compile(r"[\x00-\x1f]")  # users, who stand in files of their own, one a line

# What pandas raises at a condition that is none.
REFUSALS = (NameError, SyntaxError, TypeError, ValueError, KeyError, AttributeError, NotImplementedError, TokenError)


@dataclass
class Table:
    """The rows that lack no token and no place in the order, as they stand in the file."""

    path: str
    tokens: dict[str, pd.Categorical]  # by column, (n,) each; the categories are distinct texts
    order: list[np.ndarray]  # (n,) each, numbers or datetime64[ns]; the first counts most
    meets: dict[str, np.ndarray]  # by condition, (n,) bool; "" holds everywhere
    left_out: int  # rows that lack something


class Headed:
    """An open file of bytes behind a first line of our own."""

    def __init__(self, first_line: bytes, file: BinaryIO):
        self.first_line, self.file = first_line, file

    def read(self, size: int = -1) -> bytes:
        first_line, self.first_line = self.first_line, b""
        return first_line or self.file.read(size)

    def __iter__(self) -> Iterator[bytes]:  # pandas asks for it, and uses `read`
        return iter(self.file)


def read(
    path: str, header: str, tokens: Sequence[str], order: Sequence[str], conditions: Sequence[str], hint: str
) -> Table:
    """`header`: names of the columns if the file has no line of them; `tokens`: columns of ids and classes, first the
    users'; `hint`: what to do if a column is not there."""
    names = [name.strip() for name in header.split(",")] if header else None
    try:
        form = parquet_names if path.endswith((".parquet", ".pq")) else text_names
        found = form(path, names)
        for name in (*tokens, *order):
            if found.count(name) != 1:
                count = "more than one" if name in found else "no"
                raise InputError(f"{path} has {count} column {name!r}: it has {', '.join(found)}; {hint}")
        others = [name for name in found if any(mentions(condition, name) for condition in conditions)]
        wanted = list(dict.fromkeys((*tokens, *order, *others)))
        wanted = [name for name in found if name in wanted]
        frame = read_parquet(path, wanted) if form is parquet_names else read_text(path, names, found, wanted, tokens)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: see --interactions, --users and the sources of --task") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: convert it, as in iconv -f latin1 -t utf-8") from None
    except (ValueError, OSError, EOFError, csv.Error, zlib.error) as error:
        raise InputError(f"{path} cannot be read as a table: {' '.join(str(error).split())[:120]}") from None
    for name in tokens:
        frame[name] = writable(as_tokens(frame[name]), path, name, UNFIT_USER if name == tokens[0] else UNFIT)
    places = [in_order(frame[name], path, name) for name in order]
    complete = np.logical_and.reduce([frame[name].notna() for name in tokens] + [place.notna() for place in places])
    return Table(
        path=path,
        tokens={name: frame[name].array[complete] for name in tokens},
        order=[place.to_numpy()[complete] for place in places],
        meets={condition: meets(frame, condition, path, found)[complete] for condition in conditions},
        left_out=len(frame) - int(complete.sum()),
    )


def open_bytes(path: str) -> BinaryIO:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def separator_of(line: str, path: str) -> str:
    separator = next((each for each in SEPARATORS if each in line), None)
    if separator is None:
        raise InputError(f"{path}: no tab, comma, |, ; or :: in its first line, {line[:60]!r}, so this is no table")
    if separator == "::" and ":" in line.replace("::", ""):
        raise InputError(f"{path}: a single : in its first line, {line[:60]!r}: use tabs in place of ::")
    return separator


def text_names(path: str, names: Sequence[str] | None) -> list[str]:
    """The names of all columns: those of the header line, or `names`, if they are as many as there are columns."""
    with open_bytes(path) as file:
        line = file.readline(1 << 20).decode("utf-8-sig").rstrip("\r\n")
    separator = separator_of(line, path)
    fields = line.split(separator) if separator == "::" else next(csv.reader([line], delimiter=separator))
    fields = [RECBOLE_TYPE.sub("", field.strip()) for field in fields]
    if names is None:
        return fields
    if len(names) != len(fields):
        raise InputError(f"{path} has {len(fields)} columns in its first line, but the names given are {len(names)}")
    if set(names) & set(fields):
        raise InputError(f"{path} begins with a line of names, {line[:60]!r}: give no names of your own for it")
    return list(names)


def read_text(
    path: str, header: Sequence[str] | None, found: list[str], wanted: list[str], tokens: Sequence[str]
) -> pd.DataFrame:
    """The wanted columns, tokens as categories; a row of more values than the first line has is refused."""
    with open_bytes(path) as file:
        first_line = file.readline(1 << 20)
        separator = separator_of(first_line.decode("utf-8-sig").rstrip("\r\n"), path)
        if header:
            file.seek(len(codecs.BOM_UTF8) if first_line.startswith(codecs.BOM_UTF8) else 0)
        # `::` is taken as `:`, an empty column and `:`, which pandas reads with its fast parser.
        step = len(separator)
        # With `usecols`, pandas cuts longer rows short without a word, so the header makes room for one value more.
        columns = {found.index(name) * step: name for name in wanted} | {len(found) * step: SURPLUS}
        columns |= {2 * number + 1: f"{SURPLUS}, {number}" for number in range(len(found)) if step == 2}
        empty = [name for name in columns.values() if name not in wanted]
        frame = pd.read_csv(
            Headed(separator.encode() * len(found) + b"\n", file),
            sep=separator[0],
            header=0,
            names=[columns[place] for place in sorted(columns)],
            usecols=sorted(columns),
            dtype={name: "category" for name in (*tokens, *empty)},
            keep_default_na=False,
            na_values={name: NO_TOKEN if name in tokens else NO_VALUE for name in columns.values()},
            low_memory=False,  # in parts, categories are merged slowly, and a column may be part numbers, part text
        )
    surplus = frame[empty].notna().any(axis=1).to_numpy()
    if surplus.any():
        raise InputError(
            f"{path}, row {surplus.argmax() + 1}: more than {len(found)} values: put text that holds a "
            f"{separator[0]!r} in double quotes"
        )
    return frame[wanted]


def parquet_names(path: str, names: Sequence[str] | None) -> list[str]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{path}: parquet files are read with pyarrow: .venv/bin/python -m pip install pyarrow"
        ) from None
    return list(parquet.read_schema(path).names)  # `names` is for files without


def read_parquet(path: str, wanted: list[str]) -> pd.DataFrame:
    frame = pd.read_parquet(path, columns=wanted).reset_index(drop=True)
    for name in wanted:
        if frame[name].dtype == object and frame[name].map(np.ndim).any():
            raise ValueError(f"its column {name} holds lists")
    return frame


def as_tokens(column: pd.Series) -> pd.Categorical:
    """The texts of a column; whole numbers that a gap made floats are written as whole numbers."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes, values = column.cat.codes.to_numpy(), column.cat.categories
    else:
        codes, values = pd.factorize(column)
    whole = pd.api.types.is_float_dtype(values) and (np.asarray(values) % 1 == 0).all()
    texts = pd.Index((values.astype(np.int64) if whole else values).astype(str)).str.strip()
    merged, distinct = pd.factorize(texts.where(texts != ""))
    return pd.Categorical.from_codes(np.append(merged, -1)[codes], distinct)


def writable(column: pd.Categorical, path: str, name: str, unfit_text: re.Pattern) -> pd.Categorical:
    """The column itself; InputError names the first row whose token a task file cannot hold."""
    texts = column.categories
    unfit = np.array([bool(unfit_text.search(text)) or len(text.encode()) > MAX_TOKEN_BYTES for text in texts], bool)
    if unfit.any():
        row = int(np.append(unfit, False)[column.codes].argmax())
        raise InputError(
            f"{path}, row {row + 1}: {name} {column[row][:60]!r} cannot stand in a task file: a token has no comma, "
            f"no tab and no line end, at most {MAX_TOKEN_BYTES} bytes, and is not <UNK>"
        )
    return column


def in_order(column: pd.Series, path: str, name: str) -> pd.Series:
    """What rows are ordered by: numbers as they are, ISO dates as datetime64[ns], in UTC where they name their zone."""
    if pd.api.types.is_numeric_dtype(column):
        return column
    dates = pd.to_datetime(column, format="ISO8601", errors="coerce", utc=True).dt.tz_localize(None)
    if dates.count() == column.count():
        return dates
    numbers = pd.to_numeric(column.astype(object), errors="coerce")
    best = max(numbers, dates, key=pd.Series.count)
    wrong = (best.isna() & column.notna()).to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"{path}, row {row + 1}: {name} {str(column.iloc[row])[:60]!r} is neither a number nor an ISO date "
            f"(2020-12-31 23:59:59), so nothing can be ordered by it"
        )
    return best


def mentions(condition: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", condition) is not None


def meets(frame: pd.DataFrame, condition: str, path: str, found: Sequence[str]) -> np.ndarray:
    """Which rows (n,) fulfil the condition, a query of pandas; InputError if it is none."""
    if not condition:
        return np.ones(len(frame), bool)
    columns = {name: comparable(frame[name]) for name in frame if mentions(condition, name)}
    try:
        met = pd.DataFrame(columns, index=frame.index).eval(condition, engine="python")
    except REFUSALS as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"condition {condition!r}: {reason} ({path} has {', '.join(found)})") from None
    if not isinstance(met, pd.Series) or not pd.api.types.is_bool_dtype(met):
        raise InputError(f"condition {condition!r} is no comparison of columns, such as rating >= 4 and rating < 5")
    return met.fillna(False).to_numpy(bool)


def comparable(column: pd.Series) -> pd.Series | np.ndarray:
    """Tokens as numbers where all of them are numbers, or else as texts; other columns as they are."""
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return column
    categories = column.cat.categories
    try:
        return np.append(pd.to_numeric(categories).to_numpy(float), np.nan)[column.cat.codes]
    except ValueError:
        return np.append(categories.to_numpy(object), None)[column.cat.codes]
