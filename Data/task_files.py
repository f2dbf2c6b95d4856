"""The task files that the scripts look for in Data/Session, written by whatever makes data."""

from pathlib import Path

from files import whole_file
from settings import InputError


def write_task_files(folder: str, files: dict[str, list[str]], overwrite: bool) -> None:
    """Writes each list of lines as original_desen_NAME.csv; InputError if one of them is there and is to stay."""
    paths = {name: Path(folder) / f"original_desen_{name}.csv" for name in files}
    there = [str(path) for path in paths.values() if path.exists()]
    if there and not overwrite:
        raise InputError(f"{there[0]} is there already: give --overwrite to replace it, or another --output_dir")
    if others := sorted(set(Path(folder).glob("original_desen_*.csv")) - set(paths.values())):
        raise InputError(f"{others[0]} is of other data: remove it, or give another --output_dir")
    for name, lines in files.items():
        with whole_file(str(paths[name])) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
        print(f"wrote {paths[name]}: {len(lines):,} lines")
    print("next: python conure_tp_t1.py")
