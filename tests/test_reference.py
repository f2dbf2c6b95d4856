"""The suite reproduces every array recorded from the original.

tests/reference/README.md describes the arrays and their tolerances. The environment variable CONURE_REFERENCE may name
a folder of further recordings.
"""

import ast
import json
import os
import re
from pathlib import Path

from conure import losses, ranking, samplers, settings
from conure.vocabulary import UNKNOWN, Vocabulary

import numpy as np
import pytest
import torch
from conftest import batch_of
from torch import Tensor

import data_loader
import pruning
from nextitnet import LAYER_NORM_EPS, NextItNet
from pruning import Stage

TOLERANCE = {"rtol": 0, "atol": 5e-5}
FOLDERS = [Path(__file__).parent / "reference"]
if os.environ.get("CONURE_REFERENCE"):
    FOLDERS.append(Path(os.environ["CONURE_REFERENCE"]))
RECORDINGS = sorted(path for folder in FOLDERS for path in folder.glob("*.npz"))
LOADERS = sorted(path for folder in FOLDERS for path in folder.glob("loader_*"))


class Recording:
    """One npz file: its arrays, and the suite's model at any recorded point."""

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = dict(arrays)
        self.config = json.loads(str(self.arrays["config"]))
        self.tasks = 1 + len(self.config["target_sizes"])
        assert self.config["layer_norm_eps"] == LAYER_NORM_EPS

    def tensor(self, name: str) -> Tensor:
        array = self.arrays[name]
        tensor = torch.from_numpy(np.asarray(array, np.int64 if array.dtype.kind in "iu" else array.dtype))
        return tensor.permute(2, 0, 1) if ".conv" in name else tensor  # (K, C_in, C_out) → (C_out, K, C_in)

    def parameters(self, point: str) -> dict[str, str]:
        """Names in the suite's state dict → names of the arrays recorded at `point`, such as after_tp_t2."""
        names = {"embedding.weight": "embedding", "heads.1.weight": "head1.weight", "heads.1.bias": "head1.bias"}
        for layer in range(len(self.config["dilations"])):
            for number in (1, 2):
                block = f"blocks.{layer}"
                names[f"{block}.conv{number}.weight"] = f"block{layer}.conv{number}.weight"
                names[f"{block}.ln{number}.weight"] = f"block{layer}.ln{number}.gamma"
                names[f"{block}.ln{number}.bias"] = f"block{layer}.ln{number}.beta"
        for task in range(2, self.tasks + 1):
            names[f"heads.{task}.weight"] = f"head{task}.weight"
        return {ours: f"{point}/{theirs}" for ours, theirs in names.items() if f"{point}/{theirs}" in self.arrays}

    def model(self, point: str, learned: int) -> NextItNet:
        """The model at `point`, with the owner maps of tasks 1..learned; untrained heads have their initial weights."""
        config = self.config
        model = NextItNet(config["num_items"], config["channels"], config["dilations"], config["kernel_size"])
        for task, size in enumerate(config["target_sizes"], start=2):
            model.add_head(task, size)
        state = model.state_dict()
        for ours, theirs in (self.parameters("init") | self.parameters(point)).items():
            state[ours] = self.tensor(theirs)
        for task in range(1, learned + 1):
            for ours, mask in self.masks(task).items():
                state[ours] = torch.where(mask, task, state[ours])
        model.load_state_dict(state)
        return model

    def masks(self, task: int) -> dict[str, Tensor]:
        return {
            f"blocks.{layer}.conv{number}.owner": self.tensor(f"mask{task}/block{layer}.conv{number}").bool()
            for layer in range(len(self.config["dilations"]))
            for number in (1, 2)
        }

    def start(self, task: int, mode: str) -> NextItNet:
        """The model that a stage starts from."""
        if mode == "ret":
            return self.model(f"after_tp_t{task}", learned=task)
        return self.model("init" if task == 1 else f"after_ret_t{task - 1}", learned=task - 1)

    def batch(self, task: int) -> tuple[Tensor, Tensor]:
        ids = self.tensor(f"task{task}/input_ids")
        return ids[:, :-1], ids[:, -1]

    def data(self, task: int) -> data_loader.TaskData:
        """The recorded batch as a task's data."""
        inputs, targets = (tensor.int().numpy() for tensor in self.batch(task))
        sizes = [self.config["num_items"], *self.config["target_sizes"]]
        tokens = ([UNKNOWN, *map(str, range(1, size))] for size in (sizes[0], sizes[task - 1]))
        items, target_vocabulary = map(Vocabulary, tokens)
        everything = np.arange(len(targets))
        return data_loader.TaskData(
            rows=inputs,
            users=everything,
            targets=targets,
            items=items,
            target_vocabulary=target_vocabulary,
            padding_id=0,
            splits={"train": everything},
        )

    def loss(self, task: int, mode: str) -> losses.Loss:
        """The loss of the scripts with --as_original, with the recorded negatives."""
        script = f"conure_{mode}_t{min(task, 2)}.py"
        if task == 1:
            loss = losses.next_item(settings.of_script(script, as_original=True), self.data(1))
            loss.sampler = RecordedNegatives.of(self, mode)
            return loss
        l2 = float(str(self.arrays[f"task{task}/l2"]))
        loss = losses.target(settings.of_script(script, as_original=True, l2=l2), self.data(task))
        loss.sampler.draw = lambda targets, generator: self.tensor(f"task{task}/negatives").flatten()
        return loss


