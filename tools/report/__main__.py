"""Report a chain on one page: scores, forgetting, learning curves, weights by owner, capacity left, hyperparameters.

READS  results.csv and all checkpoints in checkpoint_dir; a task's data file only if what the task reads has changed
WRITES report.html, self-contained, to output_dir
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
    output_dir: str = ""  # for report.html; empty: the folder `report` in checkpoint_dir
    data_dir: str = ""  # where the data files are; empty: where they were when the tasks were learned
    device: Device = "auto"  # auto: cuda if there is a GPU
    overwrite: bool = False  # replace report.html even if it is no earlier report


def is_report(path: str) -> bool:
    """Whether `path` is an earlier report, which may be replaced."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return markup.GENERATOR.encode() in file.read(1000)


def main(hp: Hyperparameters) -> None:
    from tools.report.page import page  # imports matplotlib, which --help does not need

    report = os.path.join(hp.output_dir or os.path.join(hp.checkpoint_dir, "report"), "report.html")
    check_output(report, hp.overwrite, own=is_report(report))
    histories = history.histories(hp.checkpoint_dir)
    whole = chain.read(hp.checkpoint_dir, hp.data_dir, pick_device(hp.device))
    text = page(whole, histories)
    with whole_file(report) as file:
        file.write(text.encode())
    print(f"wrote {report}")
    print(f"next: open {report} in a browser")


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
