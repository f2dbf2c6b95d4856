"""Serves a task from its serving file: rows of tokens → user representations and top-k targets."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

from conure.errors import InputError
from conure.files import check_output
from conure.line_reader import missing, read_lines
from conure.matmul import wide_linear
from conure.ranking import EVALUATION_BATCH, SCORES_AT_ONCE
from conure.settings import Device, Task
from conure.vocabulary import UNKNOWN, Encoder, Vocabulary

import numpy as np
import torch
from torch import Tensor

from data_loader import PADDING, pad_left
from pruning import Stage
from tools.serving.format import build_model, load, path_of


@dataclass
class Source:
    """Settings shared by tools.represent and tools.recommend."""

    task: Task = 1  # the task to serve
    checkpoint_dir: str = "checkpoints"  # folder of the chain's checkpoints
    serving: str = ""  # serving file, from tools.export; empty: serving_tK.pt in checkpoint_dir, for task K
    data_path: str = "Data/Session/original_desen_pretrain.csv"  # one user a line; targets after `,,` are ignored
    ids: str = ""  # file with the user id of each row, one a line, such as users.csv; empty: row numbers from 1
    device: Device = "auto"  # auto: cuda if there is a GPU
    overwrite: bool = False  # replace an existing output

    def serving_path(self) -> str:
        return self.serving or path_of(self.checkpoint_dir, self.task)

    def check_output(self, path: str) -> None:
        """InputError if `path` is an input, or exists without --overwrite."""
        read = (self.data_path, self.ids, self.serving_path())
        if os.path.realpath(path) in [os.path.realpath(each) for each in read]:
            raise InputError(f"--output {path} is a file that is read: give another name")
        check_output(path, self.overwrite)


class Served:
    """A loaded task. It counts the rows, unknown tokens and truncated rows that it reads."""

    def __init__(self, source: Source, device: torch.device):
        """Raises as `load`."""
        content = load(source.serving_path(), source.task)
        self.task, self.length, self.device = content["task"], content["length"], device
        self.model = build_model(content).to(device)
        self.items, self.targets = (Vocabulary.from_tensor(content[name]) for name in ("items", "targets"))
        self.metric, self.leave_out = content["metric"], content["leave_out"]
        self.channels = content["architecture"]["channels"]
        self.padding = self.items.ids.get(PADDING, 0)
        self.target_of = torch.from_numpy(self.targets.look_up(self.items.tokens)).long()  # (items,); 0: no target
        self.target_of[self.padding] = 0
        self.rows = self.unknown = self.cut = 0  # read so far: rows, unknown tokens, truncated rows

    def batches(self, path: str, names_path: str) -> Iterator[tuple[list[str], Tensor]]:
        """User ids and rows (B, length) int64, in the order of the file.

        Raises InputError at a malformed row, with file and line, or if the numbers of ids and rows differ.
        """
        names = read_names(names_path)
        for ids in self.read(path):
            users = list(itertools.islice(names, len(ids)))
            if len(users) < len(ids):
                raise InputError(f"--ids {names_path} has fewer lines than {path} has rows: give one user id per row")
            yield users, ids
        if names_path and next(names, None) is not None:
            raise InputError(f"--ids {names_path} has more lines than {path} has rows: give one user id per row")

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
        # All batches have one size, because the last bits of a matrix product may depend on its shape.
        whole = torch.cat([ids, ids[-1:].expand(EVALUATION_BATCH - len(ids), -1)])
        if self.task > 1:
            whole = torch.nn.functional.pad(whole, (0, 1))  # the separator (id 0), which precedes the target
        return self.model.user_representation(whole.to(self.device), Stage(self.task, "inference"))[: len(ids)]

    @torch.no_grad()
    def best(self, ids: Tensor, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores of the top-k targets of rows (B, length), best first, (B, k) each.

        `<UNK>`, padding and, with `exclude_seen`, the row's own items score -inf; so do the last places if fewer than
        k targets are left.
        """
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

    def summary(self) -> str:
        """One line: rows read, unknown items, truncated rows."""
        return (
            f"{self.rows:,} rows; read as {UNKNOWN}: {self.unknown:,} items that task 1 never saw; {self.cut:,} rows "
            f"longer than {self.length}, of which the last {self.length} items were used"
        )


def has_targets(path: str) -> bool:
    """Whether the first line has targets, as in files of later tasks; InputError if `path` is no regular file."""
    if not os.path.isfile(path):  # a pipe, for one, could not be read twice
        raise InputError(f"{missing(path)}, or is no file: name one with --data_path")
    with open(path, "rb") as file:
        return b",," in next((line for line in file if line.strip()), b"")


def read_names(path: str) -> Iterator[str]:
    """The non-empty lines of a file; without a path, the numbers from 1."""
    if not path:
        yield from map(str, itertools.count(1))
        return
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from (name for line in file if (name := line.strip()))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--ids {path} cannot be read ({error}): give a UTF-8 text file, one user id a line") from None
