"""The files that a stage reads and writes in its checkpoint folder, and its place in the chain."""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from conure import checkpoint, processes
from conure.errors import InputError, NothingToDo
from conure.files import lock_folder
from conure.fingerprint import fingerprints
from conure.settings import ROOT, of_script, printable
from conure.snapshot import Snapshot

import torch

from data_loader import TaskData
from nextitnet import NextItNet
from pruning import Stage

# Settings that may differ between a run and the one that resumes it. Files are compared by digest; the other settings
# do not change what is learned.
NOT_IDENTITY = {"data_path", "index_path", "checkpoint_dir", "device", "snapshot_minutes", "overwrite"}


class StageFiles:
    """The files of one stage in a checkpoint folder, which is locked until `close`."""

    network = NextItNet  # the class of the model

    def __init__(self, hp: Any, stage: Stage, data: TaskData):
        """Raises InputError if the stage before is missing or does not fit, NothingToDo if this stage is finished."""
        self.hp, self.stage, self.data = hp, stage, data
        self.path = checkpoint.path_of(hp.checkpoint_dir, stage)
        self.lock = lock_folder(hp.checkpoint_dir) if processes.is_main() else None
        with self.closed_on_failure():
            self.before: dict[str, Any] | None = None  # the checkpoint that the stage starts from
            self.tasks, self.lineage, made_from = {}, {}, ""
            if path := self.predecessor():
                self.before, made_from = checkpoint.load(path)
                self.check_fit(path)
                self.tasks = self.before["tasks"]
                self.lineage = self.before["lineage"] | {os.path.basename(path): made_from}
            self.identity = {name: printable(value) for name, value in vars(hp).items() if name not in NOT_IDENTITY}
            self.identity |= {"data": data.digest, "vocabulary": data.items.digest, "checkpoint before": made_from}
            self.snapshot = Snapshot(checkpoint.snapshot_of(self.path), self.identity, hp.overwrite)
            if self.before is None and not hp.overwrite:
                data.items.check_index(hp.index_path)
            if os.path.exists(self.path) and not hp.overwrite:
                self.refuse_to_redo()
            if hp.overwrite and (stale := checkpoint.after(self.path)):
                print(f"{self.path} will be redone; these depend on it and become stale: {', '.join(stale)}")

    def close(self) -> None:
        """Unlocks the folder for other runs."""
        if self.lock is not None:
            self.lock.close()

    @contextmanager
    def closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def predecessor(self) -> str | None:
        """The path of the checkpoint that the stage starts from; None for the first stage."""
        if self.stage == Stage(1, "tp"):
            return None
        return checkpoint.path_of(self.hp.checkpoint_dir, checkpoint.stage_before(self.stage))

    def check_fit(self, path: str) -> None:
        """InputError if the checkpoint before, at `path`, has other item ids or, for ret, other examples."""
        if not torch.equal(self.before["items"], self.data.items.to_tensor()):
            first = checkpoint.script_of(Stage(1, "tp"))
            raise InputError(
                f"{path} was made with another vocabulary than {self.hp.index_path}: give that one's --index_path, or "
                f"if it is lost, run `python {first} --index_path NEW` with its other flags as before"
            )
        if self.stage.mode == "ret":
            learned = self.before["tasks"][self.stage.task]
            if (learned["data_digest"], learned["split"]) != (self.data.digest, self.data.split._asdict()):
                flags = zip(("test_fraction", "split_seed", "split_by"), learned["split"].values())
                split = " ".join(f"--{name} {value}" for name, value in flags)
                raise InputError(
                    f"{path} was made with other data ({learned['data_path']}) or another split ({split}) "
                    f"than now: give those, or to learn the task from the new ones, {checkpoint.rerun_advice(path)}"
                )

    def refuse_to_redo(self) -> None:
        """NothingToDo if the stage was finished with the same settings, InputError if with others."""
        content, _ = checkpoint.load(self.path)
        stale = checkpoint.after(self.path)
        redo = "--overwrite redoes it" + (f" and makes {', '.join(stale)} stale" if stale else "")
        again = f"the stage is finished: continue with `python {self.next_command()}`; {redo}"
        checkpoint.refuse_other(self.path, content["identity"], self.identity, again)
        self.write_index()  # in case it was lost or damaged
        self.snapshot.remove()  # left behind if the run was killed just before its end
        raise NothingToDo(f"{self.path} is finished; {redo}\nnext: python {self.next_command()}")

    def prune_ratios(self) -> list[float]:
        """The prune ratios of all tasks before this one, and its own."""
        earlier = [record["prune_ratio"] for task, record in sorted(self.tasks.items()) if task < self.stage.task]
        return [*earlier, self.hp.prune_ratio]

    def write(self, model: NextItNet, facts: dict[str, Any], scores: dict[str, dict]) -> None:
        """Writes the checkpoint and, for the first stage, index.csv; prints what to run next.

        The task's record holds `facts`, and `scores` by state and split.
        """
        record = self.record(facts, scores)
        content = {
            "task": self.stage.task,
            "mode": self.stage.mode,
            "identity": self.identity,
            "lineage": self.lineage,
            "architecture": model.architecture,
            "model": model.cpu().state_dict(),
            "items": self.data.items.to_tensor(),
            "tasks": self.tasks | {self.stage.task: record},
        }
        record["fingerprint"] = fingerprints(model, content)[self.stage.task]
        checkpoint.save(self.path, content)
        self.write_index()
        self.snapshot.remove()
        print(f"saved {self.path} ({os.path.getsize(self.path) / 1e6:.1f} MB)")
        stale = checkpoint.after(self.path)
        if stale:
            print(f"stale now: {checkpoint.commands_to_rerun(stale, self.hp.checkpoint_dir)}")
        print(f"next: python {self.next_command()}{' --overwrite' if stale else ''}")

    def record(self, facts: dict[str, Any], scores: dict[str, dict]) -> dict[str, Any]:
        """What the checkpoint stores of the stage's task; in ret with the results and hyperparameters of tp."""
        before, hp = self.tasks.get(self.stage.task, {}), self.hp
        given = {name: printable(value) for name, value in vars(hp).items()}
        return facts | {
            "data_path": self.data.path,
            "data_digest": self.data.digest,
            "split": self.data.split._asdict(),
            "length": self.data.rows.shape[1] + (1 if self.stage.task == 1 else -1),
            "targets": self.data.target_vocabulary.to_tensor(),
            "target_count": len(self.data.target_vocabulary),
            "prune_ratio": before.get("prune_ratio") or hp.prune_ratio,
            "state": list(scores)[-1],
            "results": before.get("results", {}) | scores,
            "hyperparameters": before.get("hyperparameters", {}) | {self.stage.mode: given},
        }

    def write_index(self) -> None:
        if self.before is None and processes.is_main():
            self.data.items.write(self.hp.index_path)

    def is_last(self, script: str) -> bool:
        """Whether the next script's data are missing from where this script, without --data_path, found its own."""
        usual = type(self.hp)().data_path == self.hp.data_path
        return usual and self.stage.mode == "ret" and not os.path.exists(of_script(script).data_path)

    def next_command(self) -> str:
        task, mode = self.stage
        script = checkpoint.script_of(Stage(task, "ret") if mode == "tp" else Stage(task + 1, "tp"))
        shared = ("checkpoint_dir", "index_path", "device", "precision", "as_original")
        if mode == "tp":
            shared += (
                "data_path",
                "group_by_user",
                "test_fraction",
                "split_seed",
                "split_by",
                "leave_out",
                "all_positions",
            )
        if not (ROOT / script).exists() or self.is_last(script):
            script, shared = "evaluate.py", shared[:1]
        default = type(self.hp)()
        shared = (name for name in shared if hasattr(default, name))  # task 1 has no split_by
        given = {name: getattr(self.hp, name) for name in shared if getattr(self.hp, name) != getattr(default, name)}
        return " ".join([script, *(f"--{name} {shlex.quote(str(value))}" for name, value in given.items())])