class RecordedNegatives(samplers.LogUniformSampler):
    """The suite's sampler, with the original's draw: `ids`, with expected counts `counts`."""

    def __init__(self, items: int, ids: Tensor, counts: Tensor):
        self.ids, self.draws = ids, len(ids)  # the number of draws is not recorded; it is this if none was a repeat
        super().__init__(items, 0.5)
        self.count = len(ids)
        if not torch.allclose(self.expected_count(ids, self.draws), counts, rtol=1e-5, atol=0):
            self.draws = int((torch.log1p(-counts.double()) / self.log_miss[ids]).median().round())

    @classmethod
    def of(cls, recording: Recording, mode: str) -> "RecordedNegatives":
        names = (f"task1/{mode}/{name}" for name in ("sampled_ids", "sampled_expected_count"))
        return cls(recording.config["num_items"], *map(recording.tensor, names))

    def draw(self, generator: torch.Generator) -> tuple[Tensor, int]:
        return self.ids, self.draws


@pytest.fixture(scope="module", params=RECORDINGS, ids=lambda path: path.name)
def recording(request) -> Recording:
    return Recording(request.param)


def every_stage(recording: Recording) -> list[Stage]:
    return [Stage(task, mode) for task in range(1, recording.tasks + 1) for mode in ("tp", "ret")]


def close(ours: Tensor, theirs: Tensor, **tolerance) -> None:
    torch.testing.assert_close(ours.detach().flatten(), theirs.flatten(), **(tolerance or TOLERANCE))


def test_recordings_exist():
    assert RECORDINGS and LOADERS


def test_every_recorded_array_is_tested(recording):
    points = "init|after_(tp|ret)_t\\d+"
    known = [
        "config",
        f"({points})/(embedding|head\\d+\\.(weight|bias)|block\\d+\\.(conv\\d\\.weight|ln\\d\\.(gamma|beta)))",
        "mask\\d+/block\\d+\\.conv\\d",
        "task1/(input_ids|ret/hidden_after|final_hidden)",
        "task1/(tp|ret)/(hidden|sampled_ids|(true|sampled)_expected_count|loss_per_position|next_item_probs|top5)",
        "task\\d+/(input_ids|negatives|l2)",
        "task\\d+/(tp|ret)/(hidden|user_representation|scores|bpr|bce|l2_penalty|grad/block\\d+\\.conv\\d)",
    ]
    assert [name for name in recording.arrays if not re.fullmatch("|".join(known), name)] == []


