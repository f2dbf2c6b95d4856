"""Compare Conure with baselines (section 4 of the paper): from scratch, fine-tuned, joint training, adapters and more.

No model:
  popular          the most popular targets of the training set; for classes, the majority class
  counting         task 1: a Markov chain over the last ten items; tasks 2 and 3: item-target cosine similarity; task 4:
                   naive Bayes
One model per task:
  SinMo            from scratch
  MTL              jointly with task 1, for as many steps as the longer of the two takes
  FineAll          a fine-tuned copy of task 1's SinMo
  SASRec           as FineAll, with self-attention in place of convolutions
One model for all tasks:
  zero_shot        task 1 of Conure alone, which scores the targets of tasks 2 and 3 as items of task 1
  random_backbone  a head per task on a frozen random network
  FineHead         a head per task on the frozen SinMo of task 1
  PeterRec         adapters and a head per task on the frozen SinMo of task 1
  SinMoAll         SinMo fine-tuned task after task without protection: it forgets
  LwF              SinMoAll with distillation of its earlier heads (learning without forgetting)
  replay           SinMoAll with replay of a tenth of the training examples of earlier tasks
  no_retraining    Conure without retraining, scored after pruning
  no_task_2        Conure, task 3 learned right after task 1
  random_head      Conure with heads that start at random, and the l2 and readouts of such heads
  frozen_head      Conure, where tasks 2 and 3 use task 1's head without training it
  frozen_embedding Conure without updates of the item embedding
  no_readout       Conure, where tasks 2 to 4 read the last hidden state
  Conure           the eight scripts

Other methods but MTL train a task for as many epochs as Conure's tp and ret together, with the same learning rate,
batch size and loss; `l2_sp` is larger in SASRec, PeterRec and no_readout, which are better so by validation. New
models but random_backbone start with a spectral item embedding, from the rows of their own task. Tasks 2 to 4 have
readouts in SinMo, FineAll, SinMoAll, LwF, replay and Conure with its other ablations. FineAll, FineHead, MTL and
PeterRec use SinMo's model for task 1. A method that starts from a model of task 1 learns each later task twice, with
the scripts' head and with a random one, and keeps the better by validation; seconds count that one alone.

READS  the task files in data_dir; the comparison ends before the first missing one
WRITES to output_dir: a folder per seed and method, from which an interrupted run resumes; baselines.csv, a row per
       method, task and seed; baselines.md, means, intervals, and what Conure gains over each method
"""

import hashlib
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conure import checkpoint, launch, metrics, ranking, rescoring
from conure.device import pick_device
from conure.errors import InputError
from conure.files import check_output, whole_file
from conure.metrics import Protocol, Ranks

import numpy as np
import pandas as pd
import torch

from pruning import Stage
from tools.comparisons import counting, networks, study, tables
from tools.comparisons.methods import CHAINS, FORGETTING, LATER, METHODS, Step
from tools.comparisons.sasrec import SASRec

ALL = ["popular", "counting", *METHODS]
UNTRAINED = ("popular", "counting", "zero_shot")
Row = tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]  # of the table; its score per example, and their users
# The ablation; methods that are defined by what they train; joint training, which has one representation for two tasks;
# and SASRec, which has a layer norm there already.
WITHOUT_READOUT = ("no_readout", "random_backbone", "FineHead", "PeterRec", "MTL", "SASRec")
L2_SP = dict.fromkeys(("no_readout", "PeterRec", "SASRec"), 0.005)  # where better on validation than the scripts'
KEPT = 0.1  # share of a task's training examples that replay keeps


@dataclass
class Hyperparameters(study.Settings):
    output_dir: str = "checkpoints/baselines"  # a folder per seed and method, baselines.csv and baselines.md
    only: tuple[str, ...] = ()  # a method, and the models that it starts from; may be repeated; none: all methods
    overwrite: bool = False  # replace the tables of an earlier run; its checkpoints stay and are not trained again


