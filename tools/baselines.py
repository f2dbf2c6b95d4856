"""Does one model for all tasks pay? The paper's comparisons (section 4): python -m tools.baselines

  Conure           the eight scripts
  no_retraining    Conure, each task pruned and left as it then is, after half the epochs
  no_task_2        Conure, task 3 learned right after task 1
  SinMo            a model of its own for every task, from nothing
  SinMoAll         one model trained task after task, with nothing protected: it forgets
  FineAll          every task fine-tunes all of a copy of task 1's SinMo
  FineHead         every task trains a head on task 1's SinMo, and nothing else
  MTL              a model for every task, trained on it and on task 1 at once, and as long as either of them takes
  PeterRec         task 1's SinMo frozen, small adapters and a head trained for every task
  popular          no model: the most popular targets or the majority class of the training part

A task that Conure trains and retrains is trained for as many epochs by the others, and a step learns as in the task's
script. FineAll, FineHead, MTL and PeterRec answer for task 1 with SinMo's model.

READS  the task files in data_dir
WRITES to output_dir a folder per seed and method, from which a killed run goes on, then baselines.csv (a row per
method, task and seed) and baselines.md (mean and standard deviation over the seeds).
"""

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from conure import checkpoint, launch, losses, metrics
from conure.device import pick_device
from conure.errors import InputError
from conure.files import whole_file

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data_loader
from nextitnet import CausalConv, NextItNet
from pruning import Stage
from tools import study

TASKS = (1, 2, 3, 4)
ADAPTER_SHARE = 4  # channels of the network per channel of an adapter


@dataclass
class Hyperparameters(study.Settings):
    output_dir: str = "checkpoints/baselines"  # a folder per seed and method, baselines.csv and baselines.md
    only: str = ""  # one of the methods, and what it starts from; empty: all


def only_named(model: nn.Module, chosen: Callable[[str], bool]) -> list[nn.Parameter]:
    """Lets gradients reach the parameters whose names are chosen, and returns them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Unprotected(NextItNet):
    """Trains everything but the heads of other tasks; it is never pruned, so that all weights are free."""

    def train_only(self, stage: Stage) -> list[nn.Parameter]:
        return only_named(self, lambda name: not name.startswith("heads.") or self.is_own(name, stage.task))

    def is_own(self, name: str, task: int) -> bool:
        return name.startswith(f"heads.{task}.")


class Joint(Unprotected):
    """Trains task 1's head too."""

    def tables(self, task: int) -> set[nn.Parameter]:
        return super().tables(1)

    def is_own(self, name: str, task: int) -> bool:
        return name.startswith((f"heads.{task}.", "heads.1."))


class HeadOnly(NextItNet):
    def train_only(self, stage: Stage) -> list[nn.Parameter]:
        return only_named(self, lambda name: name.startswith(f"heads.{stage.task}."))


