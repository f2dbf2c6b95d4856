"""Makes the task files from a table of interactions: a user, an item and usually a time in each row.

Each user's rows are sorted by time. The oldest ones, a share of --history, are the user's history; its last --length
items are the sequence. Later tasks predict what the user did after the history, in this table or in another one, or
an attribute of the user, such as gender. A target with a time is strictly later than its sequence. Ties, which are rows
of equal time, come in random order, because a network would learn any fixed order. Data/README.md has a command for
each of the usual data sets.

--history 1 without --task makes a file of whole histories, which tools.recommend and tools.represent need to serve
users as of today. Give it an --output_dir of its own, and --min_rows 1 to serve all users.

READS  --interactions, --users, and the tables that --task names: .csv, .tsv, .inter, .user, .dat, .gz of them, .parquet
WRITES original_desen_pretrain.csv                    task 1: the sequence
       original_desen_finetune_click_nouserID.csv     --task "click=…": the sequence, then the targets
       original_desen_finetune_like_nouserID.csv      --task "like=…"
       original_desen_NAME.csv                        --task "NAME=…"
       users.csv, users_NAME.csv                      the user id of each line of these files
NEXT   python conure_tp_t1.py
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from conure import launch
from conure.errors import InputError
from conure.line_reader import MAX_LINE_TOKENS
from conure.settings import Count, Length, Seed, UpTo1

import numpy as np
import pandas as pd

from Data import tables
from Data.task_files import (
    TaskFile,
    file_of,
    print_files,
    print_next_steps,
    print_serving_step,
    refuse_what_is_there,
    users_of,
    write_files,
)
from data_loader import PADDING


@dataclass
class Hyperparameters:
    interactions: str = ""  # table with a user and an item in each row
    user: str = "user_id"  # column of user ids, in all tables
    item: str = "item_id"  # column of item ids, in all tables of items
    order: str = "timestamp"  # columns that order a user's rows, such as date,hour; "": the order of the file
    columns: str = ""  # column names of --interactions, such as user,item,rating,time; "": its first line has them
    where: str = ""  # condition on the rows that task 1 uses, such as "rating >= 4"; "": all rows
    users: str = ""  # table of user attributes, for tasks NAME=users.COLUMN
    users_columns: str = ""  # column names of --users; "": its first line has them
    task: tuple[str, ...] = ()  # "NAME=SOURCE where CONDITION"; SOURCE: later, a table or users.COLUMN; may be repeated
    history: UpTo1 = 0.8  # share of a user's rows, the oldest ones, that are the history; 1: all, for serving
    length: Length = 50  # items in a sequence: the last ones of the history; shorter histories are padded on the left
    min_rows: Count = 5  # minimum of rows per user, of those that task 1 uses; users with fewer are left out
    seed: Seed = 10  # of the random order of ties: rows of a user that are equal in all columns of --order
    output_dir: str = "Data/Session"  # folder of the task files
    overwrite: bool = False  # replace existing task files


ITEM_0 = "item_0"  # token of the item `0` in the task files, where 0 is padding
MANY_TIES = 0.1  # share of ties among neighbouring rows above which it is printed
COLUMNS_HINT = 'name yours with --user, --item and --order (--order "": as in the file), or all of them with --columns'


@dataclass
class Task:
    """A task as given by --task."""

    name: str
    source: str  # "later", "users.COLUMN" or the path of a table
    condition: str  # "": all rows


@dataclass
class Rows:
    """Rows of a table, sorted by user, then by time."""

    lines: np.ndarray  # (n,) the user of each, as a place in `Histories.users`
    places: np.ndarray  # (n,) their row numbers in the table


@dataclass
class Histories:
    """Sequences that all tasks share, of U users, in the order of the lines."""

    users: pd.Index  # (U,) user ids
    lengths: np.ndarray  # (U,) items in the sequence
    sequences: list[str]  # (U,) padded on the left
    ends: list[np.ndarray]  # per order column, (U,): its value in the last row of the sequence
    items: int  # number of distinct items in all sequences
    later: Rows  # of the table of interactions, strictly later than the histories


def task_of(text: str) -> Task:
    match = re.fullmatch(r"\s*(\w+)\s*=\s*(.+?)(?:\s+where\s+(.+?))?\s*", text, re.ASCII | re.DOTALL)
    if not match:
        raise InputError(f'--task {text!r} is not of the form "NAME=SOURCE" or "NAME=SOURCE where CONDITION"')
    return Task(match[1], match[2], match[3] or "")


def check_tasks(hp: Hyperparameters, tasks: list[Task]) -> None:
    files = [file_of("pretrain")]
    for task in tasks:
        if file_of(task.name) in files:
            raise InputError(f"--task {task.name}=…: {file_of(task.name)} is taken: give it another name")
        files.append(file_of(task.name))
        if task.source.startswith("users."):
            if not hp.users:
                raise InputError(f"--task {task.name}={task.source} needs the table of users: give --users")
        elif task.source == "later":
            if hp.history == 1:
                wrong = f"--task {task.name}=later: with --history 1 no row is later than the sequence"
                raise InputError(f"{wrong}: give a smaller --history, or no such task")
        elif not Path(task.source).exists():
            raise InputError(f"--task {task.name}={task.source}: no such file; or write `later`, or `users.COLUMN`")
        elif Path(task.source).resolve() == Path(hp.interactions).resolve():
            raise InputError(f"--task {task.name}={task.source} is --interactions itself: write {task.name}=later")


def read_interactions(hp: Hyperparameters, path: str, conditions: list[str]) -> tables.Table:
    """Reads a table of interactions and renames the item `0`, which is the padding token."""
    order = [name.strip() for name in hp.order.split(",")] if hp.order else []
    table = tables.read(path, hp.columns, (hp.user, hp.item), order, conditions, COLUMNS_HINT)
    if table.left_out:
        print(f"{path}: {table.left_out:,} rows lack a value of {', '.join((hp.user, hp.item, *order))}: left out")
    items = table.tokens[hp.item]
    if ITEM_0 in items.categories:
        raise InputError(f"{path} has an item {ITEM_0}, the name that item 0 gets in the task files: rename it")
    if PADDING in items.categories:
        table.tokens[hp.item] = items.rename_categories({PADDING: ITEM_0})
        print(f"{path}: item {PADDING}, which is padding in the task files, is called {ITEM_0} there")
    return table


def sorted_by(lines: np.ndarray, order: list[np.ndarray]) -> np.ndarray:
    """Row numbers (n,), sorted by user and order columns; the sort is stable."""
    return np.lexsort((*reversed(order), lines)) if order else np.argsort(lines, kind="stable")


def in_order(hp: Hyperparameters, table: tables.Table, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (n,), sorted by user and order columns, with ties shuffled; and for each of these rows the position
    (n,) of the first row that it ties with. Without order columns there are no ties."""
    places, numbers = sorted_by(lines, table.order), np.arange(len(lines))
    if not table.order:
        return places, numbers
    differs = [values[places][1:] != values[places][:-1] for values in (lines, *table.order)]
    first = np.maximum.accumulate(np.where(np.append(True, np.logical_or.reduce(differs)), numbers, 0))
    # Adding less than 1 reorders ties only. They are sorted by item first, so that the shuffle does not depend on the
    # order of the file.
    items = table.tokens[hp.item]
    ranks = np.argsort(np.argsort(items.categories)) / len(items.categories)
    places = places[np.argsort(first + ranks[items.codes[places]], kind="stable")]
    return places[np.argsort(first + np.random.default_rng(hp.seed).random(len(first)), kind="stable")], first


