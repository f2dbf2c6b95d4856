"""Scores every learned task again, and says whether anything was forgotten.

READS  the newest checkpoint in checkpoint_dir (or the one named), and the data file of each task, which it records
PRINTS a RESULT line per task; behind it the scores recorded when the task was learned, and whether they are the same
EXITS  with 0 if all are the same, with 1 if any differs
NEXT   python -m tools.report, to look at it; python -m tools.export, to use a task
"""

import os
import shlex
from dataclasses import dataclass
from typing import Any

import checkpoint
import data_loader
import metrics
import settings
from reporting import result_line
from training import pick_device


@dataclass
class Hyperparameters:
    checkpoint_dir: str = "checkpoints"  # where the scripts wrote their checkpoints
    checkpoint: str = ""  # a checkpoint file; empty: the newest in checkpoint_dir
    data_dir: str = ""  # where the data files are; empty: where they were when the tasks were learned
    split: str = "test"  # test, validation, or heldout: both, which is the original's test part
    device: str = "auto"  # auto, cpu or cuda


def load_data(task: int, record: dict[str, Any], items: data_loader.Vocabulary, data_dir: str) -> data_loader.TaskData:
    """The examples that a task was learned from; InputError if the file is not there or has changed."""
    path = os.path.join(data_dir, os.path.basename(record["data_path"])) if data_dir else record["data_path"]
    if not os.path.exists(path):
        raise settings.InputError(f"{path}, the data of task {task}, does not exist: name its folder with --data_dir")
    if task == 1:
        data = data_loader.load_sequences(path, record["test_fraction"], items)
    else:
        targets = data_loader.Vocabulary.from_tensor(record["targets"])
        data = data_loader.load_examples(path, record["test_fraction"], items, targets)
    if data.digest != record["data_digest"]:
        raise settings.InputError(f"{path} is not the file that task {task} was learned from, or has changed since")
    return data


def main(hp: Hyperparameters) -> int:
    path = hp.checkpoint or checkpoint.newest(hp.checkpoint_dir)
    print(f"checkpoint: {path}")
    content, _ = checkpoint.load(path)
    device = pick_device(hp.device)
    model = checkpoint.build_model(content).to(device)
    items = data_loader.Vocabulary.from_tensor(content["items"])
    changed = 0
    for task, record in sorted(content["tasks"].items()):
        data = load_data(task, record, items, hp.data_dir)
        reading = checkpoint.reading_of(task, record["state"])
        scores = metrics.evaluate(model, data, reading, record["metric"], record["top_k"], device)[hp.split]
        recorded = record["results"][record["state"]][hp.split]
        same = scores == recorded
        changed += not same
        row = {"task": task, "stage": record["state"], "split": hp.split, "epoch": record["epoch"], **scores}
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
    settings.run(main, Hyperparameters, __doc__)
