"""Reads tables: CSV, TSV, RecBole's atomic files, MovieLens' `::` files, columns separated by `|` or `;`, all of them
also as .gz, and parquet.

Ids and classes are tokens and keep their text: `0042` stays `0042`. In the order and in conditions, a column holds
numbers if all its values are numbers, times if all are ISO dates, else text, by which rows cannot be ordered.
"""

import ast
import codecs
import csv
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from conure.errors import InputError
from conure.line_reader import MAX_TOKEN_BYTES, missing

import numpy as np
import pandas as pd

SEPARATORS = ("::", "\t", ",", "|", ";")  # columns are separated by the first of these that is in the first line
RECBOLE_TYPE = re.compile(r":(token|float|token_seq|float_seq)$")  # suffix of the names in an atomic file's header
NO_TOKEN = ["", r"\N"]  # missing ids and classes; MySQL exports the second
NO_VALUE = [*NO_TOKEN, "NA", "NaN", "nan", "NULL", "null", "None"]  # missing numbers
SURPLUS = "a value more than the first line has"  # name of the column for surplus values
UNFIT = re.compile(r"[,\x00-\x1f]|^<UNK>$")  # not allowed in tokens of task files
UNFIT_USER = re.compile(r"[\x00-\x1f]")  # not allowed in user ids, which are written one a line
PARQUET = (".parquet", ".pq")
WORDS = {"&": " and ", "|": " or "}  # in a query of pandas, & and | have the precedence of these words

# Exceptions that an invalid condition may raise when it is evaluated.
REFUSALS = (NameError, TypeError, ValueError, KeyError, AttributeError, NotImplementedError)


@dataclass
class Table:
    """The rows with a value in every token and order column, in the order of the file."""

    path: str
    tokens: dict[str, pd.Categorical]  # by column, (n,) each; the categories are distinct texts
    order: list[np.ndarray]  # sort keys, (n,) each, numbers or datetime64[ns]; the primary key first
    meets: dict[str, np.ndarray]  # by condition, (n,) bool; all True for ""
    left_out: int  # number of rows with a missing value


class Headed:
    """A binary file with a line put before it."""

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
    """`header`: column names, if the file has no line of them; `tokens`: columns of ids and classes, the users' first;
    `hint`: what to do if a column is missing. InputError if the file is no such table."""
    names = [name.strip() for name in header.split(",")] if header else None
    try:
        form = parquet_names if path.endswith(PARQUET) else text_names
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
        raise InputError(f"{missing(path)}: see --interactions, --users and the sources of --task") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: convert it, as in iconv -f latin1 -t utf-8") from None
    except (ValueError, OSError, EOFError, csv.Error, zlib.error) as error:
        raise InputError(f"{path} cannot be read as a table: {' '.join(str(error).split())[:120]}") from None
    for name in tokens:
        unfit = UNFIT_USER if name == tokens[0] else UNFIT
        frame[name] = writable(as_tokens(frame[name]), path, header, name, unfit)
    values = {name: comparable(frame[name]) for name in dict.fromkeys((*order, *others))}
    for name in order:
        refuse_text(values[name], path, header, name)
    complete = np.logical_and.reduce([frame[name].notna() for name in (*tokens, *order)])
    return Table(
        path=path,
        tokens={name: frame[name].array[complete] for name in tokens},
        order=[values[name].to_numpy()[complete] for name in order],
        meets={condition: meets(values, condition, path, found, len(frame))[complete] for condition in conditions},
        left_out=len(frame) - int(complete.sum()),
    )


def open_bytes(path: str) -> BinaryIO:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def separator_of(line: str, path: str) -> str:
    separator = next((each for each in SEPARATORS if each in line), None)
    if separator is None:
        raise InputError(f"{path}: no tab, comma, |, ; or :: in its first line, {line[:60]!r}: separate columns by one")
    if separator == "::" and ":" in line.replace("::", ""):
        raise InputError(f"{path}: a single : in its first line, {line[:60]!r}: use tabs in place of ::")
    return separator


def text_names(path: str, names: Sequence[str] | None) -> list[str]:
    """The column names: those of the header line, or `names`, of which there must be one per column."""
    with open_bytes(path) as file:
        line = file.readline(1 << 20).decode("utf-8-sig").rstrip("\r\n")
    separator = separator_of(line, path)
    fields = line.split(separator) if separator == "::" else next(csv.reader([line], delimiter=separator))
    fields = [RECBOLE_TYPE.sub("", field.strip()) for field in fields]
    if names is None:
        return fields
    if len(names) != len(fields):
        raise InputError(f"{path} has {len(fields)} columns in its first line, but you name {len(names)}: name each")
    if set(names) & set(fields):
        raise InputError(f"{path} begins with column names, {line[:60]!r}: leave out --columns or --users_columns")
    return list(names)


