"""Serving files: one task of a model, with the weights that it may read and nothing else.

    format         number of this layout
    task, metric   which task it serves, and how that was scored
    architecture   the arguments of NextItNet
    length         items in a row of the task's data; shorter rows are padded on the left, longer ones lose their oldest
    weights        embedding, positions, layer norms and the task's head
    conv           of each conv layer its shape, one bit a weight for whether the task may read it, and those weights
    items, targets the vocabularies, each as one uint8 tensor

Written and checked as checkpoints are. Weights may be kept in 16 bits; they are always computed with in float32.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conure import checkpoint
from conure.errors import InputError
from conure.files import load_sealed
from conure.line_reader import missing, read_lines
from conure.matmul import wide_linear
from conure.metrics import EVALUATION_BATCH, SCORES_AT_ONCE

import numpy as np
import torch
from torch import Tensor

import pruning
from data_loader import PADDING, UNKNOWN, Encoder, Vocabulary, pad_left
from nextitnet import NextItNet
from pruning import Stage

FORMAT = 1


@dataclass
class Source:
    """What the tools that read a serving file ask for."""

    task: int = 1  # the task that is served
    serving: str = ""  # the file that tools.export wrote; empty: checkpoints/serving_tK.pt, K being the task
    data_path: str = "Data/Session/original_desen_pretrain.csv"  # a user a line; what follows `,,` is not read
    ids: str = ""  # a file with the user of each row, one a line; empty: their numbers, from 1
    device: str = "auto"  # auto, cpu or cuda

    def check_output(self, path: str) -> None:
        """InputError if writing there would destroy what is read."""
        if os.path.realpath(path) in map(os.path.realpath, (self.data_path, self.ids, self.serving)):
            raise InputError(f"--output {path} is a file that is read: give another name")


def path_of(folder: str, task: int) -> str:
    return os.path.join(folder, f"serving_t{task}.pt")


def extract(content: dict[str, Any], task: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a checkpoint's content has for `task`; the same however many tasks it has learned since."""
    record, state = content["tasks"][task], dict(content["model"])
    stage, conv = checkpoint.stage_of_state(task, record["state"]), {}
    for name in [name.removesuffix(".owner") for name in state if name.endswith(".owner")]:
        readable, _ = pruning.used_and_trained(state.pop(f"{name}.owner"), stage)
        weight = state.pop(f"{name}.weight")
        bits = torch.from_numpy(np.packbits(readable.numpy()))
        conv[name] = {"shape": list(weight.shape), "readable": bits, "weights": weight[readable].to(dtype)}
    other_heads = tuple(f"heads.{other}." for other in content["tasks"] if other != task)
    return {
        "format": FORMAT,
        "task": task,
        "metric": record["metric"],
        "architecture": content["architecture"],
        "length": record["length"],
        "weights": {name: value.to(dtype) for name, value in state.items() if not name.startswith(other_heads)},
        "conv": conv,
        "items": content["items"],
        "targets": record["targets"],
    }


def load(path: str, task: int) -> dict[str, Any]:
    """The serving file of `task`; InputError if it is missing, damaged, or of another task."""
    remedy = f"run `python -m tools.export --task {task} --output {path}`"
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist: {remedy} first, which writes it")
    content, _ = load_sealed(path)
    if content is None or "conv" not in content:
        raise InputError(f"{path} is damaged, or no serving file: {remedy}, which writes one")
    if content["format"] != FORMAT:
        raise InputError(f"{path} has format {content['format']}, this version reads {FORMAT}: {remedy} again")
    if content["task"] != task:
        raise InputError(f"{path} serves task {content['task']}: give --task {content['task']}, or another --serving")
    return content


def build_model(content: dict[str, Any]) -> NextItNet:
    """The model with the task's head alone; what the task may not read is free and zero."""
    task, state = content["task"], {name: value.float() for name, value in content["weights"].items()}
    for name, layer in content["conv"].items():
        size = int(np.prod(layer["shape"]))
        readable = torch.from_numpy(np.unpackbits(layer["readable"].numpy(), count=size)).bool()
        weight = torch.zeros(size)
        weight[readable] = layer["weights"].float()
        state[f"{name}.weight"] = weight.view(layer["shape"])
        state[f"{name}.owner"] = (readable * task).to(torch.uint8).view(layer["shape"])
    with torch.device("meta"):  # as initial values would be drawn for nothing
        model = NextItNet(**content["architecture"])
        if task > 1:
            del model.heads["1"]
            head = f"heads.{task}."
            model.add_head(task, len(state[f"{head}weight"]), bias=f"{head}bias" in state)
    model.load_state_dict(state, assign=True)
    return model.eval()