class Comparison(study.Study):
    """All methods with one seed."""

    def steps(self, method: str) -> list[Step]:
        """The steps of a method, without the tasks whose files are missing; empty for a method without a model."""
        return [step for step in METHODS.get(method, []) if step.task in self.tasks]

    @cached_property
    def tasks(self) -> list[int]:
        """Task 1 and those after it, up to the first missing data file, as in run_all.sh."""
        there = itertools.takewhile(lambda task: os.path.exists(self.settings(task, "tp").data_path), LATER)
        return [1, *there]

    def folder_of(self, step: Step) -> Path:
        return self.folder / step.method / (f"{step.head}_t{step.task}" if step.head else "")

    def path(self, step: Step) -> str:
        """The checkpoint of the step; if it has variants, of the best one by validation."""
        paths = [checkpoint.path_of(str(self.folder_of(each)), each.stage) for each in step.variants()]
        return paths[0] if len(paths) == 1 else max(paths, key=self.validation_score)

    def validation_score(self, path: str) -> float:
        content, _ = checkpoint.load(path)
        record = content["tasks"][content["task"]]
        return next(iter(record["results"][record["state"]]["validation"].values()))

    def content(self, step: Step) -> dict[str, Any]:
        return checkpoint.load(self.path(step))[0]

    def steps_per_epoch(self, task: int, batch_size: int) -> int:
        return math.ceil(len(self.data(task).splits["train"]) / batch_size)

    def run(self, step: Step) -> None:
        """Trains the step, unless its checkpoint exists."""
        hp, data, first = self.settings(step.task, step.mode), self.data(step.task), self.settings(1, "tp")
        if not step.prunes:  # one stage, for as many epochs as Conure's tp and ret
            hp.epochs += self.settings(step.task, "ret").epochs
        if step.task > 1 and step.mode == "tp":
            if not step.prunes or step.method == "frozen_embedding":
                hp.lora_rank = 0  # methods that prune nothing train the embedding itself, or freeze it
            if step.method in WITHOUT_READOUT:
                hp.readout_rank = 0
        if hasattr(hp, "l2_sp"):
            hp.l2_sp = L2_SP.get(step.method, hp.l2_sp)
        if step.beside == "task 1":  # with task 1's optimiser settings, and at least as many of its batches
            hp.table_rate, hp.dropout, hp.decay = first.table_rate, first.dropout, first.decay
            wanted = first.epochs * self.steps_per_epoch(1, first.batch_size)
            hp.epochs = max(hp.epochs, math.ceil(wanted / self.steps_per_epoch(step.task, hp.batch_size)))
        if step.head == "random":
            hp.informed_head = False
        if step.network is networks.HeadOnly:  # the embedding stays frozen: random, and apart from the head
            hp.tied, hp.spectral = "no", False
        network = step.network
        if network is SASRec:
            hp.positional_embedding, network = True, partial(SASRec, padding=data.padding_id)
        start, metric = self.path(step.start) if step.start else None, study.METRIC.get(step.task, "ranking")
        loss = self.whole_loss(step, hp)
        self.learn(self.folder_of(step), hp, step.stage, data, loss, start, network, metric, step.prunes)

    def whole_loss(self, step: Step, hp: SimpleNamespace) -> networks.AnyLoss:
        """The task's own loss, plus joint training, replay or distillation if the step has it."""
        own = self.loss(step.task, hp)
        match step.beside:
            case "task 1":
                return networks.JointLoss(own, [self.memory(1, 1.0)])
            case "replay":
                return networks.JointLoss(own, [self.memory(task, KEPT) for task in range(1, step.task)])
            case "distillation":
                before = checkpoint.build_model(self.content(step.start))
                return networks.DistilledLoss(own, before.to(pick_device(self.hp.device)))
        return own

    def memory(self, task: int, share: float) -> networks.Memory:
        """A fixed share of the task's training examples, drawn with the seed, and its loss without a penalty."""
        hp, data = self.settings(task, "tp", l2=0.0, l2_sp=0.0), self.data(task)
        examples = np.random.default_rng((self.seed, task)).permutation(data.splits["train"])
        kept = examples[: math.ceil(share * len(examples))]
        return networks.Memory(task, data, self.loss(task, hp), kept, hp.batch_size)

    def ranks_of(self, content: dict[str, Any]) -> dict[int, Ranks]:
        """The current test ranks of all tasks that a model has learned."""
        model, given = checkpoint.build_model(content), (self.hp.data_dir, pick_device(self.hp.device))
        return {number: rescoring.rank(number, content, model, *given) for number in content["tasks"]}

    def rows(self, method: str) -> Iterator[Row]:
        """A row for every task that the method has learned."""
        steps = self.steps(method)
        contents = [self.content(step) for step in steps]
        if method in CHAINS:
            ranks = self.ranks_of(contents[-1])
            total = bytes_to_serve([(contents[-1], set(contents[-1]["tasks"]))])
        else:
            records = {step.task: content["tasks"][step.stage.task] for step, content in zip(steps, contents)}
            ranks = {task: Ranks.from_tensors(record["ranks"]) for task, record in records.items()}
            total = bytes_to_serve([(content, {step.task}) for step, content in zip(steps, contents)])
        for task in sorted({step.task for step in steps}):
            number = next(step.stage.task for step in steps if step.task == task)
            records = [content["tasks"][number] for step, content in zip(steps, contents) if step.task == task]
            yield self.row(
                method,
                task,
                ranks[number],
                trained=max(record["trained"] for record in records),
                bytes_all_tasks=total,
                seconds=sum(record["seconds"] for record in records),
            )

    def row(self, method: str, task: int, ranks: Ranks, **costs: float) -> Row:
        """The test score of a task, and the score and user of each example."""
        protocol = self.protocol(task)
        name, score = metrics.first_score(ranks, protocol)
        row = {"method": method, "task": task, "seed": self.seed, "metric": name, "score": score}
        values = metrics.first_values(ranks, protocol)
        return row | {"n": len(values[0])} | costs, values

    def protocol(self, task: int) -> Protocol:
        return ranking.protocol_of(self.settings(task, "tp"), study.METRIC.get(task, "ranking"), self.data(task))

    def forgetting(self, method: str) -> Iterator[dict[str, Any]]:
        """The test scores of tasks 1..k after task k, of a model that learns all tasks."""
        last = {step.task: step for step in self.steps(method)}  # of each task
        for after, step in last.items():
            for task, ranks in self.ranks_of(self.content(step)).items():
                _, score = metrics.first_score(ranks, self.protocol(task))
                yield {"method": method, "task": task, "after": after, "score": score}

    def untrained_ranks(self, method: str, task: int) -> Ranks:
        """The task's test ranks by a method that does not train on it."""
        data, device = self.data(task), pick_device(self.hp.device)
        if method == "popular":
            return ranking.rank_by_popularity(data, data.splits["test"], self.protocol(task))
        if method == "counting":
            scorer = counting.CountScorer(counting.METHODS[task - 1](data), data)
        else:
            model = checkpoint.build_model(self.content(self.steps(method)[-1]))
            networks.add_item_head(model, data, task)
            scorer = ranking.ModelScorer(model.to(device), data, Stage(task, "inference"), device)
        return ranking.rank_by(scorer, data, data.splits["test"], self.protocol(task))

    def untrained_rows(self, method: str) -> Iterator[Row]:
        """A row for every task that the method scores; a task whose data is too large for counting is left out."""
        for task in [task for task in self.tasks if method != "zero_shot" or task in (2, 3)]:
            try:
                ranks = self.untrained_ranks(method, task)
            except InputError as error:
                print(f"task {task} is left out: {error}", flush=True)
                continue
            yield self.row(method, task, ranks, trained=0, bytes_all_tasks=0, seconds=0.0)


