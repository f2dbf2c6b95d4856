"""Training stages of the studies, with the settings, data and losses of the eight scripts."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from conure import losses, training
from conure.errors import InputError, NothingToDo
from conure.initial_model import is_tied
from conure.settings import Count, Device, Dilations, Positive, Share, SplitSeed, Width, of_script
from conure.stage_files import StageFiles

import torch

import data_loader
from data_loader import Split
from nextitnet import NextItNet
from pruning import Stage

T = TypeVar("T")

ARCHITECTURE = ("kernel_size", "positional_embedding", "spectral", "tied")  # settings that only conure_tp_t1.py has
METRIC = {4: "accuracy"}  # of the tasks that are not evaluated by ranking, as in their scripts


@dataclass
class Settings:
    data_dir: str = "Data/Session"  # folder of the task files
    output_dir: str = "checkpoints/study"  # finished stages are skipped, unfinished ones resume
    seeds: Count = 5  # number of runs, each with a seed and a split of its own
    first_seed: SplitSeed = 10  # seed of the first run and of its split; the next runs count up
    device: Device = "auto"  # auto: cuda if there is a GPU
    channels: Width = 64  # width of the embedding and of every layer
    dilations: Dilations = (1, 4, 1, 4)  # one residual block each
    first_epochs: Count = 30  # epochs of task 1 in tp
    first_ret_epochs: Count = 6  # epochs of task 1 in ret
    epochs: Count = 4  # epochs of tasks 2 and 3 in tp
    ret_epochs: Count = 12  # epochs of tasks 2 and 3 in ret
    batch_size: Count = 512  # of tasks 2 and 3, in examples
    learning_rate: Positive = 3e-3  # of Adam in tasks 2 and 3
    later_test_fraction: Share = 0.2  # share held out in tasks 2 to 4; 0.9 leaves a tenth of the examples for training
    class_epochs: Count = 10  # epochs of task 4 in tp
    class_ret_epochs: Count = 10  # epochs of task 4 in ret
    class_batch_size: Count = 128  # of task 4, in examples
    class_learning_rate: Positive = 1e-3  # of Adam in task 4


class StudyFiles(StageFiles):
    """A stage that starts from any checkpoint, or from scratch (None)."""

    def __init__(self, start: str | None, network: Callable[..., NextItNet], *arguments: Any):
        self.start, self.network = start, network
        super().__init__(*arguments)

    def predecessor(self) -> str | None:
        return self.start

    def next_command(self) -> str:
        return "-m tools.NAME, as before"


class Study:
    """Settings, data and training of all runs with one seed."""

    def __init__(self, hp: Settings, seed: int):
        self.hp, self.seed = hp, seed
        self.folder = Path(hp.output_dir) / f"seed_{seed}"
        self.loaded: dict[int, data_loader.TaskData] = {}

    def settings(self, task: int, mode: str, **changes: Any) -> SimpleNamespace:
        """The settings of the task's script, changed by those of the study and by `changes`."""
        hp, first, block = self.hp, of_script("conure_tp_t1.py"), of_script(f"conure_{mode}_t{task}.py")
        values = {name: getattr(first, name) for name in ARCHITECTURE} | vars(block)
        values |= {"seed": self.seed, "split_seed": self.seed}  # so that the spread over runs is of both
        values["index_path"] = str(self.folder / "index.csv")
        values["data_path"] = os.path.join(hp.data_dir, os.path.basename(block.data_path))
        values |= {name: getattr(hp, name) for name in ("device", "channels", "dilations")}
        if task == 1:
            values["epochs"] = hp.first_epochs if mode == "tp" else hp.first_ret_epochs
        else:
            values["test_fraction"] = hp.later_test_fraction
            kind = "class_" if task in METRIC else ""
            values["epochs"] = getattr(hp, kind + ("epochs" if mode == "tp" else "ret_epochs"))
            values |= {name: getattr(hp, kind + name) for name in ("batch_size", "learning_rate")}
        return SimpleNamespace(**values | changes)

    def data(self, task: int) -> data_loader.TaskData:
        if task not in self.loaded:
            hp = self.settings(task, "tp")
            if task == 1:
                self.loaded[task] = data_loader.load_sequences(hp.data_path, Split(hp.test_fraction, hp.split_seed))
            else:
                split = Split(hp.test_fraction, hp.split_seed, hp.split_by)
                self.loaded[task] = data_loader.load_examples(hp.data_path, split, self.data(1).items)
        return self.loaded[task]

    def loss(self, task: int, hp: SimpleNamespace) -> losses.Loss:
        return losses.next_item(hp, self.data(1)) if task == 1 else losses.target(hp, self.data(task))

    def learn(
        self,
        folder: Path,
        hp: SimpleNamespace,
        stage: Stage,
        data: data_loader.TaskData,
        loss: losses.Loss,
        start: str | None,
        network: Callable[..., NextItNet] = NextItNet,
        metric: str = "ranking",
        prunes: bool = True,
    ) -> None:
        """Trains one stage from the checkpoint `start` and saves it in `folder`, unless it is finished already.

        With `prunes`, tp prunes after training, as the scripts do. Output goes to log.txt.
        """
        folder.mkdir(parents=True, exist_ok=True)
        hp.checkpoint_dir = str(folder)
        hp.tied = "yes" if is_tied(hp.tied, self.data(1)) else "no"  # also where a later task begins the model
        with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.suppress(NothingToDo):
            run = training.Run(hp, stage, data, metric, lambda *arguments: StudyFiles(start, network, *arguments))
            run.train(loss, to_the_end=True)  # Ctrl-C must not cut a stage short that is compared with whole ones
            if prunes and stage.mode == "tp":
                run.prune()
            run.save()


def over_seeds(hp: Settings, one_seed: Callable[[Settings, int], T]) -> list[T]:
    """one_seed(hp, seed) for every seed, with as many parallel processes as there are cores.

    Each has one thread, as a second one gains nothing at these sizes.
    """
    seeds = [(hp, seed) for seed in range(hp.first_seed, hp.first_seed + hp.seeds)]
    workers = min(len(seeds), torch.get_num_threads())
    if workers == 1:
        return [one_seed(*each) for each in seeds]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        runs = [pool.submit(one_seed, *each) for each in seeds]
        try:
            for run in as_completed(runs):
                run.result()
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise InputError("a seed's process was killed, maybe out of memory: run it again, it resumes") from None
            raise
        return [run.result() for run in runs]


def start_worker() -> None:
    """Limits this process to one thread, ignores Ctrl-C, which the parent handles, and ends with the parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def end_with(process: multiprocessing.Process) -> None:
    process.join()
    os._exit(1)