def histories_of(hp: Hyperparameters, table: tables.Table) -> Histories:
    column = table.tokens[hp.user]
    if not len(column):
        raise InputError(f"{hp.interactions} has no row with a user and an item: check --user, --item and --order")
    # Shorter ids first, so that numbers sort as numbers; the order does not depend on that of the file.
    ids = pd.Index(sorted(column.categories, key=lambda id: (len(id), id)))
    lines = ids.get_indexer(column.categories).astype(np.int32)[column.codes]
    places, first = in_order(hp, table, lines)
    lines, used = lines[places], table.meets[hp.where][places]
    starts = np.searchsorted(lines, np.arange(len(ids)))
    before = np.cumsum(used) - used  # number of rows before each row that task 1 uses, ...
    before -= before[np.minimum(starts, len(lines) - 1)][lines]  # ... of the same user
    earlier = before[first]  # the same without ties
    print_ties(hp, lines[used], first[used])
    rows = np.bincount(lines, weights=used, minlength=len(ids)).astype(np.int64)
    kept = np.where(rows < hp.min_rows, 0, (rows * hp.history).astype(np.int64))
    behind = used & (before == kept[lines])  # each user's first row after the cut; the cut moves back before its ties
    kept[lines[behind]] = earlier[behind]
    chosen = kept > 0
    print_left_out(hp, rows, chosen)
    line_of = np.cumsum(chosen) - 1
    kept = kept[lines]
    in_sequence = used & (before < kept) & (before >= kept - hp.length)
    last = places[used & (before == kept - 1)]
    later = (earlier >= kept) & (kept > 0)
    sequence = Rows(line_of[lines[in_sequence]], places[in_sequence])
    lengths = np.bincount(sequence.lines)
    items = table.tokens[hp.item]
    texts = zip(lengths.tolist(), joined(items, sequence))
    return Histories(
        users=ids[chosen],
        lengths=lengths,
        sequences=[f"{PADDING}," * (hp.length - length) + text for length, text in texts],
        ends=[values[last] for values in table.order],
        items=len(np.unique(items.codes[sequence.places])),
        later=Rows(line_of[lines[later]], places[later]),
    )