def test_task_1_hidden_states_losses_and_predictions(recording):
    inputs, targets = recording.batch(1)
    for mode in ("tp", "ret"):
        model, stage, prefix = recording.start(1, mode), Stage(1, mode), f"task1/{mode}"
        hidden = model(inputs, stage)
        close(hidden, recording.tensor(f"{prefix}/hidden"))
        sampler = RecordedNegatives.of(recording, mode)
        labels = recording.tensor("task1/input_ids")[:, 1:].flatten()
        own, others = (sampler.expected_count(ids, sampler.draws) for ids in (labels, sampler.ids))
        close(own, recording.tensor(f"{prefix}/true_expected_count"))
        close(others, recording.tensor(f"{prefix}/sampled_expected_count"))
        rows = zip(hidden.flatten(0, 1).split(1), labels.split(1), labels[:, None].split(1), own.split(1))
        each = [losses.sampled_softmax(*row, model.head(1), sampler.ids, count, others) for *row, count in rows]
        each = torch.stack(each)
        close(each, recording.tensor(f"{prefix}/loss_per_position"))
        close(recording.loss(1, mode)(model, stage, batch_of(inputs, targets), None), each.mean())
        scores = model.scores(inputs, stage)
        close(scores.softmax(dim=1), recording.tensor(f"{prefix}/next_item_probs"))
        assert torch.equal(scores.topk(5).indices, recording.tensor(f"{prefix}/top5"))
        for place, ids in enumerate(recording.tensor(f"{prefix}/top5").T, start=1):
            assert (ranking.target_ranks(scores, ids) == place).all()


@pytest.mark.parametrize("draws", [9, 10, 14])
def test_expected_counts_equal_tensorflows(draws):
    """9 negatives of 47 items, without and with repeated draws; formula of TensorFlow's ExpectedCountHelper."""
    probabilities = np.log1p(1 / np.arange(1, 48)) / np.log(48)
    counts = probabilities * 9 if draws == 9 else -np.expm1(draws * np.log1p(-probabilities))
    counts, ids = torch.from_numpy(counts).float(), torch.tensor([0, 3, 1, 20, 7, 46, 2, 11, 5])
    sampler = RecordedNegatives(47, ids, counts[ids])
    assert sampler.draws == draws and counts[0] > 0.8
    torch.testing.assert_close(sampler.expected_count(torch.arange(47), sampler.draws), counts)


def test_later_tasks_hidden_states_scores_and_losses(recording):
    for stage in every_stage(recording)[2:]:
        task, prefix = stage.task, f"task{stage.task}/{stage.mode}"
        model, (inputs, targets) = recording.start(*stage), recording.batch(task)
        close(model(inputs, stage), recording.tensor(f"{prefix}/hidden"))
        close(model.user_representation(inputs, stage), recording.tensor(f"{prefix}/user_representation"))
        scores = model.scores(inputs, stage)
        close(scores, recording.tensor(f"{prefix}/scores"))
        positive = scores.gather(1, targets[:, None])
        negative = scores.gather(1, recording.tensor(f"task{task}/negatives"))
        bpr, penalty = (recording.tensor(f"{prefix}/{name}") for name in ("bpr", "l2_penalty"))
        close(losses.bpr(positive, negative).mean(), bpr)
        close(losses.bce(positive, negative).mean(), recording.tensor(f"{prefix}/bce"))
        assert recording.config["l2"][task - 2] == pytest.approx(float(recording.arrays[f"task{task}/l2"]))
        close(recording.loss(task, stage.mode)(model, stage, batch_of(inputs, targets), None), bpr + penalty)


def test_gradients_are_the_originals_and_zero_on_owned_weights(recording):
    for stage in every_stage(recording):
        model = recording.start(*stage)
        model.train_only(stage)
        recording.loss(*stage)(model, stage, batch_of(*recording.batch(stage.task)), None).backward()
        for name, parameter in model.named_parameters():
            if "conv" in name:
                layer = name.replace("blocks.", "block").removesuffix(".weight")
                close(parameter.grad, recording.tensor(f"task{stage.task}/{stage.mode}/grad/{layer}"))
        for task in range(1, stage.task):
            for name, mask in recording.masks(task).items():
                gradient = model.get_parameter(name.replace("owner", "weight")).grad
                assert (gradient[mask] == 0).all()


