"""What a folder of checkpoints tells: every task's score after every stage, what was forgotten, who owns which weight,
how many more tasks fit."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from conure import checkpoint, fingerprint, rescoring
from conure.errors import InputError

import numpy as np
import torch

import pruning
from nextitnet import NextItNet
from pruning import Stage


class Cell(NamedTuple):
    """A task's score on its test part after some stage."""

    name: str  # of the metric: the first that the task reports
    score: float
    source: str  # recorded: by the task's own stage; same: all that it reads is bit-identical; scored: scored again


class Layer(NamedTuple):
    name: str
    counts: dict[int, int]  # of its weights by owner, free ones (0) included


@dataclass
class Chain:
    """All checkpoints of a folder."""

    folder: str
    stages: list[Stage] = field(default_factory=list)  # those that have a checkpoint, in order
    cells: dict[tuple[int, Stage], Cell] = field(default_factory=dict)  # by task and stage
    versions: dict[Stage, dict[str, str]] = field(default_factory=dict)
    records: dict[int, dict[str, Any]] = field(default_factory=dict)  # of each task, in the newest checkpoint
    layers: list[Layer] = field(default_factory=list)  # of the newest checkpoint

    def learned(self, task: int) -> Cell:
        """What the task scored at the end of its own last stage."""
        return recorded(self.records[task])

    def now(self, task: int) -> Cell:
        return self.cells[task, self.stages[-1]]

    def changed(self, task: int, stage: Stage) -> bool:
        """Whether the task's score after this stage of a later task differs from the one when it was learned."""
        return stage.task > task and self.cells[task, stage][:2] != self.learned(task)[:2]

    def after(self) -> dict[int, dict[int, float]]:
        """R of `transfer`: R[l][t] is the score of task t after the last stage of task l."""
        table = {task: {task: self.learned(task).score} for task in self.records}  # even where its checkpoint is gone
        for (task, (learned, _)), cell in self.cells.items():
            if task != learned or learned == self.stages[-1][0]:
                table[learned][task] = cell.score  # of two stages the later, which comes later in `cells`
        return table

    def pruned(self) -> bool:
        """False for a model fine-tuned task after task: none of its weights has an owner."""
        return any(owner != pruning.FREE for owner in self.counts())

    def counts(self) -> dict[int, int]:
        """Weights of all layers by owner: tasks in order, then what is free."""
        counts = Counter()
        for layer in self.layers:
            counts.update(layer.counts)
        return dict(sorted(counts.items(), key=lambda item: item[0] or pruning.MAX_TASKS + 1))


def cell_of(scores: dict[str, float], source: str) -> Cell:
    return Cell(*next(iter(scores.items())), source)


def recorded(record: dict[str, Any]) -> Cell:
    """The test score that the task's last stage recorded."""
    return cell_of(record["results"][record["state"]]["test"], "recorded")


def read(folder: str, data_dir: str, device: torch.device) -> Chain:
    """Reads the checkpoints of `folder` in order, one in memory at a time.

    Raises InputError if there is none or if they are no chain, and as checkpoint.load, checkpoint.build_model and
    rescoring.load_data do.
    """
    checkpoint.newest(folder)  # which says what to run where there is none
    chain, seen = Chain(folder), {}  # seen: for each task what it read when it was last scored
    for path in checkpoint.in_folder(folder):
        content, _ = checkpoint.load(os.path.join(folder, path))
        model, stage = checkpoint.build_model(content), checkpoint.stage_of(path)
        fingerprints = fingerprint.fingerprints(model, content)
        for task, record in sorted(content["tasks"].items()):
            reads = fingerprints[task]
            if stage.task == task:
                cell = recorded(record)
            elif seen.get(task) == reads:
                cell = chain.cells[task, chain.stages[-1]]._replace(source="same")
            else:
                cell = cell_of(rescoring.score(task, content, model, data_dir, device), "scored")
            seen[task] = reads
            chain.cells[task, stage] = cell
        chain.stages.append(stage)
        chain.versions[stage] = content["versions"]
    if others := {task for task, _ in chain.cells} - set(content["tasks"]):
        raise InputError(
            f"{path} in {folder} has not learned task {min(others)}: they are no chain, but separate models"
        )
    chain.records, chain.layers = dict(sorted(content["tasks"].items())), list(layers_of(model))
    return chain


def layers_of(model: NextItNet) -> Iterable[Layer]:
    for number, block in enumerate(model.blocks, 1):
        for conv, layer in enumerate((block.conv1, block.conv2), 1):
            owners, counts = layer.owner.cpu().unique(return_counts=True)
            yield Layer(f"block {number}, conv {conv}", dict(zip(owners.tolist(), counts.tolist())))


class Transfer(NamedTuple):
    """Of the tasks of one metric; None if none of them was learned before the last task."""

    average: float
    backward: float | None
    forgetting: float | None


def transfer(after: dict[int, dict[int, float]], tasks: list[int]) -> Transfer:
    """Average score, backward transfer and forgetting of `tasks`, which all have the same metric.

    R[l][t] = `after`[l][t] is the score of task t once task l has been learned, and T the last task learned.
    Average: the mean of R[T][t] over `tasks`. Backward transfer (Lopez-Paz and Ranzato 2017, GEM): the mean of
    R[T][t] - R[t][t] over those before T, negative where something was lost. Forgetting (Chaudhry et al. 2018): the
    mean over the same of max(R[l][t] for t <= l < T) - R[T][t]; no l < t counts, as task t has no head before it.
    """
    last = max(after)
    now, earlier = after[last], [task for task in tasks if task != last]
    average = float(np.mean([now[task] for task in tasks]))
    if not earlier:
        return Transfer(average, None, None)
    before = [scores for learned, scores in after.items() if learned < last]
    best = {task: max(scores[task] for scores in before if task in scores) for task in earlier}
    return Transfer(
        average,
        float(np.mean([now[task] - after[task][task] for task in earlier])),
        float(np.mean([best[task] - now[task] for task in earlier])),
    )


def by_metric(chain: Chain) -> dict[str, list[int]]:
    """Tasks by metric, as a mean of an MRR and an accuracy says nothing."""
    groups: dict[str, list[int]] = {}
    for task in chain.records:
        groups.setdefault(chain.learned(task).name, []).append(task)
    return groups


class Room(NamedTuple):
    """What a further task would keep and leave free."""

    task: int
    kept: int  # weights
    free: int  # weights that it leaves


def room(layers: list[Layer], ratios: list[float]) -> list[Room]:
    """The further tasks that fit, each with the last of `ratios`, the prune ratios so far: until a layer has no free
    weight left, or the owner map no number."""
    sizes, free = [sum(layer.counts.values()) for layer in layers], [layer.counts.get(0, 0) for layer in layers]
    rooms = []
    while all(free) and len(ratios) < pruning.MAX_TASKS:
        kept = [min(pruning.keep_count(size, ratios, ratios[-1]), left) for size, left in zip(sizes, free)]
        free = [left - count for left, count in zip(free, kept)]
        ratios = [*ratios, ratios[-1]]
        rooms.append(Room(len(ratios), sum(kept), sum(free)))
    return rooms