def bytes_to_serve(served: Iterable[tuple[dict[str, Any], set[int]]]) -> int:
    """Bytes of all tensors that inference for the tasks needs; shared ones count once.

    `served`: contents of checkpoints, each with the tasks that it serves.
    """
    needed = {}
    for content, tasks in served:
        for name, tensor in content["model"].items():
            of_another = name.startswith(("heads.", "readouts.")) and int(name.split(".")[1]) not in tasks
            unused = name.endswith(".owner") and not tensor.any()  # never pruned
            if not of_another and not unused:
                data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
                needed[hashlib.sha256(data).digest()] = data.nbytes
    return sum(needed.values())


def compare(hp: Hyperparameters, seed: int) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of the comparison and of the forgetting table with one seed."""
    runs, scores, forgotten = Comparison(hp, seed), [], []
    for method in dict.fromkeys(hp.only or ALL):  # each once
        print(f"seed {seed}: {method}", flush=True)
        for step in runs.steps(method):
            for variant in step.variants():
                runs.run(variant)
        scores += runs.untrained_rows(method) if method in UNTRAINED else runs.rows(method)
        if method in FORGETTING:
            forgotten += runs.forgetting(method)
    return scores, forgotten


def main(hp: Hyperparameters) -> None:
    for method in hp.only:
        if method not in ALL:
            raise InputError(f"--only {method} is no method: give one of {', '.join(ALL)}")
    output = os.path.join(hp.output_dir, "_".join(["baselines", *hp.only]))
    check_output(f"{output}.csv", hp.overwrite)
    check_output(f"{output}.md", hp.overwrite)
    seeds = study.over_seeds(hp, compare)
    table, runs = pd.DataFrame([row for scores, _ in seeds for row, _ in scores]), defaultdict(list)
    if table.empty:
        raise InputError("every task was left out, for the reasons above: nothing is written")
    for row, values in (each for scores, _ in seeds for each in scores):
        runs[row["method"], row["task"]].append(values)
    forgotten = pd.DataFrame([row for _, forgotten in seeds for row in forgotten])
    intervals = f"95 % intervals by bootstrap over users and the {hp.seeds} seeds, each with a split of its own"
    lines = [f"Test scores: means and {intervals}.", "", *tables.score_lines(table, runs)]
    if {method for method, _ in runs} > {"Conure"}:
        lines += ["", "What Conure gains, paired by example:", *tables.gain_lines(table, runs, "Conure")]
    if len(forgotten):
        lines += ["", "After learning further tasks:", "", *tables.forgetting_lines(forgotten)]
    with whole_file(f"{output}.csv") as file:
        table.to_csv(file, index=False)
    with whole_file(f"{output}.md") as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    print("\n".join(lines))
    print(f"wrote {output}.csv\nwrote {output}.md")


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
