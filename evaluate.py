"""Scores every learned task again, and says whether anything was forgotten.

READS  the newest checkpoint in checkpoint_dir (or the one named), and the data file of each task, which it records
PRINTS a RESULT line per task; behind it the scores recorded when the task was learned, and whether they are the same
EXITS  with 0 if all are the same, with 1 if any differs
NEXT   python -m tools.report, to look at it; python -m tools.export, to use a task
"""

import os
import shlex
from dataclasses import dataclass
from typing import Literal

from conure import checkpoint, launch, rescoring
from conure.reporting import result_line
from conure.settings import Device
from conure.training import pick_device


@dataclass
class Hyperparameters:
    checkpoint_dir: str = "checkpoints"  # where the scripts wrote their checkpoints
    checkpoint: str = ""  # a checkpoint file; empty: the newest in checkpoint_dir
    data_dir: str = ""  # where the data files are; empty: where they were when the tasks were learned
    split: Literal["test", "validation", "heldout"] = "test"  # heldout: both, which is the original's test part
    device: Device = "auto"  # auto: cuda if there is a GPU


def main(hp: Hyperparameters) -> int:
    path = hp.checkpoint or checkpoint.newest(hp.checkpoint_dir)
    print(f"checkpoint: {path}")
    content, _ = checkpoint.load(path)
    device = pick_device(hp.device)
    model = checkpoint.build_model(content)
    changed = 0
    for task, record in sorted(content["tasks"].items()):
        scores = rescoring.score(task, content, model, hp.data_dir, device)[hp.split]
        recorded = record["results"][record["state"]][hp.split]
        same = scores == recorded
        changed += not same
        row = {"task": task, "state": record["state"], "split": hp.split, "epoch": record["epoch"], **scores}
        then = result_line({name: value for name, value in recorded.items() if name != "n"}).removeprefix("RESULT ")
        print(result_line(row | {"seconds": record["seconds"]}), "recorded", then, "same" if same else "DIFFERS")
    if changed:
        print(f"{changed} of {len(content['tasks'])} tasks score otherwise than when they were learned")
    else:
        print("nothing forgotten: every task scores exactly as when it was learned")
    folder = os.path.dirname(path) or "."
    given = f" --checkpoint_dir {shlex.quote(folder)}" if folder != Hyperparameters.checkpoint_dir else ""
    print(f"next: python -m tools.report{given}, to look at it; python -m tools.export{given}, to use a task")
    return 1 if changed else 0


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