def print_ties(hp: Hyperparameters, lines: np.ndarray, first: np.ndarray) -> None:
    """Prints the share of ties if it is large. `lines`, `first` (n,): user, and first tied row, of task 1's rows."""
    neighbours = np.count_nonzero(lines[1:] == lines[:-1])
    ties = np.count_nonzero(first[1:] == first[:-1])
    if ties > MANY_TIES * neighbours:
        share = 100 * ties / neighbours
        print(f"{share:.1f} % of neighbouring rows have the same {hp.order}: those come in random order (--seed)")


def print_left_out(hp: Hyperparameters, rows: np.ndarray, chosen: np.ndarray) -> None:
    """Counts users without a sequence; InputError if all are. `rows` (U,): those that task 1 uses; `chosen` (U,) bool:
    who has a sequence."""
    of_task_1 = f" where {hp.where}" if hp.where else ""
    reason = f"fewer than {hp.min_rows} rows{of_task_1}, or none before the cut"
    if not chosen.any():
        flags = "--min_rows, --history, --order, --where"
        raise InputError(f"{hp.interactions}: no user is left, all have {reason}: see {flags}")
    if not chosen.all():
        print(f"{np.count_nonzero(~chosen):,} of {len(rows):,} users are left out: {reason}")


def joined(tokens: pd.Categorical, rows: Rows) -> list[str]:
    """The tokens of each user with rows, separated by commas."""
    texts = tokens.categories.to_numpy(object)[tokens.codes[rows.places]].tolist()
    ends = np.append(np.flatnonzero(np.diff(rows.lines)) + 1, len(texts)).tolist()
    return [",".join(texts[start:end]) for start, end in zip([0, *ends], ends)]


def rows_of_table(hp: Hyperparameters, task: Task, histories: Histories) -> tuple[pd.Categorical, Rows]:
    """Items of another table: of users with a sequence; if the table has an order, strictly later than it."""
    table = read_interactions(hp, task.source, [task.condition])
    lines, chosen = lines_of(table, hp.user, task, histories)
    tied = chosen.copy()
    after = np.zeros(len(lines), bool)
    for end, values in zip(histories.ends, table.order):
        if (end.dtype.kind == "M") != (values.dtype.kind == "M"):
            both = f"{task.source} and {hp.interactions}"
            raise InputError(f"of {both} one is ordered by dates, the other by numbers: convert one of them")
        after |= tied & (values > end[lines])
        tied &= values == end[lines]
    places = np.flatnonzero(after if table.order else chosen)
    places = places[sorted_by(lines[places], [values[places] for values in table.order])]
    return table.tokens[hp.item], Rows(lines[places], places)


