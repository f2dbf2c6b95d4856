"""Report a chain on one page: learning curves, scores after every stage, weights by owner, capacity left, settings.

READS  results.csv and all checkpoints in checkpoint_dir; a task's data file only if what the task reads has changed
WRITES report.html, which needs no other file, learning_curves.png and ownership.png to output_dir
NEXT   open report.html in a browser
"""

import os
from dataclasses import dataclass

from conure import launch
from conure.device import pick_device
from conure.files import check_output, whole_file
from conure.settings import Device

from tools.report import chain, history, markup


@dataclass
class Hyperparameters:
    checkpoint_dir: str = "checkpoints"  # where the scripts wrote their checkpoints and results.csv
    output_dir: str = ""  # report.html and its pictures; empty: the folder `report` in checkpoint_dir
    data_dir: str = ""  # where the data files are; empty: where they were when the tasks were learned
    device: Device = "auto"  # auto: cuda if there is a GPU
    overwrite: bool = False  # replace files of these names even if they belong to no earlier report


def is_report(path: str) -> bool:
    """Whether `path` is an earlier report; then it and its pictures may be replaced."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return markup.GENERATOR.encode() in file.read(1000)


def main(hp: Hyperparameters) -> None:
    from tools.report import page, pictures  # only now, as they take matplotlib, and --help does not

    folder = hp.output_dir or os.path.join(hp.checkpoint_dir, "report")
    report = os.path.join(folder, "report.html")
    for name in ("report.html", "learning_curves.png", "ownership.png"):
        check_output(os.path.join(folder, name), hp.overwrite, own=is_report(report))
    histories = history.histories(hp.checkpoint_dir)
    whole = chain.read(hp.checkpoint_dir, hp.data_dir, pick_device(hp.device))
    written = {
        "report.html": page.page(whole, histories).encode(),  # first: it marks the pictures as a report's own
        "learning_curves.png": pictures.learning_curves(histories),
        "ownership.png": pictures.ownership_png(whole.layers),
    }
    for name, content in written.items():
        path = os.path.join(folder, name)
        with whole_file(path) as file:
            file.write(content)
        print(f"wrote {path}")
    print(f"next: open {report} in a browser")


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
