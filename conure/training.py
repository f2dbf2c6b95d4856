"""The run of one stage: train, keep the best, report, prune, save, and go on from where a killed run was."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from conure import checkpoint, heads, metrics, processes
from conure.errors import InputError
from conure.losses import Loss
from conure.reporting import Progress, Results
from conure.settings import printable
from conure.stage_files import StageFiles

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import pruning
from data_loader import TaskData
from nextitnet import NextItNet
from pruning import Stage

CHECK_EVERY = 50  # steps between looks at the losses, for which a GPU has to finish what it was given
BETA2, ADAM_EPS = 0.999, 1e-8  # the original's, which are Adam's defaults


# Of the matrix products; weights, sums and losses stay float32.
PRECISIONS = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def adam(parameters: list, learning_rate: float, beta1: float) -> torch.optim.Adam:
    """Fused, which makes no copies of the large tables; `parameters` may be groups with learning rates of their own."""
    return torch.optim.Adam(parameters, lr=learning_rate, betas=(beta1, BETA2), eps=ADAM_EPS, fused=True)


def parameter_groups(model: NextItNet, task: int, table_learning_rate: float) -> list[dict[str, Any]]:
    """What the model lets train, as two groups for Adam: the rest, and its tables with a learning rate of their own."""
    tables = model.tables(task)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    others = [parameter for parameter in trained if parameter not in tables]
    return [{"params": others}, {"params": [each for each in trained if each in tables], "lr": table_learning_rate}]


def make_deterministic(device: torch.device) -> None:
    """On the CPU the same bits each time, which a resumed run promises."""
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


@dataclass
class Best:
    """The state that scored best on validation, of equal ones the first."""

    score: float = -math.inf
    epoch: float = 0.0
    weights: list[torch.Tensor] = field(default_factory=list)


class Run:
    """The training of one stage, from data to checkpoint."""

    def __init__(
        self,
        hp: Any,
        stage: Stage,
        data: TaskData,
        metric: str = "ranking",
        files: Callable[..., StageFiles] = StageFiles,
    ):
        """`hp` is the script's hyperparameter block; goes on from a snapshot if there is one. Raises as `files`
        does, which is given the first three."""
        print(f"task {stage.task}, {stage.mode}")
        self.hp, self.stage, self.data, self.metric = hp, stage, data, metric
        self.device = pick_device(hp.device)
        self.files = files(hp, stage, data)
        make_deterministic(self.device)
        torch.manual_seed(hp.seed)
        self.model = self.files.start_model().to(self.device)
        self.informed = self.start_head()
        self.model.dropout.p = hp.dropout
        self.trained = self.model.train_only(stage)
        self.trained_count = self.count_trained()  # now, as pruning will give some of it an owner
        on_gpu = self.device.type == "cuda"
        self.precision = PRECISIONS[hp.precision] or (torch.bfloat16 if on_gpu else torch.float32)
        groups = parameter_groups(self.model, stage.task, hp.table_rate * hp.learning_rate)
        self.optimiser = adam(groups, hp.learning_rate, hp.beta1)
        self.rates = [group["lr"] for group in self.optimiser.param_groups]  # before any decay
        self.generator = torch.Generator().manual_seed(hp.seed)
        self.step, self.epoch, self.seconds = 0, 0.0, 0.0  # trained so far; evaluation is not counted
        self.seed_dropout()
        self.losses: list[torch.Tensor] = []  # of the steps since they were last checked
        self.best = Best()
        self.stop = StopRequest()
        self.scores: dict[str, dict[str, dict[str, float]]] = {}  # state → split → scores, for the checkpoint
        self.results = Results(os.path.join(hp.checkpoint_dir, "results.csv"), stage)
        self.announce()
        if state := self.files.read_snapshot():
            self.resume(state)
        processes.wait()  # until all have read what the first one is about to remove or to write over
        if not state:
            self.files.remove_snapshot()

    def start_head(self) -> bool:
        """Informs the head of a new task, if that is asked for; whether it is one that started as task 1's."""
        task, mode = self.stage
        if mode == "ret":
            informed = self.files.tasks[task]["informed"]
        else:
            informed = task > 1 and self.hp.informed_head
            informed = informed and heads.inform(self.model, self.data, self.stage, self.device)
        if informed:
            heads.anchor(self.model, self.data, task)
        return informed

    def seed_dropout(self) -> None:
        """Lets every process but the first, which goes on with the seed's numbers, draw other ones."""
        if not processes.is_main():
            torch.manual_seed(self.hp.seed + processes.own_share().number + self.step)

    def announce(self) -> None:
        """Prints settings, data, parameter counts, device and versions."""
        for name, value in vars(self.hp).items():
            print(f"  {name:20} {printable(value)}")
        print("data:", "\n  ".join(self.data.describe()))
        total = sum(parameter.numel() for parameter in self.model.parameters())
        print(f"parameters: {total:,}, of which this stage trains {self.trained_count:,}")
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        count = processes.own_share().count
        several = f"; {count} processes" if count > 1 else ""
        print(f"device: {self.device.type}{threads}; {str(self.precision).removeprefix('torch.')}{several}")
        print("versions:", ", ".join(" ".join(version) for version in checkpoint.versions().items()))

    def count_trained(self) -> int:
        """How many numbers the stage trains: of the conv weights only those that get a gradient."""
        owners = [layer.owner for layer in pruning.owned_weights(self.model)]
        frozen = sum(int((~pruning.used_and_trained(owner, self.stage)[1]).sum()) for owner in owners)
        return sum(parameter.numel() for parameter in self.trained) - frozen

    def train(self, loss: Loss, to_the_end: bool = False) -> None:
        """Adam over `epochs`, evaluating every `eval_every` steps; keeps the state that is best on validation.

        Ctrl-C ends training as if it had converged, or with `to_the_end` leaves it unfinished. InputError if the loss
        is not finite.
        """
        steps_per_epoch = -(-len(self.data.splits["train"]) // self.hp.batch_size)
        steps = self.hp.epochs * steps_per_epoch
        eval_every = self.hp.eval_every or steps_per_epoch
        objective = self.objective(loss)
        # Several processes could not agree on the step at which to stop.
        if processes.own_share().count == 1 and not to_the_end:
            self.stop.listen()
        if self.step == 0:
            self.consider()
        saved = time.monotonic()
        with Progress(steps, self.step) as progress:
            for batch in self.batches(steps_per_epoch):
                started = time.perf_counter()
                if self.hp.decay:
                    self.set_rates(1 - self.step / steps)
                self.take_step(objective, batch)
                self.epoch = round(self.step / steps_per_epoch, 4)
                progress.advance(self.losses[-1])
                stopping = self.stop.requested  # looked at once, as it may come true at any moment
                evaluating = self.step % eval_every == 0 or self.step == steps or stopping
                snapshot = evaluating or 0 < self.hp.snapshot_minutes <= (time.monotonic() - saved) / 60
                if snapshot or len(self.losses) == CHECK_EVERY:
                    self.check_losses()
                self.seconds += time.perf_counter() - started
                if evaluating:
                    self.consider()
                if snapshot:
                    self.snapshot()
                    saved = time.monotonic()
                if stopping:
                    self.stop.announce(self.epoch)
                    break
        self.restore_best()
        self.report(self.stage.mode, ("test",))

    def objective(self, loss: Loss) -> nn.Module:
        """What gives a batch's loss, and the gradients that all processes share."""
        if self.hp.compile and can_compile(self.device):
            self.model.states = torch.compile(self.model.states)
        objective = Objective(loss, self.model, self.stage, self.generator, self.precision)
        if processes.own_share().count > 1:
            objective = DistributedDataParallel(objective, forward_sync_buffers=False, gradient_as_bucket_view=True)
        return objective

    def set_rates(self, share: float) -> None:
        """Learning rates of so large a share of what they are in full."""
        for group, rate in zip(self.optimiser.param_groups, self.rates):
            group["lr"] = share * rate

    def take_step(self, objective: nn.Module, batch: np.ndarray) -> None:
        """One step of Adam; adds the whole batch's loss, which a GPU may still be computing, to `losses`."""
        objective.train()
        value = objective(*self.data.batch(batch))
        self.optimiser.zero_grad()
        (value * processes.own_share().count).backward()  # as the processes' gradients are averaged
        self.optimiser.step()
        self.losses.append(processes.total(value.detach()))
        self.step += 1

    def check_losses(self) -> None:
        """InputError if any loss since the last check is not finite."""
        losses = torch.stack(self.losses).cpu()
        if not losses.isfinite().all():
            first = int((~losses.isfinite()).nonzero()[0])
            raise InputError(self.files.diverged(losses[first].item(), self.step - len(losses) + first + 1))
        self.losses.clear()

    def batches(self, steps_per_epoch: int) -> Iterator[np.ndarray]:
        """Every training example once an epoch, in a new order each time, from the run's present step on."""
        examples, size = self.data.splits["train"], self.hp.batch_size
        for _ in range(self.step // steps_per_epoch, self.hp.epochs):
            position = self.step % steps_per_epoch
            now = self.generator.get_state()
            if position:  # resumed within an epoch, whose order is drawn again
                self.generator.set_state(self.epoch_start)
            self.epoch_start = self.generator.get_state()
            shuffled = examples[torch.randperm(len(examples), generator=self.generator).numpy()]
            if position:
                self.generator.set_state(now)
            for start in range(position * size, len(shuffled), size):
                yield shuffled[start : start + size]

    @torch.no_grad()
    def consider(self) -> None:
        """Evaluates on validation and remembers the state if none before scored as well."""
        state, examples = self.stage.mode, self.data.splits["validation"]
        stage = checkpoint.stage_of_state(self.stage.task, state)
        ranks = metrics.rank_examples(self.model, self.data, examples, stage, self.device)
        scores = metrics.score(ranks, self.metric, self.hp.top_k)
        self.results.add(state, "validation", self.epoch, scores, self.seconds)
        score = next(iter(scores.values()))
        untrained = state == "tp" and self.step == 0  # which is no result of tp, even where its head is informed
        if score > self.best.score and not untrained:
            self.best = Best(score, self.epoch, [parameter.clone() for parameter in self.trained])

    @torch.no_grad()
    def restore_best(self) -> None:
        for parameter, weight in zip(self.trained, self.best.weights):
            parameter.copy_(weight)
        self.epoch = self.best.epoch

    def snapshot(self) -> None:
        """Writes all that the run consists of at this step, for `resume`."""
        if not processes.is_main():
            return
        state = {
            "trained": [parameter.detach() for parameter in self.trained],
            "best": vars(self.best),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "generator": self.generator.get_state(),
            "dropout": (torch.cuda if self.device.type == "cuda" else torch).get_rng_state(),
            "epoch_start": self.epoch_start,
            "results": self.results.own,
        }
        self.files.write_snapshot(state)

    @torch.no_grad()
    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from where `snapshot` was written."""
        for parameter, value in zip(self.trained, state["trained"]):
            parameter.copy_(value)
        self.best = Best(**state["best"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.epoch, self.seconds = state["step"], state["epoch"], state["seconds"]
        self.generator.set_state(state["generator"])
        (torch.cuda if self.device.type == "cuda" else torch).set_rng_state(state["dropout"])
        self.seed_dropout()
        self.epoch_start = state["epoch_start"]
        self.results.own = state["results"]
        print(f"going on from {self.files.snapshot_path}: step {self.step}, epoch {self.epoch:g}")

    def prune(self) -> None:
        """Gives the task its share of the free weights and reports what that cost."""
        pruning.prune(self.model, self.stage.task, self.files.prune_ratios())
        self.report("pruned", ("validation", "test"))
        for owner, share in sorted(pruning.shares(self.model).items(), key=lambda item: item[0] or pruning.MAX_TASKS):
            print(f"  {f'task {owner} owns' if owner else 'free'}: {share:.2%} of the conv weights")

    def report(self, state: str, splits: tuple[str, ...]) -> None:
        """Scores all held-out parts of the data and keeps them for the checkpoint; prints `splits`."""
        stage = checkpoint.stage_of_state(self.stage.task, state)
        scores = metrics.evaluate(self.model, self.data, stage, self.metric, self.hp.top_k, self.device)
        self.scores[state] = scores
        for split in splits:
            self.results.add(state, split, self.epoch, scores[split], self.seconds)

    def save(self) -> None:
        """Writes the stage's checkpoint and says what to run next."""
        facts = {"metric": self.metric, "top_k": self.hp.top_k, "epoch": self.epoch, "seconds": self.seconds}
        facts |= {"trained": self.trained_count, "informed": self.informed}
        if processes.is_main():
            self.files.write_checkpoint(self.model, facts, self.scores)
        self.stop.end()


class Objective(nn.Module):
    """A process's share of the loss of a batch, as the module that DistributedDataParallel wants."""

    def __init__(self, loss: Loss, model: nn.Module, stage: Stage, generator: torch.Generator, precision: torch.dtype):
        super().__init__()
        self.loss, self.model, self.stage, self.generator = loss, model, stage, generator
        self.precision = precision

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`inputs` (B, T) and `targets` (B,) of the whole batch, on the CPU."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            return self.loss(self.model, self.stage, inputs, targets, self.generator, processes.own_share())


class StopRequest:
    """Notes the first Ctrl-C instead of raising it, so that neither a step nor what follows is cut in two; the second
    one raises as usual."""

    requested = False
    before = None  # what Ctrl-C did before

    def listen(self) -> None:
        self.before = signal.signal(signal.SIGINT, self.note)

    def note(self, *_) -> None:
        self.requested = True
        self.end()

    def announce(self, epoch: float) -> None:
        tqdm.write(
            f"stopped by Ctrl-C after epoch {epoch:g}: the best state so far is kept as the stage's result (a second "
            "Ctrl-C leaves the stage unfinished, to go on another time)"
        )

    def end(self) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, shown by a trial; says why if not."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except RuntimeError as error:
        print(f"goes on without torch.compile, which does not work here: {str(error).splitlines()[0]}")
        return False
    return True


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda → the device; InputError if there is no such one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no GPU; use --device auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