class Adapter(nn.Module):
    """x + up(relu(down(x))), which is x to begin with."""

    def __init__(self, channels: int):
        super().__init__()
        self.down = nn.Linear(channels, channels // ADAPTER_SHARE)
        self.up = nn.Linear(channels // ADAPTER_SHARE, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.relu(self.down(x)))


class Adapted(NextItNet):
    """An adapter behind every convolution: "Parameter-Efficient Transfer from Sequential Behaviors for User Modeling
    and Recommendation" (Yuan et al., SIGIR 2020), serial insertion."""

    def add_head(self, task: int, size: int, bias: bool = False) -> None:
        new = str(task) not in self.heads
        super().add_head(task, size, bias)
        if task > 1 and new:
            for conv in (module for module in self.modules() if isinstance(module, CausalConv)):
                conv.adapter = Adapter(self.architecture["channels"])
                conv.register_forward_hook(lambda conv, _, output: conv.adapter(output))

    def train_only(self, stage: Stage) -> list[nn.Parameter]:
        return only_named(self, lambda name: ".adapter." in name or name.startswith(f"heads.{stage.task}."))


class JointLoss:
    """A task's loss plus task 1's on a batch of its own."""

    def __init__(self, own: losses.Loss, first: losses.Loss, data: data_loader.TaskData, batch_size: int):
        self.own, self.first, self.data, self.batch_size = own, first, data, batch_size

    def __call__(self, model: NextItNet, stage: Stage, inputs: Tensor, targets: Tensor, generator, share):
        examples = self.data.splits["train"]
        drawn = examples[torch.randint(len(examples), (self.batch_size,), generator=generator).numpy()]
        first = self.first(model, Stage(1, stage.mode), *self.data.batch(drawn), generator, share)
        return self.own(model, stage, inputs, targets, generator, share) + first


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


def conure(tasks: Iterable[int] = TASKS) -> list[Step]:
    steps = []
    for task in tasks:
        steps.append(Step("Conure", task, "tp", steps[-1] if steps else None))
        steps.append(Step("Conure", task, "ret", steps[-1]))
    return steps


def no_retraining() -> list[Step]:
    steps = conure([1])[:1]
    for task in TASKS[1:]:
        steps.append(Step("no_retraining", task, "tp", steps[-1]))
    return steps


def no_task_2() -> list[Step]:
    steps = conure([1])
    for mode in ("tp", "ret"):
        steps.append(Step("no_task_2", 3, mode, steps[-1], number=2))
    return steps


def sinmo(tasks: Iterable[int] = TASKS) -> list[Step]:
    return [Step("SinMo", task, network=Unprotected) for task in tasks]


def one_after_the_other() -> list[Step]:
    steps = sinmo([1])
    for task in TASKS[1:]:
        steps.append(Step("SinMoAll", task, "tp", steps[-1], Unprotected))
    return steps


def from_task_1(method: str, network: type[NextItNet]) -> list[Step]:
    (first,) = sinmo([1])
    return [first, *(Step(method, task, "tp", first, network) for task in TASKS[1:])]


def joint() -> list[Step]:
    return sinmo([1]) + [Step("MTL", task, network=Joint) for task in TASKS[1:]]


METHODS: dict[str, Callable[[], list[Step]]] = {
    "Conure": conure,
    "no_retraining": no_retraining,
    "no_task_2": no_task_2,
    "SinMo": sinmo,
    "SinMoAll": one_after_the_other,
    "FineAll": partial(from_task_1, "FineAll", Unprotected),
    "FineHead": partial(from_task_1, "FineHead", HeadOnly),
    "MTL": joint,
    "PeterRec": partial(from_task_1, "PeterRec", Adapted),
}
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
        device = pick_device(self.hp.device)
        model = checkpoint.build_model(content).to(device)
        scores = {}
        for number, record in content["tasks"].items():
            stage, data = checkpoint.stage_of_state(number, record["state"]), self.data(self.task_of(record))
            scores[number] = metrics.evaluate(model, data, stage, record["metric"], record["top_k"], device)["test"]
        return scores

    def task_of(self, record: dict[str, Any]) -> int:
        """Whose data a task of a model was learned from."""
        return next(task for task in TASKS if self.data(task).digest == record["data_digest"])

    def rows(self, method: str) -> Iterator[dict[str, Any]]:
        """A row for every task that the method has learned: scores on test, parameters, bytes, seconds."""
        steps = METHODS[method]()
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
        last = {step.task: step for step in METHODS[method]()}  # of each task
        for after, step in last.items():
            for task, scores in self.evaluate(self.content(step)).items():
                yield {"method": method, "task": task, "after": after, "score": next(iter(scores.values()))}

    def popular(self) -> Iterator[dict[str, Any]]:
        """Scores of the targets' frequencies in the training part."""
        for task in TASKS:
            data, metric = self.data(task), study.METRIC.get(task, "ranking")
            train, test = (torch.from_numpy(data.targets[data.splits[split]]).long() for split in ("train", "test"))
            frequency = train.bincount(minlength=len(data.target_vocabulary)).double()
            ranks = metrics.target_ranks(frequency.expand(len(test), -1), test).numpy()
            scores = metrics.score(ranks, metric, self.settings(task, "tp").top_k)
            name, score = next(iter(scores.items()))
            row = {"method": "popular", "task": task, "seed": self.seed, "metric": name, "score": score}
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


def mean_and_spread(values: pd.Series, digits: int = 4) -> str:
    """`0.0599 ± 0.0022`: the mean and the standard deviation, which one value alone does not have."""
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def comparison(table: pd.DataFrame) -> list[str]:
    """Markdown lines: a row a method, with its score on every task."""
    metric = table.drop_duplicates("task").set_index("task")["metric"]
    tasks = sorted(metric.index)
    lines = [
        "| method | " + " | ".join(f"task {task}, {metric[task]}" for task in tasks)
        + " | trained, thousands | MB for all tasks | seconds |",
        "|---" * (len(tasks) + 4) + "|",
    ]  # fmt: skip
    for method, rows in table.groupby("method", sort=False):
        by_task = rows.groupby("task")
        cells = [mean_and_spread(by_task.get_group(t)["score"]) if t in by_task.groups else "" for t in tasks]
        trained = " / ".join(f"{by_task.get_group(t)['trained'].max() / 1e3:.0f}" for t in by_task.groups)
        seconds = rows.groupby("seed")["seconds"].sum().median()
        all_tasks = f"{rows['bytes_all_tasks'].max() / 1e6:.1f}" if len(by_task) == len(TASKS) else ""
        lines.append(f"| {method} | " + " | ".join([*cells, trained, all_tasks, f"{seconds:.0f}"]) + " |")
    return lines


def forgetting_table(table: pd.DataFrame) -> list[str]:
    """Markdown lines: a row a method and task, with its scores after each further task."""
    tasks = sorted(table["after"].unique())
    lines = ["| method | task | " + " | ".join(f"after task {task}" for task in tasks) + " |"]
    lines.append("|---" * (len(tasks) + 2) + "|")
    for (method, task), rows in table.groupby(["method", "task"], sort=False):
        after = rows.groupby("after")["score"]
        cells = [mean_and_spread(after.get_group(t)) if t in after.groups else "" for t in tasks]
        lines.append(f"| {method} | {task} | " + " | ".join(cells) + " |")
    return lines


def compare(hp: Hyperparameters, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the comparison and of the forgetting table with one seed."""
    runs, scores, forgotten = Comparison(hp, seed), [], []
    for method in [hp.only] if hp.only else [*METHODS, "popular"]:
        print(f"seed {seed}: {method}", flush=True)
        if method == "popular":
            scores += runs.popular()
            continue
        for step in METHODS[method]():
            runs.run(step)
        scores += runs.rows(method)
        if method in ("Conure", "SinMoAll"):
            forgotten += runs.forgetting(method)
    return scores, forgotten


def main(hp: Hyperparameters) -> None:
    if hp.only and hp.only not in [*METHODS, "popular"]:
        raise InputError(f"--only {hp.only} is none of {', '.join([*METHODS, 'popular'])}")
    scores, forgotten = map(list, map(itertools.chain.from_iterable, zip(*study.over_seeds(hp, compare))))
    table = pd.DataFrame(scores)
    lines = [f"Test scores, mean ± standard deviation over {hp.seeds} seeds.", "", *comparison(table)]
    if forgotten:
        lines += ["", "After learning further tasks:", "", *forgetting_table(pd.DataFrame(forgotten))]
    name = f"baselines_{hp.only}" if hp.only else "baselines"
    for suffix, text in (("csv", table.to_csv(index=False)), ("md", "\n".join(lines) + "\n")):
        with whole_file(os.path.join(hp.output_dir, f"{name}.{suffix}")) as file:
            file.write(text.encode())
    print("\n".join(lines))


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