def classes_of_users(hp: Hyperparameters, task: Task, histories: Histories) -> tuple[pd.Categorical, Rows]:
    """One class per user; users without a class, or with several, are left out."""
    name = task.source.removeprefix("users.")
    hint = "name yours with --user, or all of them with --users_columns"
    table = tables.read(hp.users, hp.users_columns, (hp.user, name), [], [task.condition], hint)
    if table.left_out:
        print(f"{hp.users}: {table.left_out:,} rows lack a value of {hp.user}, {name}: left out of task {task.name}")
    lines, chosen = lines_of(table, hp.user, task, histories)
    classes = table.tokens[name]
    found = pd.DataFrame({"line": lines, "class": classes.codes})[chosen].drop_duplicates()
    several = found["line"].duplicated(keep=False)
    if several.any():
        count = found["line"][several].nunique()
        print(f"{hp.users}: {count:,} users have more than one {name}: left out of task {task.name}")
    found = found[~several].sort_values("line")
    return classes, Rows(found["line"].to_numpy(), found.index.to_numpy())


def lines_of(table: tables.Table, user: str, task: Task, histories: Histories) -> tuple[np.ndarray, np.ndarray]:
    """Per row, (n,) each: the user's place in `Histories.users`, -1 for users not in it; whether the task uses it."""
    column = table.tokens[user]
    lines = np.append(histories.users.get_indexer(column.categories), -1)[column.codes]
    return lines, (lines >= 0) & table.meets[task.condition]


def file_of_task(hp: Hyperparameters, task: Task, table: tables.Table, histories: Histories) -> TaskFile:
    if task.source.startswith("users."):
        tokens, rows = classes_of_users(hp, task, histories)
    elif task.source == "later":
        met = table.meets[task.condition][histories.later.places]
        tokens, rows = table.tokens[hp.item], Rows(histories.later.lines[met], histories.later.places[met])
    else:
        tokens, rows = rows_of_table(hp, task, histories)
    distinct = len(np.unique(tokens.codes[rows.places]))
    if distinct < 2:
        wanted = f"{task.name}={task.source}" + (f" where {task.condition}" if task.condition else "")
        found = "no target is left" if distinct == 0 else "one target only is left, which needs no prediction"
        users = f"for the {len(histories.users):,} users of task 1"
        raise InputError(f"--task {wanted!r}: {users} {found}: check its source and condition")
    # Targets per line, besides the sequence and the empty token of `,,`. A user with more takes several lines.
    room = MAX_LINE_TOKENS - hp.length - 1
    first = np.searchsorted(rows.lines, rows.lines)  # the first row of the same user
    line = rows.lines * len(rows.lines) + (np.arange(len(rows.lines)) - first) // room
    users = rows.lines[np.flatnonzero(np.diff(line, prepend=-1))]
    targets = [f",,{texts}" for texts in joined(tokens, Rows(line, rows.places))]
    return TaskFile(task.name, users, targets, len(line), distinct)


def written(files: list[TaskFile], histories: Histories) -> dict[str, Iterable[str]]:
    """The lines of each file by its name, generated as they are written."""
    contents: dict[str, Iterable[str]] = {}
    for file in files:
        lines = zip(file.users, file.targets)
        contents[file_of(file.name)] = (histories.sequences[user] + targets for user, targets in lines)
        contents[users_of(file.name)] = histories.users[file.users]
    return contents


def main(hp: Hyperparameters) -> None:
    if not hp.interactions:
        raise InputError("no table of interactions: give --interactions FILE (--help lists the flags)")
    if hp.length > MAX_LINE_TOKENS - 2:
        raise InputError(f"--length {hp.length} makes no sense: a line of a task file holds {MAX_LINE_TOKENS:,} tokens")
    tasks = [task_of(text) for text in hp.task]
    check_tasks(hp, tasks)
    names = ["pretrain", *(task.name for task in tasks)]
    paths = [path for name in names for path in (file_of(name), users_of(name))]
    read = [hp.interactions, hp.users, *(task.source for task in tasks)]
    refuse_what_is_there(hp.output_dir, paths, hp.overwrite, read)

    conditions = [task.condition for task in tasks if task.source == "later"]
    table = read_interactions(hp, hp.interactions, [hp.where, *conditions])
    histories = histories_of(hp, table)
    count, rows = len(histories.users), int(histories.lengths.sum())
    files = [TaskFile("pretrain", np.arange(count), [""] * count, rows, histories.items)]
    files += [file_of_task(hp, task, table, histories) for task in tasks]
    write_files(hp.output_dir, written(files, histories))
    print_files(files, histories.lengths)
    if hp.history == 1 and not tasks:
        print_serving_step(hp.output_dir)
    else:
        print_next_steps(hp.output_dir, names, {task.name for task in tasks if task.source.startswith("users.")})


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
