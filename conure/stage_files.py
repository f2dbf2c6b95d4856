"""A stage's place in the chain: what it starts from, whether it is finished, what it leaves behind."""

import os
import shlex
from pathlib import Path
from typing import Any

from conure import checkpoint, processes
from conure.errors import InputError, NothingToDo
from conure.files import lock_folder
from conure.settings import printable

import torch

import pruning
from data_loader import TaskData
from nextitnet import NextItNet
from pruning import Stage

# What may differ between a run and the one that goes on from its snapshot: of files, digests tell whether they are
# the same, and the others do not touch the result.
NOT_IDENTITY = {"data_path", "index_path", "checkpoint_dir", "snapshot_minutes", "overwrite"}


class StageFiles:
    """The files of one stage in a checkpoint folder, which stays locked until the process ends."""

    network = NextItNet  # the class of the model

    def __init__(self, hp: Any, stage: Stage, data: TaskData):
        """Raises InputError if the stage before is missing or does not fit, NothingToDo if this one is finished."""
        self.hp, self.stage, self.data = hp, stage, data
        self.lock = lock_folder(hp.checkpoint_dir) if processes.is_main() else None
        self.path = checkpoint.path_of(hp.checkpoint_dir, stage)
        self.snapshot_path = checkpoint.snapshot_of(self.path)
        self.before: dict[str, Any] | None = None  # the checkpoint that the stage starts from
        self.tasks, self.lineage, made_from = {}, {}, ""
        if path := self.predecessor():
            self.before, made_from = checkpoint.load(path)
            self.check_fit(path)
            self.tasks = self.before["tasks"]
            self.lineage = self.before["lineage"] | {os.path.basename(path): made_from}
        self.identity = {name: printable(value) for name, value in vars(hp).items() if name not in NOT_IDENTITY}
        self.identity |= {"data": data.digest, "vocabulary": data.items.digest, "checkpoint before": made_from}
        if os.path.exists(self.path):
            self.print_what_goes_back_here() if hp.overwrite else self.refuse_if_finished()

    def predecessor(self) -> str | None:
        """The path of the checkpoint that the stage starts from; None if it starts from nothing."""
        if self.stage == Stage(1, "tp"):
            return None
        return checkpoint.path_of(self.hp.checkpoint_dir, checkpoint.stage_before(self.stage))

    def check_fit(self, path: str) -> None:
        """InputError if the checkpoint before, at `path`, has other item ids, or, for ret, other examples."""
        script = checkpoint.script_of(checkpoint.stage_before(self.stage))
        if not torch.equal(self.before["items"], self.data.items.to_tensor()):
            raise InputError(
                f"{path} was made with another vocabulary than {self.hp.index_path}: give the right --index_path, or "
                f"run `python {checkpoint.script_of(Stage(1, 'tp'))} --overwrite`"
            )
        if self.stage.mode == "ret":
            learned = self.before["tasks"][self.stage.task]
            if (learned["data_digest"], learned["test_fraction"]) != (self.data.digest, self.hp.test_fraction):
                raise InputError(
                    f"{path} was made with other data ({learned['data_path']}, test_fraction "
                    f"{learned['test_fraction']:g}) than {self.data.path}: give the data and test_fraction that it "
                    f"had, or run `python {script} --overwrite`"
                )

    def print_what_goes_back_here(self) -> None:
        """The checkpoints after this stage, which can only be made again once it has been done over."""
        names = checkpoint.in_folder(self.hp.checkpoint_dir)
        if later := names[names.index(os.path.basename(self.path)) + 1 :]:
            print(f"{self.path} is done over, and what goes back to it has to be afterwards: {', '.join(later)}")

    def refuse_if_finished(self) -> None:
        content, _ = checkpoint.load(self.path)
        again = f"the stage is finished: go on with `python {self.next_command()}`, or do it over with --overwrite"
        self.refuse_other(self.path, content["identity"], again)
        self.remove_snapshot()  # which a kill just before the end may have left
        if self.before is None:
            self.data.items.write(self.hp.index_path, self.hp.overwrite)  # in case it was lost or damaged
        raise NothingToDo(f"{self.path} is finished; --overwrite does it over\nnext: python {self.next_command()}")

    def refuse_other(self, path: str, identity: dict[str, str], remedy: str) -> None:
        """InputError, naming the fields, if the file at `path` was made otherwise than this run would make it."""
        differing = [name for name in self.identity if identity.get(name) != self.identity[name]]
        if differing:
            digests = ("data", "vocabulary", "checkpoint before")
            shown = (
                f"other {n}" if n in digests else f"{n} {identity.get(n)} (now {self.identity[n]})" for n in differing
            )
            raise InputError(f"{path} was made with {', '.join(shown)}: {remedy}")

    def start_model(self) -> NextItNet:
        """The model as the stage before left it, with a new head in tp; a new one for the first stage.

        InputError if no weight is left to train.
        """
        task, mode = self.stage
        if self.before is None:
            positions = self.data.rows.shape[1] if self.hp.positional_embedding else 0
            items = len(self.data.items)
            model = self.network(items, self.hp.channels, self.hp.dilations, self.hp.kernel_size, positions)
        else:
            model = checkpoint.build_model(self.before, self.network)
        if mode == "tp" and task > 1:
            self.check_capacity(model)
            model.add_head(task, len(self.data.target_vocabulary))
        return model

    def prune_ratios(self) -> list[float]:
        """Those of all tasks before this one, and its own."""
        earlier = [record["prune_ratio"] for task, record in sorted(self.tasks.items()) if task < self.stage.task]
        return earlier + [self.hp.prune_ratio]

    def check_capacity(self, model: NextItNet) -> None:
        """Prints how many weights are free for the task, and how many it will keep; InputError if a layer has none."""
        task, ratios = self.stage.task, self.prune_ratios()
        free, kept = zip(*(pruning.budget(layer, ratios) for layer in pruning.owned_weights(model)))
        total = sum(layer.owner.numel() for layer in pruning.owned_weights(model))
        if not all(free):
            raise InputError(
                f"no free weights are left for task {task}: {free.count(0)} of {len(free)} conv layers belong to tasks "
                f"1 to {task - 1} entirely, and of {total:,} weights {sum(free):,} are free; begin again at task 1 "
                f"with --prune_ratio {1 - 1 / task:.2f} or higher, which leaves room for {task} tasks, or more channels"
            )
        share = sum(free) / total
        print(f"capacity: {sum(free):,} of {total:,} conv weights are free ({share:.2%}); it will keep {sum(kept):,}")

    def write_snapshot(self, state: dict[str, Any]) -> None:
        checkpoint.save(self.snapshot_path, {"identity": self.identity, "overwrite": self.hp.overwrite, "state": state})

    def read_snapshot(self) -> dict[str, Any] | None:
        """The state to go on from; None if there is none, or if it is to be started over.

        InputError if the snapshot is damaged or was made otherwise than this run would make it.
        """
        if not os.path.exists(self.snapshot_path):
            return None
        try:
            remedy = "--overwrite starts the stage over"
            content, _ = checkpoint.load_file(self.snapshot_path, remedy)
            self.refuse_other(self.snapshot_path, content["identity"], remedy)
        except InputError:
            if not self.hp.overwrite:
                raise
            content = {"overwrite": False}
        started_over = self.hp.overwrite and not content["overwrite"]  # such a run goes on only from its own kind
        return None if started_over else content["state"]

    def remove_snapshot(self) -> None:
        if processes.is_main() and os.path.exists(self.snapshot_path):
            os.remove(self.snapshot_path)

    def write_checkpoint(self, model: NextItNet, facts: dict[str, Any], scores: dict[str, dict]) -> None:
        """`facts` of the task and `scores` by state and split go into the task's record. Says what to run next."""
        task, mode = self.stage
        record = self.tasks.get(task, {})
        self.tasks[task] = facts | {
            "data_path": self.data.path,
            "data_digest": self.data.digest,
            "test_fraction": self.hp.test_fraction,
            "length": self.data.rows.shape[1] + (1 if task == 1 else -1),
            "targets": self.data.target_vocabulary.to_tensor(),
            "target_count": len(self.data.target_vocabulary),
            "prune_ratio": record.get("prune_ratio") or self.hp.prune_ratio,
            "state": list(scores)[-1],
            "results": record.get("results", {}) | scores,
            "hyperparameters": record.get("hyperparameters", {})
            | {mode: {name: printable(value) for name, value in vars(self.hp).items()}},
        }
        content = {
            "task": task,
            "mode": mode,
            "identity": self.identity,
            "lineage": self.lineage,
            "architecture": model.architecture,
            "model": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
            "items": self.data.items.to_tensor(),
            "tasks": self.tasks,
        }
        checkpoint.save(self.path, content)
        self.remove_snapshot()
        print(f"saved {self.path} ({os.path.getsize(self.path) / 1e6:.1f} MB)")
        print(f"next: python {self.next_command()}")

    def diverged(self, loss: float, step: int) -> str:
        """What to say when the loss is not finite."""
        kept = [path for path in (self.snapshot_path, self.path) if os.path.exists(path)]
        return (
            f"the loss is {loss} at step {step} in {self.stage.mode} of task {self.stage.task}: start over "
            f"with --overwrite and a lower --learning_rate ({' and '.join(kept) or 'nothing'} kept as before)"
        )

    def next_command(self) -> str:
        task, mode = self.stage
        script = checkpoint.script_of(Stage(task, "ret") if mode == "tp" else Stage(task + 1, "tp"))
        shared = ("checkpoint_dir", "index_path") + (("data_path",) if mode == "tp" else ())
        if not (Path(__file__).parents[1] / script).exists():
            script, shared = "evaluate.py", shared[:1]
        default = type(self.hp)()
        given = {name: getattr(self.hp, name) for name in shared if getattr(self.hp, name) != getattr(default, name)}
        return " ".join([script, *(f"--{name} {shlex.quote(value)}" for name, value in given.items())])
