"""Measure capacity: test scores by prune ratio and by the number of tasks learned before.

For every prune ratio, one model learns task 1 and then parts of task 2, whose targets are dealt out in order of
frequency, so that the parts are alike. At each depth, a copy of the model learns task 3. A second copy is the control:
without free conv weights, it learns task 3 by a head, a readout and an update of the item embedding alone.

READS  the task files in data_dir
WRITES to output_dir: a folder per seed, from which an interrupted run resumes; capacity.csv; capacity.png, if
       matplotlib is installed
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from conure import checkpoint, launch, losses, metrics, ranking
from conure.device import pick_device
from conure.files import check_output, whole_file
from conure.fingerprint import fingerprints
from conure.metrics import Protocol
from conure.settings import Range

import pandas as pd

import data_loader
import pruning
from pruning import Stage
from tools.comparisons import networks, study

SPLIT_TASK, NEXT_TASK = 2, 3  # the task that is split into parts, and the task that is learned at each depth


@dataclass
class Hyperparameters(study.Settings):
    output_dir: str = "checkpoints/capacity"  # a folder per seed, capacity.csv and capacity.png
    percents: Annotated[tuple[int, ...], Range(1, 99)] = (50, 60, 70, 80, 90, 95)  # prune ratios in %; original: 70
    depths: Annotated[tuple[int, ...], Range(1, pruning.MAX_TASKS - 1)] = (1, 4, 9)  # numbers of tasks before task 3
    overwrite: bool = False  # replace the table and figure of an earlier run; its checkpoints stay


class Capacity(study.Study):
    """All models with one seed."""

    def parts(self, count: int) -> list[data_loader.TaskData]:
        """Task 2's data split into `count` tasks; each gets every `count`-th target in order of frequency."""
        hp = self.settings(SPLIT_TASK, "tp")
        with open(hp.data_path, encoding="utf-8") as file:
            lines = [line.rstrip("\n").split(",,") for line in file]
        frequency = Counter(target for _, targets in lines for target in targets.split(","))
        part = {target: number for (target, _), number in zip(frequency.most_common(), itertools.cycle(range(count)))}
        data = []
        for number in range(count):
            path = Path(self.hp.output_dir) / "Data" / f"part_{number + 1}_of_{count}.csv"
            chosen = [(row, [t for t in targets.split(",") if part[t] == number]) for row, targets in lines]
            with whole_file(str(path)) as file:
                file.write("".join(f"{row},,{','.join(own)}\n" for row, own in chosen if own).encode())
            data.append(data_loader.load_examples(str(path), self.data(SPLIT_TASK).split, self.data(1).items))
        return data

    def first(self, folder: Path, ratio: float) -> None:
        """Task 1 pruned with `ratio`, in `folder`; trained once for all ratios, as training precedes pruning."""
        path = checkpoint.path_of(str(folder), Stage(1, "tp"))
        if os.path.exists(path):
            return
        hp = self.settings(1, "tp")
        self.learn(self.folder, hp, Stage(1, "tp"), self.data(1), self.loss(1, hp), None)
        content, _ = checkpoint.load(checkpoint.path_of(str(self.folder), Stage(1, "tp")))
        model = checkpoint.build_model(content)
        for layer in pruning.owned_weights(model):
            layer.owner.fill_(pruning.FREE)
        pruning.prune(model, 1, [ratio])
        content["model"], record, device = model.state_dict(), content["tasks"][1], pick_device(hp.device)
        stage = checkpoint.stage_of_state(1, "pruned")
        record["prune_ratio"], record["fingerprint"] = ratio, fingerprints(model, content)[1]
        protocol = Protocol(**record["protocol"])
        ranks = ranking.rank_held_out(model.to(device), self.data(1), stage, device, protocol)
        record["results"]["pruned"] = {split: metrics.score(each, protocol) for split, each in ranks.items()}
        record["ranks"] = ranks["test"].to_tensors()
        checkpoint.save(path, content)

    def model(self, percent: int, parts: list[data_loader.TaskData]) -> Iterator[dict[str, Any]]:
        """Learns task 1 and all `parts` with one prune ratio; yields a row for task 1, and two for every depth."""
        ratio, folder = percent / 100, self.folder / f"ratio_{percent}"
        self.first(folder, ratio)
        for number in range(1, len(parts) + 2):
            task, data = (1, self.data(1)) if number == 1 else (SPLIT_TASK, parts[number - 2])
            for mode in ("ret",) if number == 1 else ("tp", "ret"):
                start = checkpoint.path_of(str(folder), checkpoint.stage_before(Stage(number, mode)))
                hp = self.settings(task, mode, prune_ratio=ratio)
                loss = self.loss(1, hp) if task == 1 else losses.target(hp, data)
                self.learn(folder, hp, Stage(number, mode), data, loss, start)
            if number == 1:
                yield self.row(percent, 1, 0, folder)
            if number in self.hp.depths:
                self.next_task(folder / f"after_{number}", number, ratio)
                yield self.row(percent, NEXT_TASK, number, folder / f"after_{number}")
                self.control(folder / f"control_{number}", number)
                yield self.row(percent, NEXT_TASK, number, folder / f"control_{number}", control=True)

    def control(self, folder: Path, learned: int) -> None:
        """Learns task 3 without conv weights of its own, in as many epochs: the free weights are zero and frozen."""
        name = checkpoint.path_of("", Stage(learned, "ret"))
        content, _ = checkpoint.load(str(folder.parent / name))
        for layer, owner in [(key, value) for key, value in content["model"].items() if key.endswith(".owner")]:
            content["model"][layer.replace("owner", "weight")][owner == pruning.FREE] = 0.0
        folder.mkdir(exist_ok=True)
        checkpoint.save(str(folder / name), content)
        hp, data = self.settings(NEXT_TASK, "tp"), self.data(NEXT_TASK)
        hp.epochs += self.settings(NEXT_TASK, "ret").epochs
        stage, loss = Stage(learned + 1, "tp"), self.loss(NEXT_TASK, hp)
        self.learn(folder, hp, stage, data, loss, str(folder / name), networks.HeadOnly, prunes=False)

    def next_task(self, folder: Path, learned: int, ratio: float) -> None:
        """Trains, prunes and retrains task 3 after `learned` tasks."""
        for mode in ("tp", "ret"):
            home = folder.parent if mode == "tp" else folder
            start = checkpoint.path_of(str(home), checkpoint.stage_before(Stage(learned + 1, mode)))
            hp = self.settings(NEXT_TASK, mode, prune_ratio=ratio)
            data = self.data(NEXT_TASK)
            self.learn(folder, hp, Stage(learned + 1, mode), data, self.loss(NEXT_TASK, hp), start)

    def row(self, percent: int, task: int, learned: int, folder: Path, control: bool = False) -> dict[str, Any]:
        """The test score of the task learned after `learned` others, and the share of weights that was free for it."""
        mode = "tp" if control else "ret"
        content, _ = checkpoint.load(checkpoint.path_of(str(folder), Stage(learned + 1, mode)))
        scores = content["tasks"][learned + 1]["results"][mode]["test"]
        name, score = next(iter(scores.items()))
        row = {"seed": self.seed, "prune_ratio": percent / 100, "task": task, "learned_before": learned}
        free = 0.0 if control else (percent / 100) ** learned
        return row | {"free": free, "metric": name, "score": score, "n": scores["n"]}