def read_text(
    path: str, header: Sequence[str] | None, found: list[str], wanted: list[str], tokens: Sequence[str]
) -> pd.DataFrame:
    """The wanted columns, tokens as categories; InputError if a row has more values than the first line."""
    with open_bytes(path) as file:
        first_line = file.readline(1 << 20)
        separator = separator_of(first_line.decode("utf-8-sig").rstrip("\r\n"), path)
        if header:
            file.seek(len(codecs.BOM_UTF8) if first_line.startswith(codecs.BOM_UTF8) else 0)
        # `::` is read as two `:` with an empty column between them, so that pandas uses its fast parser.
        step = len(separator)
        # With `usecols`, pandas silently truncates longer rows, so the header has one column more, to notice these.
        columns = {found.index(name) * step: name for name in wanted} | {len(found) * step: SURPLUS}
        columns |= {2 * number + 1: f"{SURPLUS}, {number}" for number in range(len(found)) if step == 2}
        empty = [name for name in columns.values() if name not in wanted]
        frame = pd.read_csv(
            Headed(separator.encode() * len(found) + b"\n", file),
            sep=separator[0],
            header=0,
            names=[columns[place] for place in sorted(columns)],
            usecols=sorted(columns),
            dtype=dict.fromkeys((*tokens, *empty), "category"),
            keep_default_na=False,
            na_values={name: NO_TOKEN if name in tokens else NO_VALUE for name in columns.values()},
            low_memory=False,  # chunks are slow to merge, and their dtypes may differ
        )
    surplus = frame[empty].notna().any(axis=1).to_numpy()
    if surplus.any():
        raise InputError(
            f"{place_of(path, header, surplus.argmax())}: more than {len(found)} values: put text that holds a "
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
    return list(parquet.read_schema(path).names)  # parquet has names, so `names` is not used


def read_parquet(path: str, wanted: list[str]) -> pd.DataFrame:
    frame = pd.read_parquet(path, columns=wanted).reset_index(drop=True)
    for name in wanted:
        if frame[name].dtype == object and frame[name].map(np.ndim).any():
            raise ValueError(f"its column {name} holds lists")
    return frame


def as_tokens(column: pd.Series) -> pd.Categorical:
    """The values of a column as text; integers that missing values turned into floats are written as integers."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes, values = column.cat.codes.to_numpy(), column.cat.categories
    else:
        codes, values = pd.factorize(column)
    whole = pd.api.types.is_float_dtype(values) and (np.asarray(values) % 1 == 0).all()
    texts = pd.Index((values.astype(np.int64) if whole else values).astype(str)).str.strip()
    merged, distinct = pd.factorize(texts.where(texts != ""))
    return pd.Categorical.from_codes(np.append(merged, -1)[codes], distinct)


def writable(column: pd.Categorical, path: str, header: str, name: str, unfit_text: re.Pattern) -> pd.Categorical:
    """The column itself; InputError, with the row, if a token cannot be written to a task file."""
    texts = column.categories
    unfit = np.array([bool(unfit_text.search(text)) or len(text.encode()) > MAX_TOKEN_BYTES for text in texts], bool)
    if unfit.any():
        row = int(np.append(unfit, False)[column.codes].argmax())
        raise InputError(
            f"{place_of(path, header, row)}: {name} {column[row][:60]!r} cannot stand in a task file: a token has no "
            f"comma, no tab and no line end, at most {MAX_TOKEN_BYTES} bytes, and is not <UNK>"
        )
    return column


def comparable(column: pd.Series) -> pd.Series:
    """Numbers if all values are numbers, naive datetime64[ns] if all are ISO dates, otherwise the column unchanged."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        values = comparable(pd.Series(column.cat.categories, dtype=object))
        return values.reindex(column.cat.codes).set_axis(column.index)  # NaN for code -1
    if pd.api.types.is_numeric_dtype(column):
        return column
    try:
        parsed = as_times(column) if pd.api.types.is_datetime64_any_dtype(column) else pd.to_numeric(column)
    except (ValueError, TypeError):  # at the first value that is no number
        parsed = as_times(column)
    return parsed if parsed.count() == column.count() else column


def as_numbers(column: pd.Series) -> pd.Series:
    return pd.to_numeric(column, errors="coerce")


def as_times(column: pd.Series) -> pd.Series:
    """Naive datetime64[ns], NaT where a value is no ISO date; times with a zone are converted to UTC."""
    return pd.to_datetime(column, format="ISO8601", errors="coerce", utc=True).dt.tz_localize(None)


def kind_of(values: pd.Series) -> str:
    if pd.api.types.is_numeric_dtype(values):
        return "numbers"
    return "dates" if pd.api.types.is_datetime64_dtype(values) else "text"


def refuse_text(values: pd.Series, path: str, header: str, name: str) -> None:
    """InputError if an order column is text, with the first value that is no number or date, and their count."""
    if kind_of(values) != "text":
        return
    best = max(as_numbers(values), as_times(values), key=pd.Series.count)
    wrong = np.flatnonzero(best.isna() & values.notna())
    value, others = str(values.iloc[wrong[0]])[:60], f" (nor are {len(wrong) - 1:,} others)" if len(wrong) > 1 else ""
    raise InputError(
        f"{place_of(path, header, wrong[0])}: {name} {value!r} is neither a number nor an ISO date "
        f"(2020-12-31 23:59:59){others}: convert it, or order by another column"
    )


def place_of(path: str, header: str, row: int) -> str:
    """`path, line 7` for a row of the table, counted from 0; for parquet `path, row 7`."""
    if path.endswith(PARQUET):
        return f"{path}, row {row + 1}"
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        separator = separator_of(text.readline().rstrip("\r\n"), path)
        text.seek(0)
        lines, last = csv.reader(text, delimiter=separator[0]), 0
        left = row + (not header)  # records to skip, with the header line
        for fields in lines:
            if len(fields) > 1 or "".join(fields).strip():  # pandas skips blank lines
                if left == 0:
                    break
                left -= 1
            last = lines.line_num
    return f"{path}, line {last + 1}"


def mentions(condition: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", condition) is not None


def meets(values: dict[str, pd.Series], condition: str, path: str, found: Sequence[str], rows: int) -> np.ndarray:
    """Which rows (n,) fulfil the condition; InputError if it is no query of pandas."""
    if not condition:
        return np.ones(rows, bool)
    text, columns = re.sub(r"""'[^']*'|"[^"]*"|[&|]""", lambda each: WORDS.get(each[0], each[0]), condition), {}
    for name in values:
        if mentions(condition, name):
            plain = name if name.isidentifier() else f"_column_{len(columns)}"  # a name in backticks
            text, columns[plain] = text.replace(f"`{name}`", plain), values[name].rename(name)
    try:
        tree = ast.parse(text.strip(), mode="eval")
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                for left, right in itertools.pairwise(range(len(sides))):
                    sides[right] = comparable_with(sides[left], sides[right], columns)
                    sides[left] = comparable_with(sides[right], sides[left], columns)
                node.left, *node.comparators = sides
        met = pd.DataFrame(columns).eval(ast.unparse(tree), engine="python")
    except SyntaxError:
        met = None
    except REFUSALS as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"condition {condition!r}: {reason} ({path} has {', '.join(found)})") from None
    if not isinstance(met, pd.Series) or not pd.api.types.is_bool_dtype(met):
        raise InputError(f"condition {condition!r} is no comparison of columns, such as rating >= 4 and rating < 5")
    return met.fillna(False).to_numpy(bool)


def comparable_with(side: ast.expr, other: ast.expr, columns: dict[str, pd.Series]) -> ast.expr:
    """`other`, the operand that the column `side` is compared with. A date is replaced by a column, because pandas
    would guess dates from text that is no ISO date. ValueError if the operands are of different kinds."""
    if not isinstance(side, ast.Name) or side.id not in columns:
        return other
    values = columns[side.id]
    kind = kind_of(values)
    if isinstance(other, ast.Name) and other.id in columns:
        against = columns[other.id]
        if kind_of(against) != kind:
            raise ValueError(f"{values.name} holds {kind}, {against.name} {kind_of(against)}")
        return other
    try:
        given = ast.literal_eval(other)
    except ValueError:  # an expression
        return other
    if kind == "dates":
        date = as_times(pd.Series([given]))[0] if isinstance(given, str) and re.match(r"\d{4}", given) else pd.NaT
        if pd.isna(date):
            raise ValueError(f"{values.name} holds dates, and {given!r} is none: write one as '2020-12-31 23:59:59'")
        name = f"_date_{len(columns)}"
        columns[name] = pd.Series(date, values.index)
        return ast.Name(name)
    if {isinstance(each, str) for each in (given if isinstance(given, list | tuple) else [given])} != {kind == "text"}:
        example = "" if kind == "numbers" else f", such as {values[as_numbers(values).isna()].dropna().iloc[0]!r}"
        raise ValueError(f"{values.name} holds {kind}{example}, which {given!r} cannot be compared with")
    return other
