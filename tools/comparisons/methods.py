"""The training steps of each method that has a model."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from nextitnet import NextItNet
from pruning import Stage
from tools.comparisons.networks import Adapted, AllHeads, FrozenHead, HeadOnly, Joint, Unprotected
from tools.comparisons.sasrec import SASRec

TASKS = (1, 2, 3, 4)
LATER = TASKS[1:]


@dataclass(frozen=True)
class Step:
    """Training of one task by one method, from checkpoint to checkpoint."""

    method: str
    task: int  # whose data it trains on
    mode: str = "tp"
    start: "Step | None" = None  # whose checkpoint it starts from; None: random initial weights
    network: type[NextItNet] = NextItNet
    number: int = 0  # of the task in the model; 0: that of the data
    beside: str = ""  # what else is in the loss: "task 1" (joint training), "replay" or "distillation"
    head: str = ""  # initial head: "random", else the scripts' (`informed_head`)

    @property
    def stage(self) -> Stage:
        return Stage(self.number or self.task, self.mode)

    @property
    def prunes(self) -> bool:
        return self.network in (NextItNet, FrozenHead)

    def variants(self) -> list["Step"]:
        """The step with either initial head, of which the better counts. Conure and its ablations have one variant."""
        if self.prunes or self.start is None:
            return [self]
        return [replace(self, head=head) for head in ("informed", "random")]


def chain(
    method: str, stages: Iterable[tuple[int, str]], before: Iterable[Step] = (), **fields: str | int | type[NextItNet]
) -> list[Step]:
    """The steps `before`, then a step for each (task, mode), each from the checkpoint of its predecessor."""
    steps = [*before]
    for task, mode in stages:
        steps.append(Step(method, task, mode, steps[-1] if steps else None, **fields))
    return steps


def one_model(method: str, network: type[NextItNet], beside: str = "") -> list[Step]:
    """One model trained task after task, starting from the SinMo of task 1."""
    return chain(method, [(task, "tp") for task in LATER], SINMO[:1], network=network, beside=beside)


def from_task_1(method: str, network: type[NextItNet], first: Step | None = None) -> list[Step]:
    """Each later task starts from the model of task 1: SinMo's, or that of `first`."""
    first = first or SINMO[0]
    return [first, *(Step(method, task, "tp", first, network) for task in LATER)]


LATER_STAGES = [(task, mode) for task in LATER for mode in ("tp", "ret")]
CONURE = chain("Conure", [(1, "tp"), (1, "ret"), *LATER_STAGES])
SINMO = [Step("SinMo", task, network=Unprotected) for task in TASKS]
METHODS = {
    "SinMo": SINMO,
    "MTL": [SINMO[0], *(Step("MTL", task, network=Joint, beside="task 1") for task in LATER)],
    "FineAll": from_task_1("FineAll", Unprotected),
    "SASRec": from_task_1("SASRec", SASRec, Step("SASRec", 1, network=SASRec)),
    "zero_shot": CONURE[:2],
    "random_backbone": from_task_1("random_backbone", HeadOnly, Step("random_backbone", 1, network=HeadOnly)),
    "FineHead": from_task_1("FineHead", HeadOnly),
    "PeterRec": from_task_1("PeterRec", Adapted),
    "SinMoAll": one_model("SinMoAll", Unprotected),
    "LwF": one_model("LwF", AllHeads, "distillation"),
    "replay": one_model("replay", AllHeads, "replay"),
    "no_retraining": chain("no_retraining", [(task, "tp") for task in LATER], CONURE[:1]),
    "no_task_2": chain("no_task_2", [(3, "tp"), (3, "ret")], CONURE[:2], number=2),
    "random_head": chain("random_head", LATER_STAGES, CONURE[:2], head="random"),
    "frozen_head": chain("frozen_head", LATER_STAGES, CONURE[:2], network=FrozenHead),
    "frozen_embedding": chain("frozen_embedding", LATER_STAGES, CONURE[:2]),
    "no_readout": chain("no_readout", LATER_STAGES, CONURE[:2]),
    "Conure": CONURE,
}
# Methods whose last model serves all tasks; the others keep a model, or a part of one, for each task.
CHAINS = (
    "SinMoAll",
    "LwF",
    "replay",
    "no_retraining",
    "no_task_2",
    "random_head",
    "frozen_head",
    "frozen_embedding",
    "no_readout",
    "Conure",
)
FORGETTING = ("SinMoAll", "LwF", "replay", "Conure")  # methods in the forgetting table
