"""Compare Conure with one model per task, fine-tuning, joint training and adapters (section 4 of the paper).

  Conure           the eight scripts
  no_retraining    Conure without retraining: half the epochs, scored after pruning
  no_task_2        Conure, task 3 learned right after task 1
  SinMo            one model per task, from scratch
  SinMoAll         one model trained task after task, nothing protected: it forgets
  FineAll          every task fine-tunes a whole copy of task 1's SinMo
  FineHead         every task trains a head on the frozen SinMo of task 1
  MTL              one model per task, trained jointly with task 1 for as long as the longer of the two takes
  PeterRec         SinMo of task 1 frozen; every task trains small adapters and a head
  popular          no model: the most popular targets, or the majority class, of the training part
  counting         no model: task 1 a Markov chain within ten places, tasks 2 and 3 the cosine of items and targets,
                   task 4 naive Bayes

The others train a task for as many epochs as Conure trains and retrains it, with the learning rate, batch size and loss
of the task's script. FineAll, FineHead, MTL and PeterRec serve task 1 with SinMo's model.

READS  the task files in data_dir
WRITES to output_dir: a folder per seed and method, from which an interrupted run resumes; baselines.csv, a row per
       method, task and seed; baselines.md, mean and standard deviation over the seeds
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from conure import checkpoint, launch, metrics, rescoring
from conure.device import pick_device
from conure.errors import InputError
from conure.files import check_output, whole_file

import pandas as pd
import torch

from nextitnet import NextItNet
from pruning import Stage
from tools.comparisons import counting, study
from tools.comparisons.networks import Adapted, HeadOnly, Joint, JointLoss, Unprotected

TASKS = (1, 2, 3, 4)
LATER = TASKS[1:]


@dataclass
class Hyperparameters(study.Settings):
    output_dir: str = "checkpoints/baselines"  # a folder per seed and method, baselines.csv and baselines.md
    only: str = ""  # one of the methods, and what it starts from; empty: all
    overwrite: bool = False  # replace the tables of an earlier run; its checkpoints stay


@dataclass
class Step:
    """The learning of one task by one method, from checkpoint to checkpoint."""

    method: str
    task: int  # whose data it learns
    mode: str = "tp"
    start: "Step | None" = None
    network: type[NextItNet] = NextItNet
    number: int = 0  # of the task in the model, where it is another

    @property
    def stage(self) -> Stage:
        return Stage(self.number or self.task, self.mode)


def chain(
    method: str,
    stages: Iterable[tuple[int, str]],
    before: Iterable[Step] = (),
    network: type[NextItNet] = NextItNet,
    number: int = 0,
) -> list[Step]:
    """The steps `before`, then one for each (task, mode), each from the checkpoint of the step before it."""
    steps = [*before]
    for task, mode in stages:
        steps.append(Step(method, task, mode, steps[-1] if steps else None, network, number))
    return steps


def from_task_1(method: str, network: type[NextItNet]) -> list[Step]:
    """Each later task from the SinMo of task 1."""
    return [SINMO[0], *(Step(method, task, "tp", SINMO[0], network) for task in LATER)]


CONURE = chain("Conure", [(task, mode) for task in TASKS for mode in ("tp", "ret")])
SINMO = [Step("SinMo", task, network=Unprotected) for task in TASKS]
METHODS = {
    "Conure": CONURE,
    "no_retraining": chain("no_retraining", [(task, "tp") for task in LATER], CONURE[:1]),
    "no_task_2": chain("no_task_2", [(3, "tp"), (3, "ret")], CONURE[:2], number=2),
    "SinMo": SINMO,
    "SinMoAll": chain("SinMoAll", [(task, "tp") for task in LATER], SINMO[:1], Unprotected),
    "FineAll": from_task_1("FineAll", Unprotected),
    "FineHead": from_task_1("FineHead", HeadOnly),
    "MTL": [SINMO[0], *(Step("MTL", task, network=Joint) for task in LATER)],
    "PeterRec": from_task_1("PeterRec", Adapted),
}
ALL = [*METHODS, *counting.METHODS]
# Those whose last model serves all tasks; the others keep what each task trained.
CHAINS = ("Conure", "no_retraining", "no_task_2", "SinMoAll")


class Comparison(study.Study):
    """All methods with one seed."""

    def path(self, step: Step) -> str:
        return checkpoint.path_of(str(self.folder / step.method), step.stage)

    def steps_per_epoch(self, task: int, batch_size: int) -> int:
        return math.ceil(len(self.data(task).splits["train"]) / batch_size)

    def run(self, step: Step) -> None:
        """Trains the step, if that is not done yet."""
        hp, data, first = self.settings(step.task, step.mode), self.data(step.task), self.settings(1, "tp")
        loss = self.loss(step.task, hp)
        if step.network is not NextItNet:  # trained in one go, as long as Conure trains and retrains
            hp.epochs += self.settings(step.task, "ret").epochs
        if step.network is Joint:  # with task 1's tables as fast as in tp, and at least as many of its batches
            hp.table_rate = first.table_rate
            wanted = first.epochs * self.steps_per_epoch(1, first.batch_size)
            hp.epochs = max(hp.epochs, math.ceil(wanted / self.steps_per_epoch(step.task, hp.batch_size)))
            loss = JointLoss(loss, self.loss(1, first), self.data(1), first.batch_size)
        start, metric = self.path(step.start) if step.start else None, study.METRIC.get(step.task, "ranking")
        self.learn(self.folder / step.method, hp, step.stage, data, loss, start, step.network, metric)

    def content(self, step: Step) -> dict[str, Any]:
        return checkpoint.load(self.path(step))[0]

    def evaluate(self, content: dict[str, Any]) -> dict[int, dict[str, float]]:
        """The test scores of all tasks that a model has learned, as they are now."""
        model, given = checkpoint.build_model(content), (self.hp.data_dir, pick_device(self.hp.device))
        return {number: rescoring.score(number, content, model, *given) for number in content["tasks"]}

    def rows(self, method: str) -> Iterator[dict[str, Any]]:
        """A row for every task that the method has learned: scores on test, parameters, bytes, seconds."""
        steps = METHODS[method]
        contents = [self.content(step) for step in steps]
        if method in CHAINS:
            scores = self.evaluate(contents[-1])
            total = bytes_to_serve([(contents[-1], set(contents[-1]["tasks"]))])
        else:
            scores = {step.task: as_learned(step, content) for step, content in zip(steps, contents)}
            total = bytes_to_serve([(content, {step.task}) for step, content in zip(steps, contents)])
        for task in sorted({step.task for step in steps}):
            number = next(step.stage.task for step in steps if step.task == task)
            records = [content["tasks"][number] for step, content in zip(steps, contents) if step.task == task]
            yield {
                "method": method,
                "task": task,
                "seed": self.seed,
                "metric": next(iter(scores[number])),
                "score": next(iter(scores[number].values())),
                "n": scores[number]["n"],
                "trained": max(record["trained"] for record in records),
                "bytes_all_tasks": total,
                "seconds": sum(record["seconds"] for record in records),
            }

    def forgetting(self, method: str) -> Iterator[dict[str, Any]]:
        """The test scores of tasks 1..k after task k, where one model has learned them all."""
        last = {step.task: step for step in METHODS[method]}  # of each task
        for after, step in last.items():
            for task, scores in self.evaluate(self.content(step)).items():
                yield {"method": method, "task": task, "after": after, "score": next(iter(scores.values()))}

    def without_model(self, method: str) -> Iterator[dict[str, Any]]:
        """A row for every task: the test scores of counts. A task whose data is too large for them is left out."""
        for task, make_scorer in zip(TASKS, counting.METHODS[method]):
            data, metric = self.data(task), study.METRIC.get(task, "ranking")
            try:
                ranks = counting.ranks(make_scorer(data), data, data.splits["test"])
            except InputError as error:
                print(f"task {task} is left out: {error}", flush=True)
                continue
            scores = metrics.score(ranks, metric, self.settings(task, "tp").top_k)
            name, score = next(iter(scores.items()))
            row = {"method": method, "task": task, "seed": self.seed, "metric": name, "score": score}
            yield row | {"n": scores["n"], "trained": 0, "bytes_all_tasks": 0, "seconds": 0.0}


def as_learned(step: Step, content: dict[str, Any]) -> dict[str, float]:
    """The test scores that were recorded when the step ended."""
    record = content["tasks"][step.stage.task]
    return record["results"][record["state"]]["test"]


def bytes_to_serve(served: Iterable[tuple[dict[str, Any], set[int]]]) -> int:
    """Of all that the tasks' answers need, what several of them share counted once.

    `served`: contents of checkpoints, with the tasks that each answers for.
    """
    needed = {}
    for content, tasks in served:
        for name, tensor in content["model"].items():
            of_another = name.startswith("heads.") and int(name.split(".")[1]) not in tasks
            unused = name.endswith(".owner") and not tensor.any()  # nothing was pruned
            if not of_another and not unused:
                data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
                needed[hashlib.sha256(data).digest()] = data.nbytes
    return sum(needed.values())


def compare(hp: Hyperparameters, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the comparison and of the forgetting table with one seed."""
    runs, scores, forgotten = Comparison(hp, seed), [], []
    for method in [hp.only] if hp.only else ALL:
        print(f"seed {seed}: {method}", flush=True)
        if method in counting.METHODS:
            scores += runs.without_model(method)
            continue
        for step in METHODS[method]:
            runs.run(step)
        scores += runs.rows(method)
        if method in ("Conure", "SinMoAll"):
            forgotten += runs.forgetting(method)
    return scores, forgotten


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def header(*names: str) -> list[str]:
    return [line(*names), "|---" * len(names) + "|"]


