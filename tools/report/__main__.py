"""A chain on one page: learning curves, every task after every stage, who owns which weights, what is left, settings.

READS  results.csv and all checkpoints in checkpoint_dir; a task's data file only if what the task reads has changed
WRITES report.html, which needs no other file, learning_curves.png and ownership.png to output_dir
NEXT   open report.html in a browser
"""

import os
from dataclasses import dataclass

from conure import launch
from conure.device import pick_device
from conure.files import whole_file

from tools.report import chain, history


@dataclass
class Hyperparameters:
    checkpoint_dir: str = "checkpoints"  # where the scripts wrote their checkpoints and results.csv
    output_dir: str = ""  # report.html and its pictures; empty: the folder `report` in checkpoint_dir
    data_dir: str = ""  # where the data files are; empty: where they were when the tasks were learned
    device: str = "auto"  # auto, cpu or cuda


def main(hp: Hyperparameters) -> None:
    from tools.report import page, pictures  # only now, as they take matplotlib, and --help does not

    histories = history.histories(hp.checkpoint_dir)
    whole = chain.read(hp.checkpoint_dir, hp.data_dir, pick_device(hp.device))
    written = {
        "learning_curves.png": pictures.learning_curves(histories),
        "ownership.png": pictures.ownership_png(whole.layers),
        "report.html": page.page(whole, histories).encode(),
    }
    for name, content in written.items():
        path = os.path.join(hp.output_dir or os.path.join(hp.checkpoint_dir, "report"), name)
        with whole_file(path) as file:
            file.write(content)
        print(f"wrote {path}")
    print(f"next: open {path} in a browser")


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