class TensorFlowAdam(torch.optim.Optimizer):
    """Adam with epsilon added before the bias correction, as in TensorFlow."""

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})
        self.t = 0

    @torch.no_grad()
    def step(self):
        self.t += 1
        lr = self.defaults["lr"] * (1 - 0.999**self.t) ** 0.5 / (1 - 0.9**self.t)
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:  # a head of another task
                continue
            state = self.state[parameter]
            m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * parameter.grad
            v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * parameter.grad**2
            parameter -= lr * m / (v.sqrt() + 1e-8)


@pytest.mark.parametrize("optimiser, tolerance", [(TensorFlowAdam, 5e-5), (torch.optim.Adam, 2e-3)])
def test_weights_after_the_optimiser_steps(recording, optimiser, tolerance):
    for stage in every_stage(recording):
        model = recording.start(*stage)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        adam = optimiser(model.train_only(stage), lr=recording.config["learning_rate"])
        for _ in range(recording.config["adam_steps"]):
            adam.zero_grad()
            recording.loss(*stage)(model, stage, batch_of(*recording.batch(stage.task)), None).backward()
            adam.step()
        after = model.state_dict()
        for ours, theirs in recording.parameters(f"after_{stage.mode}_t{stage.task}").items():
            close(after[ours], recording.tensor(theirs), rtol=0, atol=tolerance)
        for task in range(1, stage.task):
            for name, mask in recording.masks(task).items():
                weight = name.replace("owner", "weight")
                assert torch.equal(after[weight][mask], before[weight][mask])


def test_pruning_keeps_the_same_weights_as_the_original(recording):
    ratios = recording.config["prune_ratio"]
    for task in range(1, recording.tasks + 1):
        model = recording.model(f"after_tp_t{task}", learned=task - 1)
        pruning.prune(model, task, ratios[:task])
        owners = dict(model.named_buffers())
        for name, mask in recording.masks(task).items():
            assert torch.equal(owners[name] == task, mask), f"task {task}, {name}"


def test_task_1_is_unchanged_after_later_tasks(recording):
    inputs, _ = recording.batch(1)
    learned = recording.model("after_ret_t1", learned=1)(inputs, Stage(1, "inference"))
    close(learned, recording.tensor("task1/ret/hidden_after"))
    last = recording.model(f"after_ret_t{recording.tasks}", learned=recording.tasks)(inputs, Stage(1, "inference"))
    close(last, recording.tensor("task1/final_hidden"))
    assert torch.equal(learned, last)


@pytest.mark.parametrize("folder", LOADERS, ids=lambda path: path.name)
def test_ids_rows_splits_and_negative_probabilities(folder):
    expected = json.loads((folder / "expected.json").read_text())
    first = data_loader.load_sequences(str(folder / "task1.csv"), data_loader.Split(0.2))
    assert first.items.ids == expected["task1"]["item_index"]
    assert np.column_stack([first.rows[first.users], first.targets]).tolist() == expected["task1"]["sequences"]
    assert ast.literal_eval((folder / "index.csv").read_text()) == first.items.ids

    second = data_loader.load_examples(str(folder / "task2.csv"), data_loader.Split(0.2), first.items)
    assert second.target_vocabulary.ids == expected["task2"]["target_index"]
    assert np.column_stack([second.rows[second.users], second.targets]).tolist() == expected["task2"]["examples"]
    size = len(second.target_vocabulary)
    probabilities = samplers.static_probabilities(second.targets, size, expected["task2"]["rho"])
    np.testing.assert_allclose(probabilities, expected["task2"]["negative_probabilities"], rtol=0, atol=5e-5)

    for task, data in (("task1", first), ("task2", second)):
        shuffled = np.concatenate([data.splits["train"], data.splits["heldout"]])
        assert shuffled.tolist() == expected[task]["shuffle_seed_10"]
        assert len(data.splits["heldout"]) == int(0.2 * len(shuffled))
        halves = np.concatenate([data.splits["validation"], data.splits["test"]])
        assert halves.tolist() == data.splits["heldout"].tolist()
