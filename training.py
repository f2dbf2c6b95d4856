"""The losses, and the run of one stage: train, keep the best, report, prune, save."""

import os
import signal
import time
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import metrics
import pruning
from data_loader import LogUniformSampler, TargetSampler, TaskData
from nextitnet import NextItNet
from pruning import Reading
from reporting import Progress, append_result, result_line
from settings import InputError, printable

BETA2, ADAM_EPS = 0.999, 1e-8  # the original's, which are Adam's defaults


def sampled_softmax(
    hidden: Tensor, labels: Tensor, head: nn.Linear, negatives: Tensor, label_counts: Tensor, negative_counts: Tensor
) -> Tensor:
    """Loss (N,) of `labels` (N,) given `hidden` (N, C) against `negatives` (S,), which all rows share.

    From every logit goes the log of the count expected in the sample (`label_counts` (N,), `negative_counts` (S,));
    negatives that equal the label are left out. As tf.nn.sampled_softmax_loss.
    """
    own = (hidden * head.weight[labels]).sum(dim=1) + head.bias[labels] - label_counts.log()  # (N,)
    others = F.linear(hidden, head.weight[negatives], head.bias[negatives] - negative_counts.log())  # (N, S)
    others = others.masked_fill(negatives == labels[:, None], -torch.inf)
    return torch.cat([own[:, None], others], dim=1).logsumexp(dim=1) - own


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """-log sigmoid(positive - negative), elementwise: Bayesian personalised ranking."""
    return F.softplus(negative - positive)


def bce(positive: Tensor, negative: Tensor) -> Tensor:
    """-log sigmoid(positive) - log(1 - sigmoid(negative)), elementwise."""
    return F.softplus(-positive) + F.softplus(negative)


class NextItemLoss:
    """Task 1: the next item at every position, by sampled softmax, or full softmax if the sample is to be all items."""

    def __init__(self, sampler: LogUniformSampler, ignored_label: int | None):
        """Positions whose next item is `ignored_label` do not count; None: all count, as in the original."""
        self.sampler, self.ignored_label = sampler, ignored_label

    def __call__(
        self, model: NextItNet, reading: Reading, inputs: Tensor, targets: Tensor, generator: torch.Generator
    ) -> Tensor:
        hidden = model(inputs, reading).flatten(0, 1)  # (N, C), N = B * T
        labels = torch.cat([inputs[:, 1:], targets[:, None]], dim=1).flatten()  # (N,)
        if self.ignored_label is not None:
            counted = labels != self.ignored_label
            hidden, labels = hidden[counted], labels[counted]
        head = model.head(1)
        if self.sampler.count == self.sampler.items:
            losses = F.cross_entropy(head(hidden), labels, reduction="none")
        else:
            negatives, draws = self.sampler.draw(generator)
            negatives = negatives.to(labels.device)
            counts = [self.sampler.expected_count(ids, draws) for ids in (labels, negatives)]
            losses = sampled_softmax(hidden, labels, head, negatives, *counts)
        return losses.sum() / max(len(losses), 1)


class PairLoss:
    """Tasks 2+: the target against one sampled negative, by `bpr` or `bce`, plus l2 * |head|^2 / 2."""

    def __init__(self, compare: Callable[[Tensor, Tensor], Tensor], sampler: TargetSampler, l2: float):
        self.compare, self.sampler, self.l2 = compare, sampler, l2

    def __call__(
        self, model: NextItNet, reading: Reading, inputs: Tensor, targets: Tensor, generator: torch.Generator
    ) -> Tensor:
        user = model.user_representation(inputs, reading)  # (B, C)
        head = model.head(reading.task).weight
        negatives = self.sampler.draw(targets, generator)
        positive, negative = (user * head[targets]).sum(dim=1), (user * head[negatives]).sum(dim=1)  # (B,)
        return self.compare(positive, negative).mean() + self.l2 * head.square().sum() / 2


Loss = NextItemLoss | PairLoss


