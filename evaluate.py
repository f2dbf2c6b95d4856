"""Evaluates every learned task again and checks that nothing was forgotten.

READS  the newest checkpoint in checkpoint_dir, or the one given; the data file of each task, as the checkpoint names it
PRINTS a RESULT line per task: its scores now, the scores recorded when it was learned, and whether these are the same
       and the weights that the task reads bit-identical; then the first score of each task, ± half of its 95 % interval
       over users, and in brackets the score of the most frequent targets
EXITS  with 0 if nothing was forgotten; with 1 if a weight that a task reads has changed, or if a score differs by more
       than rounding on another machine or by another version of torch
NEXT   python -m tools.report, to look at the chain; python -m tools.export --task 1, to use a task
"""

import os
import shlex
from dataclasses import dataclass
from typing import Literal

from conure import checkpoint, launch, metrics, rescoring
from conure.device import pick_device
from conure.fingerprint import fingerprints
from conure.metrics import Protocol
from conure.reporting import result_line, standing
from conure.settings import Device

# Tolerated difference of a score between machines, where a last bit may swap two items of nearly equal scores: an
# absolute value, or this many rows of a small test set.
ROUNDING, ROUNDED_ROWS = 1e-3, 2


@dataclass
class Hyperparameters:
    checkpoint_dir: str = "checkpoints"  # folder of the chain's checkpoints
    checkpoint: str = ""  # checkpoint file to evaluate; empty: the newest in checkpoint_dir
    data_dir: str = ""  # folder of the data files; empty: where they were when the tasks were learned
    split: Literal["test", "validation", "heldout"] = "test"  # heldout: test and validation, the original's test set
    device: Device = "auto"  # auto: cuda if there is a GPU


def verdict(intact: bool, scores: dict[str, float], recorded: dict[str, float]) -> str:
    """`intact`: whether all that the task reads is bit-identical to when it was learned."""
    # Balanced accuracy is left out, because one row of a rare class may change it a lot.
    compared = [name for name in recorded if not name.startswith("balanced")]
    difference = max(abs(scores[name] - recorded[name]) for name in compared)
    if not intact:
        return f"DIFFERS: weights that the task reads have changed, its scores by up to {difference:.1g}"
    if difference > max(ROUNDING, ROUNDED_ROWS / recorded["n"]):
        return f"DIFFERS by {difference:.1g} with bit-identical weights: other code, or another device"
    return f"bit-identical weights; the score differs by {difference:.1g}" if difference else "same"


def main(hp: Hyperparameters) -> int:
    path = hp.checkpoint or checkpoint.newest(hp.checkpoint_dir)
    print(f"checkpoint: {path}")
    content, _ = checkpoint.load(path)
    model, device = checkpoint.build_model(content), pick_device(hp.device)
    reads, verdicts, learned = fingerprints(model, content), [], []
    for task, record in sorted(content["tasks"].items()):
        ranks = rescoring.rank(task, content, model, hp.data_dir, device, hp.split)
        protocol = Protocol(**record["protocol"])
        scores = metrics.score(ranks, protocol)
        popular = record["popular"] if hp.split == "test" else None
        learned.append(f"task {task} {standing(ranks, protocol, popular)}")
        recorded = record["results"][record["state"]][hp.split]
        verdicts.append(verdict(reads[task] == record["fingerprint"], scores, recorded))
        row = {"task": task, "state": record["state"], "split": hp.split, "epoch": record["epoch"], **scores}
        then = result_line({name: value for name, value in recorded.items() if name != "n"}).removeprefix("RESULT ")
        print(result_line(row | {"seconds": record["seconds"]}), "recorded", then, verdicts[-1])
    print(f"learned, by {hp.split} scores: {', '.join(learned)}")
    changed = sum("DIFFERS" in each for each in verdicts)
    if changed:
        print(f"{changed} of {len(verdicts)} tasks differ from what was learned")
    elif set(verdicts) == {"same"}:
        print("nothing forgotten: every task scores exactly as when it was learned")
    else:
        libraries = ", ".join(" ".join(each) for each in content["versions"].items())
        print("nothing forgotten: the weights that the tasks read are bit-identical. Scores differ by rounding, as the")
        print(f"checkpoint was written on another device or machine, or with other versions ({libraries})")
    folder = os.path.dirname(path) or "."
    given = f" --checkpoint_dir {shlex.quote(folder)}" if folder != Hyperparameters.checkpoint_dir else ""
    page = os.path.join(folder, "report", "report.html")
    there = os.path.exists(page) and os.path.getmtime(page) > os.path.getmtime(path)
    print(f"report: {page if there else f'python -m tools.report{given} makes a page of this chain, with matplotlib'}")
    print(f"next: python -m tools.export --task 1{given}, to use a task; Data/README.md, for data of your own")
    return 1 if changed else 0


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
