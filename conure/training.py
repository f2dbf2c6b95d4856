"""The run of one stage: resume or start, train, keep the best weights, report, prune, save."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from conure import checkpoint, metrics, processes, ranking
from conure.device import can_compile, pick_device, pick_precision
from conure.errors import InputError
from conure.initial_model import initial_model
from conure.interrupt import StopRequest
from conure.losses import Loss, Objective
from conure.reporting import Progress, Results, announce, standing
from conure.snapshot import TrainingState
from conure.stage_files import StageFiles

import numpy as np
import torch
from torch import nn

import pruning
from data_loader import TaskData
from nextitnet import NextItNet
from pruning import Stage

CHECK_EVERY = 50  # steps between checks that losses are finite, for which a GPU must finish its queue
BETA2, ADAM_EPS = 0.999, 1e-8  # the original's, which are Adam's defaults


def adam(parameters: list, learning_rate: float, beta1: float) -> torch.optim.Adam:
    """Fused Adam, which does not copy the large tables; `parameters` may be groups with their own learning rates."""
    return torch.optim.Adam(parameters, lr=learning_rate, betas=(beta1, BETA2), eps=ADAM_EPS, fused=True)


def parameter_groups(
    trained: list[nn.Parameter], tables: set[nn.Parameter], table_learning_rate: float
) -> list[dict[str, Any]]:
    """The trained parameters as two groups for Adam: the rest, then those of the tables, with their own rate."""
    others = [parameter for parameter in trained if parameter not in tables]
    return [{"params": others}, {"params": [each for each in trained if each in tables], "lr": table_learning_rate}]


def count_trained(model: NextItNet, stage: Stage, trained: list[nn.Parameter]) -> int:
    """The number of weights that the stage trains; of a conv weight only what the owner map lets it train."""
    owners = [layer.owner for layer in pruning.owned_weights(model) if layer.weight.requires_grad]
    frozen = sum(int((~pruning.used_and_trained(owner, stage)[1]).sum()) for owner in owners)
    return sum(parameter.numel() for parameter in trained) - frozen


def shuffled_examples(data: TaskData, random: np.random.Generator, by_user: bool) -> np.ndarray:
    """The training examples in random order; with `by_user` each user's examples together, users in random order."""
    shuffled = random.permutation(data.splits["train"])
    if not by_user:
        return shuffled
    place = random.permutation(len(data.rows))[data.users[shuffled]]
    return shuffled[np.argsort(place, kind="stable")]