def plot(table: pd.DataFrame, path: str) -> None:
    """Task 1 and task 3 against the prune ratio; task 3 against the number of tasks learned before it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"no {path}: matplotlib is missing: .venv/bin/python -m pip install matplotlib")
        return
    table = table.assign(control=table["free"] == 0)
    kinds = ["task", "learned_before", "prune_ratio", "control"]
    statistics = table.groupby(kinds)["score"].agg(["mean", "std"]).reset_index()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    first, later = statistics[statistics["task"] == 1], statistics[(statistics["task"] != 1) & ~statistics["control"]]
    left.errorbar(first["prune_ratio"], first["mean"], first["std"], marker="o", capsize=3)
    left.set(title="Task 1", xlabel="prune ratio", ylabel="test score")
    controls = statistics[statistics["control"]]
    for learned, rows in later.groupby("learned_before"):
        label = f"{learned} task{'s' if learned > 1 else ''} before; x: no free weights"
        line = middle.errorbar(rows["prune_ratio"], rows["mean"], rows["std"], marker="o", capsize=3, label=label)[0]
        alone = controls[controls["learned_before"] == learned]
        middle.plot(alone["prune_ratio"], alone["mean"], "x", color=line.get_color())
    middle.set(title="A later task", xlabel="prune ratio", ylim=(0, None))
    for ratio, rows in later.groupby("prune_ratio"):
        right.errorbar(rows["learned_before"], rows["mean"], rows["std"], marker="o", capsize=3, label=f"{ratio:g}")
    right.set(title="The same, by prune ratio", xlabel="tasks learned before", ylim=(0, None))
    left.set_ylim(0, None)
    middle.legend()
    right.legend(title="prune ratio")
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def learn(hp: Hyperparameters, seed: int) -> list[dict[str, Any]]:
    """The rows of all prune ratios with one seed."""
    runs, rows = Capacity(hp, seed), []
    parts = runs.parts(max(hp.depths) - 1)
    for percent in hp.percents:
        print(f"seed {seed}: prune ratio {percent / 100:g}", flush=True)
        rows += runs.model(percent, parts)
    return rows


def main(hp: Hyperparameters) -> None:
    path, picture = (os.path.join(hp.output_dir, name) for name in ("capacity.csv", "capacity.png"))
    check_output(path, hp.overwrite)
    check_output(picture, hp.overwrite)
    table = pd.DataFrame([row for rows in study.over_seeds(hp, learn) for row in rows])
    with whole_file(path) as file:
        table.to_csv(file, index=False)
    print(table.to_string(index=False))
    print(f"wrote {path}")
    plot(table, picture)


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