def mean_and_spread(values: pd.Series, digits: int = 4) -> str:
    """`0.0599 ± 0.0022`: the mean and the standard deviation, which one value alone does not have."""
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def score_lines(table: pd.DataFrame) -> list[str]:
    """Markdown lines: a row a method, with its score on every task."""
    metric = table.drop_duplicates("task").set_index("task")["metric"]
    tasks = sorted(metric.index)
    columns = [f"task {task}, {metric[task]}" for task in tasks]
    lines = header("method", *columns, "trained, thousands", "MB for all tasks", "seconds")
    for method, rows in table.groupby("method", sort=False):
        by_task = rows.groupby("task")
        cells = [mean_and_spread(by_task.get_group(t)["score"]) if t in by_task.groups else "" for t in tasks]
        trained = " / ".join(f"{by_task.get_group(t)['trained'].max() / 1e3:.0f}" for t in by_task.groups)
        seconds = rows.groupby("seed")["seconds"].sum().median()
        all_tasks = f"{rows['bytes_all_tasks'].max() / 1e6:.1f}" if len(by_task) == len(tasks) else ""
        lines.append(line(method, *cells, trained, all_tasks, f"{seconds:.0f}"))
    return lines


def forgetting_lines(table: pd.DataFrame) -> list[str]:
    """Markdown lines: a row a method and task, with its scores after each further task."""
    tasks = sorted(table["after"].unique())
    lines = header("method", "task", *(f"after task {task}" for task in tasks))
    for (method, task), rows in table.groupby(["method", "task"], sort=False):
        after = rows.groupby("after")["score"]
        cells = [mean_and_spread(after.get_group(t)) if t in after.groups else "" for t in tasks]
        lines.append(line(method, str(task), *cells))
    return lines


def main(hp: Hyperparameters) -> None:
    if hp.only and hp.only not in ALL:
        raise InputError(f"--only {hp.only} is none of {', '.join(ALL)}")
    output = os.path.join(hp.output_dir, f"baselines_{hp.only}" if hp.only else "baselines")
    check_output(f"{output}.csv", hp.overwrite)
    check_output(f"{output}.md", hp.overwrite)
    seeds = study.over_seeds(hp, compare)
    table = pd.DataFrame([row for scores, _ in seeds for row in scores])
    if table.empty:
        raise InputError("every task was left out")
    forgotten = pd.DataFrame([row for _, forgotten in seeds for row in forgotten])
    lines = [f"Test scores, mean ± standard deviation over {hp.seeds} seeds.", "", *score_lines(table)]
    if len(forgotten):
        lines += ["", "After learning further tasks:", "", *forgetting_lines(forgotten)]
    with whole_file(f"{output}.csv") as file:
        table.to_csv(file, index=False)
    with whole_file(f"{output}.md") as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    print("\n".join(lines))


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