class Served:
    """A task ready to serve: rows of tokens in, user representations and the best targets out."""

    def __init__(self, source: Source, device: torch.device):
        """Raises as `load`."""
        content = load(source.serving or path_of("checkpoints", source.task), source.task)
        self.task, self.length, self.device = content["task"], content["length"], device
        self.model = build_model(content).to(device)
        self.items, self.targets = (Vocabulary.from_tensor(content[name]) for name in ("items", "targets"))
        self.metric, self.channels = content["metric"], content["architecture"]["channels"]
        self.padding = self.items.ids.get(PADDING, 0)
        self.target_of = torch.from_numpy(self.targets.look_up(self.items.tokens)).long()  # by item; 0: it is none
        self.target_of[self.padding] = 0
        self.rows = self.unknown = self.cut = 0  # read so far: rows, tokens that are no items, rows that were too long

    def batches(self, path: str, names_path: str) -> Iterator[tuple[list[str], Tensor]]:
        """The names of the users and their rows (B, length) int64, in the order of the file.

        InputError names file and line of what is no row, or says that there are not as many names as rows.
        """
        names = read_names(names_path)
        for ids in self.read(path):
            users = list(itertools.islice(names, len(ids)))
            if len(users) < len(ids):
                raise InputError(f"{names_path} has fewer lines than {path} has rows: --ids names the user of each")
            yield users, ids
        if names_path and next(names, None) is not None:
            raise InputError(f"{names_path} has more lines than {path} has rows: --ids names the user of each")

    def read(self, path: str) -> Iterator[Tensor]:
        """The file's rows in batches (B, length) int64."""
        encode = Encoder(self.items.look_up)
        for lines in read_lines(path, has_targets(path)):
            lengths = lines.counts[0]
            ids = pad_left(encode(lines.tokens[0]), lengths, int(lengths.max()), -1)
            surplus = ids.shape[1] - self.length
            lost = ids[:, : max(surplus, 0)]
            self.cut += int(((lost >= 0) & (lost != self.padding)).any(axis=1).sum())
            ids = np.pad(ids, ((0, 0), (max(-surplus, 0), 0)), constant_values=-1)[:, max(surplus, 0) :]
            self.rows, self.unknown = self.rows + len(ids), self.unknown + int((ids == 0).sum())
            yield from torch.from_numpy(np.where(ids < 0, self.padding, ids)).long().split(EVALUATION_BATCH)

    @torch.no_grad()
    def represent(self, ids: Tensor) -> Tensor:
        """User representations (B, C) of rows (B, length)."""
        # One size of batch for all, because a matrix product's last bits may depend on it.
        whole = torch.cat([ids, ids[-1:].expand(EVALUATION_BATCH - len(ids), -1)])
        if self.task > 1:
            whole = torch.nn.functional.pad(whole, (0, 1))  # the separator, where the target would come
        return self.model.user_representation(whole.to(self.device), Stage(self.task, "inference"))[: len(ids)]

    @torch.no_grad()
    def best(self, ids: Tensor, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the best targets of rows (B, length), best first, and their scores, (B, k) both; -inf: there are no
        more, as `<UNK>`, padding and with `exclude_seen` the row's own items are never among them."""
        head, found = self.model.head(self.task), []
        rows_at_once = max(1, SCORES_AT_ONCE // head.out_features)
        for users, seen in zip(self.represent(ids).split(rows_at_once), ids.split(rows_at_once)):
            scores = users.new_empty(len(users), head.out_features)
            wide_linear(users, head.weight, head.bias, out=scores)
            scores[:, 0] = -torch.inf
            if self.task == 1:
                scores[:, self.padding] = -torch.inf
            if exclude_seen:
                scores.scatter_(1, self.target_of[seen].to(self.device), -torch.inf)
            values, indices = scores.topk(min(k, head.out_features))
            found.append({"indices": indices, "values": values})
        return tuple(torch.cat([part[name] for part in found]).cpu().numpy() for name in ("indices", "values"))

    def said(self) -> str:
        """What was read, and what of it the model does not know."""
        return (
            f"{self.rows:,} rows; read as {UNKNOWN}: {self.unknown:,} items that task 1 never saw; {self.cut:,} rows "
            f"longer than {self.length}, of which the last {self.length} items were used"
        )


def has_targets(path: str) -> bool:
    """Whether the file is of a later task, as its first line tells; InputError if it is none that can be read twice."""
    if not os.path.isfile(path):
        raise InputError(f"{missing(path)}, or is no file: name one with --data_path")
    with open(path, "rb") as file:
        return b",," in next((line for line in file if line.strip()), b"")


def read_names(path: str) -> Iterator[str]:
    """The lines of a file that are not empty, or numbers from 1 without one."""
    if not path:
        yield from map(str, itertools.count(1))
        return
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from (name for line in file if (name := line.strip()))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): --ids names a text file, a line for each row") from None