def seed_of(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


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
        """Resumes from a snapshot if there is one. `hp` is the script's hyperparameter block. Raises as `files`, which
        gets the first three arguments."""
        checkpoint.check_script(stage)
        print(f"task {stage.task}, {stage.mode}")
        self.hp, self.stage, self.data = hp, stage, data
        self.protocol = ranking.protocol_of(hp, metric, data)
        self.device = pick_device(hp.device)
        self.files = files(hp, stage, data)
        with self.files.closed_on_failure():
            torch.manual_seed(hp.seed)  # of initial weights
            snapshot = self.files.snapshot.read()
            self.model, informed = initial_model(self.files, self.device, metric == "accuracy", snapshot is not None)
            trained = self.model.train_only(stage)
            groups = parameter_groups(trained, self.model.tables(stage.task), hp.table_rate * hp.learning_rate)
            optimiser = adam(groups, hp.learning_rate, hp.beta1)
            # For the checkpoint. Trained weights are counted now, as pruning will give them an owner.
            count = count_trained(self.model, stage, trained)
            self.facts = {"protocol": asdict(self.protocol), "trained": count, "informed": informed}
            self.scores: dict[str, dict[str, dict[str, float]]] = {}  # state → split → scores, for the checkpoint
            self.results = Results(os.path.join(hp.checkpoint_dir, "results.csv"), stage)
            self.state = TrainingState(trained, optimiser, self.results.own)
            self.stop = StopRequest()
            if snapshot is not None:
                self.files.snapshot.restore(snapshot, self.state, self.device)
            identity = self.files.identity
            identity["precision"] = pick_precision(identity["precision"], self.device)  # a resumed run has one
            announce(hp, data, self.model, count, self.device, identity["precision"], self.protocol)
            processes.wait()  # until all have read the snapshot, which the first process may now remove or replace
            if snapshot is None:
                self.files.snapshot.remove()

    def train(self, loss: Loss, to_the_end: bool = False) -> None:
        """Trains with Adam for `epochs`, evaluates every `eval_every` steps, and keeps the weights best on validation.

        Ctrl-C ends training as if it had converged; with `to_the_end` it leaves the stage unfinished. InputError if the
        loss is not finite.
        """
        # Several processes would have to agree on the step at which to stop.
        if processes.own_shard().count == 1 and not to_the_end:
            self.stop.listen()
        with self.files.closed_on_failure():
            self.take_steps(loss)
            self.state.restore_best()
            self.report(self.stage.mode, ("test",))

    def take_steps(self, loss: Loss) -> None:
        """Takes all remaining steps, with evaluations and snapshots in between."""
        state, generator = self.state, torch.Generator(self.device)
        steps_per_epoch = -(-len(self.data.splits["train"]) // self.hp.batch_size)
        steps = self.hp.epochs * steps_per_epoch
        eval_every = self.hp.eval_every or steps_per_epoch
        objective = self.objective(loss, generator)
        if state.step == 0:
            self.validate()
        saved, losses = time.monotonic(), []  # losses since the last check
        with Progress(steps, state.step) as progress:
            for batch in self.batches(steps_per_epoch):
                started = time.perf_counter()
                self.set_seeds(generator)
                if self.hp.decay:
                    self.scale_learning_rates(1 - state.step / steps)
                losses.append(self.take_step(objective, batch))
                if state.step > (1 - self.hp.average_last) * steps:
                    state.average()
                state.epoch = round(state.step / steps_per_epoch, 4)
                progress.advance(losses[-1])
                stopping = self.stop.requested  # read once, as a signal may set it at any moment
                evaluating = state.step % eval_every == 0 or state.step == steps or stopping
                snapshot = evaluating or 0 < self.hp.snapshot_minutes <= (time.monotonic() - saved) / 60
                if snapshot or len(losses) == CHECK_EVERY:
                    self.check(losses)
                    losses.clear()
                state.seconds += time.perf_counter() - started
                if evaluating:
                    self.validate()
                if snapshot:
                    self.files.snapshot.write(state, self.device)
                    saved = time.monotonic()
                if stopping:
                    self.stop.announce(state.epoch)
                    break

    def objective(self, loss: Loss, generator: torch.Generator) -> Objective:
        """A function from a batch to this process's share of its loss."""
        if self.hp.compile and can_compile(self.device):
            self.model.compiled = torch.compile(self.model.states)
        precision = getattr(torch, self.files.identity["precision"])
        return Objective(loss, self.model, self.stage, generator, precision)

    def batches(self, steps_per_epoch: int) -> Iterator[np.ndarray]:
        """Yields batches of examples from the current step on; an epoch's order is a function of seed and epoch."""
        size, (epoch, position) = self.hp.batch_size, divmod(self.state.step, steps_per_epoch)
        by_user = getattr(self.hp, "group_by_user", False)  # not in task 1, whose rows are its examples
        for number in range(epoch, self.hp.epochs):
            random = np.random.default_rng((self.hp.seed, number))
            shuffled = shuffled_examples(self.data, random, by_user)
            for start in range(position * size, len(shuffled), size):
                yield shuffled[start : start + size]
            position = 0

    def set_seeds(self, generator: torch.Generator) -> None:
        """Seeds the step's negatives, alike in all processes, and its dropout masks, different in each.

        Both are functions of seed and step, so that a resumed run draws what an uninterrupted one draws.
        """
        generator.manual_seed(seed_of(self.hp.seed, self.state.step))
        torch.manual_seed(seed_of(self.hp.seed, self.state.step, 1 + processes.own_shard().number))

    def scale_learning_rates(self, factor: float) -> None:
        """Sets every learning rate to `factor` times its configured value."""
        rates = (self.hp.learning_rate, self.hp.table_rate * self.hp.learning_rate)
        for group, rate in zip(self.state.optimiser.param_groups, rates):
            group["lr"] = factor * rate

    def take_step(self, objective: Objective, batch: np.ndarray) -> torch.Tensor:
        """Takes one step of Adam and returns the loss of the whole batch, which a GPU may still be computing."""
        self.model.train()
        value = objective(self.data.batch(batch))
        self.state.optimiser.zero_grad()
        value.backward()
        processes.sum_gradients(self.state.trained)
        self.state.optimiser.step()
        self.state.step += 1
        return processes.total(value.detach())

    def check(self, losses: list[torch.Tensor]) -> None:
        """InputError if one of the losses, those of the last steps, is not finite."""
        finite = torch.stack(losses).isfinite().tolist()
        if not all(finite):
            first = finite.index(False)
            kept = [path for path in (self.files.snapshot.path, self.files.path) if os.path.exists(path)]
            overwrite = f" and --overwrite ({' and '.join(kept)} kept as before)" if kept else ""
            raise InputError(
                f"the loss is {losses[first].item()} at step {self.state.step - len(losses) + first + 1} in "
                f"{self.stage.mode} of task {self.stage.task}: start over with a lower --learning_rate{overwrite}"
            )

    def validate(self) -> None:
        """Evaluates on validation and keeps the weights if they score better than all before."""
        mode, examples = self.stage.mode, self.data.splits["validation"]
        stage = checkpoint.stage_of_state(self.stage.task, mode)
        with self.state.averaged():
            ranks = ranking.rank(self.model, self.data, examples, stage, self.device, self.protocol)
            scores = metrics.score(ranks, self.protocol)
            if mode == "ret" or self.state.step > 0:  # an untrained head, even informed, is no result of tp
                self.state.keep_if_best(next(iter(scores.values())))
        self.results.add(mode, "validation", self.state.epoch, scores, self.state.seconds)

    def prune(self) -> None:
        """Prunes: gives the task its share of the free weights, and reports the scores after it."""
        with self.files.closed_on_failure():
            pruning.prune(self.model, self.stage.task, self.files.prune_ratios())
            self.report("pruned", ("validation", "test"))
        for owner, share in sorted(pruning.shares(self.model).items(), key=lambda item: item[0] or pruning.MAX_TASKS):
            print(f"  {f'task {owner} owns' if owner else 'free'}: {share:.2%} of the conv weights")

    def report(self, state: str, splits: tuple[str, ...]) -> None:
        """Scores all held-out splits for the checkpoint, and prints those in `splits` and how the test score stands."""
        stage = checkpoint.stage_of_state(self.stage.task, state)
        ranks = ranking.rank_held_out(self.model, self.data, stage, self.device, self.protocol)
        scores = {split: metrics.score(each, self.protocol) for split, each in ranks.items()}
        self.scores[state], self.facts["ranks"] = scores, ranks["test"].to_tensors()
        for split in splits:
            self.results.add(state, split, self.state.epoch, scores[split], self.state.seconds)
        if "popular" not in self.facts:
            popular = ranking.rank_by_popularity(self.data, self.data.splits["test"], self.protocol)
            _, self.facts["popular"] = metrics.first_score(popular, self.protocol)
        print(f"test, {state}: {standing(ranks['test'], self.protocol, self.facts['popular'])}")

    def save(self) -> None:
        """Writes the stage's checkpoint, prints what to run next, and unlocks the folder."""
        with self.files.closed_on_failure():
            facts = self.facts | {"epoch": self.state.epoch, "seconds": self.state.seconds}
            if processes.is_main():
                self.files.write(self.model, facts, self.scores)
        self.files.close()
        self.stop.end()