class Run:
    """One stage of one task: holds its data and model, trains, reports and saves."""

    def __init__(self, hp: Any, reading: Reading, data: TaskData, model: NextItNet, tasks: dict, metric: str):
        """`hp` is the script's hyperparameter block; `tasks` the records of the checkpoint that the stage starts from."""
        self.hp, self.reading, self.data, self.tasks = hp, reading, data, tasks
        self.device = torch.device(pick_device(hp.device))
        self.model = model.to(self.device)
        self.generator = torch.Generator().manual_seed(hp.seed)
        self.metric = metric
        self.epoch, self.seconds = 0.0, 0.0  # trained so far; evaluation is not counted
        self.results: dict[str, dict[str, dict[str, float]]] = {}  # stage → split → scores
        self.trained = model.train_only(reading)
        self.announce()

    @classmethod
    def first(cls, hp: Any, data: TaskData) -> "Run":
        """tp of task 1, with a new model."""
        torch.manual_seed(hp.seed)
        positions = data.rows.shape[1] if hp.positional_embedding else 0
        model = NextItNet(len(data.items), hp.channels, hp.dilations, hp.kernel_size, positions)
        return cls(hp, Reading(1, "tp"), data, model, {}, "ranking")

    @classmethod
    def continued(cls, hp: Any, reading: Reading, data: TaskData, metric: str = "ranking") -> "Run":
        """Any later stage, from the checkpoint of the stage before; InputError if that is missing or does not fit."""
        before = checkpoint.stage_before(*reading)
        path, script = checkpoint.path_of(hp.checkpoint_dir, *before), checkpoint.script_of(*before)
        content = checkpoint.load(path, script)
        checkpoint.check_same_items(path, content, data, hp.index_path)
        if reading.stage == "ret":
            checkpoint.check_same_data(path, content["tasks"][reading.task], data, hp.test_fraction, script)
        model = checkpoint.build_model(content)
        if reading.stage == "tp":
            if not pruning.shares(model).get(pruning.FREE):
                raise InputError(f"{path} has no free weights left: raise --prune_ratio of earlier tasks")
            torch.manual_seed(hp.seed)
            model.add_head(reading.task, len(data.target_vocabulary))
        return cls(hp, reading, data, model, content["tasks"], metric)

    def announce(self) -> None:
        """Prints settings, data, parameter counts, device and versions."""
        print(f"task {self.reading.task}, stage {self.reading.stage}")
        for name, value in vars(self.hp).items():
            print(f"  {name:20} {printable(value)}")
        print("data:", "\n  ".join(self.data.describe()))
        total = sum(parameter.numel() for parameter in self.model.parameters())
        owners = [layer.owner for layer in pruning.owned_weights(self.model)]
        frozen = sum(int((~pruning.used_and_trained(owner, self.reading)[1]).sum()) for owner in owners)
        trained = sum(parameter.numel() for parameter in self.trained) - frozen
        print(f"parameters: {total:,}, of which this stage trains {trained:,}")
        threads = f" ({torch.get_num_threads()} threads)" if self.device.type == "cpu" else ""
        print(f"device: {self.device.type}{threads}")
        print("versions:", ", ".join(" ".join(version) for version in checkpoint.versions().items()))

    def train(self, loss: Loss) -> None:
        """Adam over `epochs`, evaluating every `eval_every` steps; keeps the state that is best on validation.

        Ctrl-C ends training as if it had converged.
        """
        optimiser = torch.optim.Adam(
            self.trained, lr=self.hp.learning_rate, betas=(self.hp.beta1, BETA2), eps=ADAM_EPS
        )
        examples = self.data.splits["train"]
        steps_per_epoch = -(-len(examples) // self.hp.batch_size)
        steps = self.hp.epochs * steps_per_epoch
        eval_every = self.hp.eval_every or steps_per_epoch
        best = Best(self)
        best.consider()
        with StopRequest() as stop, Progress(steps) as progress:
            for step, batch in enumerate(self.batches(examples), start=1):
                started = time.perf_counter()
                value = loss(self.model, self.reading, *self.data.batch(batch, self.device), self.generator)
                optimiser.zero_grad()
                value.backward()
                optimiser.step()
                self.seconds += time.perf_counter() - started
                self.epoch = round(step / steps_per_epoch, 4)
                progress.advance(value)
                if step % eval_every == 0 or step == steps or stop.requested:
                    best.consider()
                if stop.requested:
                    tqdm.write(f"stopped by Ctrl-C after epoch {self.epoch:g}: the best state so far is kept")
                    break
        best.restore()
        self.report(self.reading.stage, ("test",))

    def batches(self, examples: np.ndarray):
        """Every example once an epoch, in a new order each time."""
        for _ in range(self.hp.epochs):
            shuffled = examples[torch.randperm(len(examples), generator=self.generator).numpy()]
            for start in range(0, len(shuffled), self.hp.batch_size):
                yield shuffled[start : start + self.hp.batch_size]

    def prune(self) -> None:
        """Gives the task its share of the free weights and reports what that cost."""
        ratios = [self.tasks[task]["prune_ratio"] for task in sorted(self.tasks)] + [self.hp.prune_ratio]
        pruning.prune(self.model, self.reading.task, ratios)
        self.report("pruned", ("validation", "test"))
        for owner, share in sorted(pruning.shares(self.model).items(), key=lambda item: item[0] or pruning.MAX_TASKS):
            print(f"  {f'task {owner} owns' if owner else 'free'}: {share:.2%} of the conv weights")

    def evaluate(self, stage: str, split: str) -> dict[str, float]:
        """Scores and number of rows of a split, as the model stands at `stage`: tp, pruned or ret."""
        reading = self.reading if stage == "tp" else Reading(self.reading.task, "inference")
        return metrics.evaluate(self.model, self.data, split, reading, self.metric, self.hp.top_k, self.device)

    def report(self, stage: str, splits: tuple[str, ...]) -> None:
        """Scores all held-out parts of the data and keeps them for the checkpoint; prints `splits`."""
        self.results[stage] = {split: self.evaluate(stage, split) for split in ("validation", "test", "heldout")}
        for split in splits:
            self.write_result(stage, split, self.results[stage][split])

    def write_result(self, stage: str, split: str, scores: dict[str, float]) -> None:
        """Prints one RESULT line and appends it to results.csv."""
        row = {"task": self.reading.task, "stage": stage, "split": split, "epoch": self.epoch}
        row |= scores | {"seconds": round(self.seconds, 1)}
        tqdm.write(result_line(row))
        append_result(os.path.join(self.hp.checkpoint_dir, "results.csv"), row)

    def save(self) -> None:
        """Writes the stage's checkpoint and says what to run next."""
        task, stage = self.reading
        record = self.tasks.get(task, {})
        hyperparameters = {name: printable(value) for name, value in vars(self.hp).items()}
        self.tasks[task] = {
            "data_path": self.data.path,
            "data_digest": self.data.digest,
            "test_fraction": self.hp.test_fraction,
            "targets": self.data.target_vocabulary.to_tensor(),
            "target_count": len(self.data.target_vocabulary),
            "metric": self.metric,
            "top_k": self.hp.top_k,
            "prune_ratio": record.get("prune_ratio") or self.hp.prune_ratio,
            "state": "pruned" if stage == "tp" else "ret",
            "epoch": self.epoch,
            "seconds": self.seconds,
            "results": record.get("results", {}) | self.results,
            "hyperparameters": record.get("hyperparameters", {}) | {stage: hyperparameters},
        }
        path = checkpoint.path_of(self.hp.checkpoint_dir, task, stage)
        checkpoint.save(
            path,
            {
                "task": task,
                "stage": stage,
                "architecture": self.model.architecture,
                "model": {name: tensor.cpu() for name, tensor in self.model.state_dict().items()},
                "items": self.data.items.to_tensor(),
                "tasks": self.tasks,
            },
        )
        print(f"saved {path} ({os.path.getsize(path) / 1e6:.1f} MB)")
        print(f"next: python {self.next_command()}")

    def next_command(self) -> str:
        task, stage = self.reading
        script = checkpoint.script_of(task, "ret") if stage == "tp" else checkpoint.script_of(task + 1, "tp")
        shared = ("checkpoint_dir", "index_path")
        if not os.path.exists(os.path.join(os.path.dirname(os.path.abspath(__file__)), script)):
            script, shared = "evaluate.py", shared[:1]
        default = type(self.hp)()
        given = {name: getattr(self.hp, name) for name in shared if getattr(self.hp, name) != getattr(default, name)}
        return " ".join([script, *(f"--{name} {value}" for name, value in given.items())])


class Best:
    """The state of a run that scored best on validation; an equal later one does not replace it."""

    def __init__(self, run: Run):
        self.run = run
        self.score = -np.inf

    def consider(self) -> None:
        run = self.run
        scores = run.evaluate(run.reading.stage, "validation")
        run.write_result(run.reading.stage, "validation", scores)
        score = next(iter(scores.values()))
        if score > self.score:
            self.score, self.epoch = score, run.epoch
            self.weights = [parameter.detach().clone() for parameter in run.trained]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, weight in zip(self.run.trained, self.weights):
            parameter.copy_(weight)
        self.run.epoch = self.epoch


class StopRequest:
    """Notes the first Ctrl-C instead of raising it, so that a step is never cut in two; the second one raises."""

    def __enter__(self) -> "StopRequest":
        self.requested = False
        self.before = signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *_) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self.before)


def pick_device(name: str) -> str:
    """auto, cpu or cuda → cpu or cuda; InputError if there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no GPU; use --device auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
