"""The snapshot of a stage, from which an interrupted run resumes, with the result of an uninterrupted one, bit for bit.

A snapshot needs no state of a random number generator: all random numbers follow from the seed and the step.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from conure import checkpoint, processes
from conure.errors import InputError

import torch
from torch import nn


@dataclass
class TrainingState:
    """Everything that training changes, which is what a snapshot stores."""

    trained: list[nn.Parameter]
    optimiser: torch.optim.Optimizer
    rows: list[dict[str, Any]]  # the stage's rows of results.csv
    step: int = 0
    epoch: float = 0.0
    seconds: float = 0.0  # of training, without evaluation
    best_score: float = -math.inf  # on validation
    best_epoch: float = 0.0
    best_weights: list[torch.Tensor] = field(default_factory=list)
    mean_weights: list[torch.Tensor] = field(default_factory=list)  # over the last steps; empty until averaging starts
    averaged_steps: int = 0

    @torch.no_grad()
    def average(self) -> None:
        """Updates the mean with the current weights; a weight that never changes keeps its value (-0.0 becomes 0.0)."""
        weights = [parameter.detach() for parameter in self.trained]
        self.mean_weights = self.mean_weights or [weight.clone() for weight in weights]
        self.averaged_steps += 1
        torch._foreach_lerp_(self.mean_weights, weights, 1 / self.averaged_steps)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Swaps in the mean weights, if there are any, until the block ends."""
        present = [parameter.detach().clone() for parameter in self.trained] if self.mean_weights else []
        self.set_weights(self.mean_weights)
        try:
            yield
        finally:
            self.set_weights(present)

    @torch.no_grad()
    def set_weights(self, weights: list[torch.Tensor]) -> None:
        for parameter, weight in zip(self.trained, weights):
            parameter.copy_(weight)

    def keep_if_best(self, score: float) -> None:
        """Keeps a copy of the current weights if they score higher than all before."""
        if score > self.best_score:
            self.best_score, self.best_epoch = score, self.epoch
            self.best_weights = [parameter.detach().clone() for parameter in self.trained]

    def restore_best(self) -> None:
        self.set_weights(self.best_weights)
        self.epoch = self.best_epoch

    def state_dict(self) -> dict[str, Any]:
        weights = [parameter.detach() for parameter in self.trained]
        return {**vars(self), "trained": weights, "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.set_weights(state.pop("trained"))
        state["mean_weights"] = [
            weight.to(parameter.device) for parameter, weight in zip(self.trained, state["mean_weights"])
        ]
        self.optimiser.load_state_dict(state.pop("optimiser"))
        self.rows[:] = state.pop("rows")
        vars(self).update(state)


class Snapshot:
    """The snapshot beside a stage's checkpoint; only runs of the same identity share it."""

    def __init__(self, path: str, identity: dict[str, str], overwrite: bool):
        """`overwrite`: whether the run starts the stage over."""
        self.path, self.identity, self.overwrite = path, identity, overwrite

    def write(self, state: TrainingState, device: torch.device) -> None:
        if processes.is_main():
            content = {"identity": self.identity, "overwrite": self.overwrite, "device": device.type}
            checkpoint.save(self.path, content | {"state": state.state_dict()})

    def restore(self, content: dict[str, Any], state: TrainingState, device: torch.device) -> None:
        """Restores `state` and `identity` from what `read` returned; InputError if it is of another model."""
        found = [tuple(weight.shape) for weight in content["state"]["trained"]]
        if found != [tuple(parameter.shape) for parameter in state.trained]:  # another device chose another head
            raise InputError(f"{self.path} is of another model than this run trains: --overwrite starts the stage over")
        state.load_state_dict(content["state"])
        self.identity.update(content["identity"])  # what `auto` meant
        print(f"resuming from {self.path}: step {state.step}, epoch {state.epoch:g}")
        if content["device"] != device.type:
            print(
                f"it was made on {content['device']}; {device.type} draws and rounds differently: the "
                "result is as good, but not bit-identical to that of a run on one device"
            )

    def read(self) -> dict[str, Any] | None:
        """The content of the file; None if there is none, or if the stage starts over.

        InputError if the file is damaged, or was made with other settings or other data.
        """
        if not os.path.exists(self.path):
            return None
        try:
            remedy = "--overwrite starts the stage over"
            content, _ = checkpoint.load_file(self.path, remedy)
            checkpoint.refuse_other(self.path, content["identity"], self.identity, remedy)
        except InputError:
            if not self.overwrite:
                raise
            return None
        # A run with --overwrite resumes only from a snapshot that was written with --overwrite.
        return content if content["overwrite"] or not self.overwrite else None

    def remove(self) -> None:
        if processes.is_main() and os.path.exists(self.path):
            os.remove(self.path)
