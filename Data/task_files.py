"""The task files that the scripts look for in Data/Session, written by whatever makes data."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from files import whole_file
from settings import InputError

SESSION = Path(__file__).resolve().parent / "Session"  # where the scripts look
SCRIPTS = ("pretrain", "click", "like", "gender")  # whose file conure_tp_t1.py, …, conure_tp_t4.py reads by default
LONG_NAMES = {"click": "finetune_click_nouserID", "like": "finetune_like_nouserID"}  # as the authors have them


def file_of(name: str) -> str:
    return f"original_desen_{LONG_NAMES.get(name, name)}.csv"


def refuse_what_is_there(folder: str, files: Iterable[str], overwrite: bool) -> None:
    """InputError if one of the files is there and is to stay, or if there are task files besides them."""
    paths = [Path(folder) / file for file in files]
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        raise InputError(f"{there[0]} is there already: give --overwrite to replace it, or another --output_dir")
    if others := sorted(set(Path(folder).glob("original_desen_*.csv")) - set(paths)):
        raise InputError(f"{others[0]} is of other data: remove it, or give another --output_dir")


def write_files(folder: str, files: dict[str, Iterable[str]], overwrite: bool) -> None:
    """Writes each file's lines, one file after the other; InputError as `refuse_what_is_there`."""
    refuse_what_is_there(folder, files, overwrite)
    for file_name, lines in files.items():
        with whole_file(str(Path(folder) / file_name)) as file:
            file.writelines(f"{line}\n".encode() for line in lines)


def print_next_steps(folder: str, names: Sequence[str]) -> None:
    """Which script reads which file; `names` are those of tasks 1, 2, 3, …"""
    for task, name in enumerate(names, 1):
        path = Path(folder) / file_of(name)
        usual = task <= len(SCRIPTS) and path.resolve() == SESSION / file_of(SCRIPTS[task - 1])
        command = f"python conure_tp_t{task}.py" + ("" if usual else f" --data_path {path}")
        if task > len(SCRIPTS):
            command = 'see "Adding a task" in README.md'
        print(f"next: {command}" if task == 1 else f"task {task}, {name}: {command}")
