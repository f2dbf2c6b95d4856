"""Names, counts and writing of the task files, and which script reads which of them."""

import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from conure.errors import InputError
from conure.files import whole_file

import numpy as np
import pandas as pd

SESSION = Path(__file__).resolve().parent / "Session"  # where the scripts read by default
SCRIPTS = ("pretrain", "click", "like", "gender")  # the files that conure_tp_t1.py, …, conure_tp_t4.py read by default
CLASSES = "gender"  # the one of these whose script learns classes
LONG_NAMES = {"click": "finetune_click_nouserID", "like": "finetune_like_nouserID"}  # the original's


@dataclass
class TaskFile:
    """The lines of one file without the sequences, and its counts for the report."""

    name: str
    users: np.ndarray  # (lines,) the number of each line's user
    targets: list[str]  # (lines,) text after the sequence; empty in task 1
    rows: int  # number of items in the sequences, or of targets
    distinct: int  # number of distinct ones


def file_of(name: str) -> str:
    return f"original_desen_{LONG_NAMES.get(name, name)}.csv"


def users_of(name: str) -> str:
    return "users.csv" if name == "pretrain" else f"users_{name}.csv"


def refuse_what_is_there(folder: str, files: Iterable[str], overwrite: bool, read: Iterable[str] = ()) -> None:
    """InputError if a file is one of those `read`, if it exists without `overwrite`, or if the folder has other task
    files, which would be of other data."""
    paths, inputs = [Path(folder) / file for file in files], [Path(path).resolve() for path in read]
    if taken := [path for path in paths if path.resolve() in inputs]:
        raise InputError(f"{taken[0]} is a table that is read: give another --output_dir")
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        raise InputError(f"{there[0]} exists: give --overwrite to replace it, or another --output_dir")
    found = {path for pattern in ("original_desen_*.csv", "users*.csv") for path in Path(folder).glob(pattern)}
    if others := sorted(found - set(paths)):
        raise InputError(f"{others[0]} is of other data: move it away, or give another --output_dir")


def write_files(folder: str, files: dict[str, Iterable[str]]) -> None:
    """Writes each file atomically; `files`: lines by file name."""
    for file_name, lines in files.items():
        with whole_file(str(Path(folder) / file_name)) as file:
            file.writelines(f"{line}\n".encode() for line in lines)


def print_files(files: list[TaskFile], lengths: np.ndarray) -> None:
    """`lengths` (U,): items in the sequence of each user."""
    rows = []
    for file in files:
        name, items = file_of(file.name).removeprefix("original_desen_"), lengths[np.unique(file.users)]
        rows.append([name, len(items), file.rows, file.distinct, np.median(items), items.max()])
    columns = ["original_desen_…", "users", "rows", "distinct", "median", "longest"]
    table = pd.DataFrame(rows, range(1, len(rows) + 1), columns)
    print(f"\n{table.to_string(formatters=dict.fromkeys(columns[1:], '{:,.12g}'.format))}")
    print("rows: items of the sequences, or targets; median, longest: items in a sequence\n")


def print_next_steps(folder: str, names: Sequence[str], classes: Collection[str]) -> None:
    """Prints which script reads which file. `names`: of tasks 1, 2, 3, …; `classes`: of those that learn classes."""
    elsewhere = Path(folder).resolve() != SESSION
    apart = {"index_path": "index.csv", "checkpoint_dir": "checkpoints"} if elsewhere else {}
    for task, name in enumerate(names, 1):
        if task <= len(SCRIPTS) and (name in classes) == (SCRIPTS[task - 1] == CLASSES):
            usual = not elsewhere and name == SCRIPTS[task - 1]
            given = ({} if usual else {"data_path": file_of(name)}) | apart
            flags = (f" --{flag} {shlex.quote(str(Path(folder) / place))}" for flag, place in given.items())
            command = f"python conure_tp_t{task}.py" + "".join(flags)
        else:
            command = f'a task of {"classes" if name in classes else "items"}, see "Adding a task" in README.md'
        print(f"next: {command}" if task == 1 else f"task {task}, {name}: {command}")


def print_serving_step(folder: str) -> None:
    """Prints how whole histories are served."""
    rows, users = (shlex.quote(str(Path(folder) / path)) for path in (file_of("pretrain"), users_of("pretrain")))
    print(f"next, to serve them: python -m tools.recommend --task 1 --data_path {rows} --ids {users}")
