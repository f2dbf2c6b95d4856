"""Writes a serving file: one task alone, with the weights that it may read and nothing of the other tasks.

READS  the newest checkpoint in checkpoint_dir (or the one named); the task may be any that it has learned
WRITES output, for tools.represent and tools.recommend; program, if a name is given: the task as a torch.export program,
       which runs without this suite's code:
           lists = {"items.txt": "", "targets.txt": ""}
           program = torch.export.load("task.pt2", extra_files=lists).module()
           users, scores = program(ids)     ids (B, length) int64 → (B, channels), (B, targets) float32
       The id of a token is the number of its line in the list, from 0. Rows shorter than `length`, which is printed,
       begin with the id of the token 0: padding, which in task 1 has a score too. Unknown tokens have the id 0, whose
       score is -inf.
PRINTS a table of sizes beside the checkpoint's
NEXT   python -m tools.represent, python -m tools.recommend
"""

import os
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

from conure import checkpoint, launch
from conure.errors import InputError
from conure.files import save_sealed, torch_writing, whole_file
from conure.settings import Task

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextitnet import NextItNet
from tools import serving

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Hyperparameters:
    task: Task = 1  # the task to serve
    checkpoint_dir: str = "checkpoints"  # where the scripts wrote their checkpoints
    checkpoint: str = ""  # a checkpoint file; empty: the newest in checkpoint_dir
    output: str = ""  # the serving file; empty: serving_tK.pt in checkpoint_dir, K being the task
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the weights in the file; 16 bits halve its size
    program: str = ""  # a .pt2 file for the torch.export program; empty: none is written


class Program(nn.Module):
    """A served task in torch's own operations alone, of which torch.export can make a program."""

    def __init__(self, model: NextItNet, task: int, length: int):
        super().__init__()
        self.embedding, self.head, self.task = model.embedding.weight, model.head(task), task
        self.position = None
        if model.position is not None:
            inputs = length + int(task > 1)
            places = torch.arange(inputs) - inputs + model.position.num_embeddings
            self.position = nn.Parameter(model.position.weight[places.clamp(min=0)].detach())
        self.blocks, self.dilations = model.blocks, model.architecture["dilations"]

    def conv(self, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        """(B, T, C) → (B, T, C); weight (K, C_in, C_out), tap 0 the oldest."""
        x = F.pad(x.transpose(1, 2), ((len(weight) - 1) * dilation, 0))
        return F.conv1d(x, weight.permute(2, 1, 0), dilation=dilation).transpose(1, 2)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, length) → user representations (B, C), scores (B, targets), which are -inf for `<UNK>`."""
        if self.task > 1:
            ids = F.pad(ids, (0, 1))
        x = F.embedding(ids, self.embedding)  # (B, T, C)
        if self.position is not None:
            x = x + self.position
        for block, dilation in zip(self.blocks, self.dilations):
            inner = self.conv(F.relu(block.ln1(x)), block.conv1.weight, dilation)
            x = x + self.conv(F.relu(block.ln2(inner)), block.conv2.weight, 2 * dilation)
        user = x[:, -1]
        scores = self.head(user)
        return user, torch.cat([torch.full_like(scores[:, :1], -torch.inf), scores[:, 1:]], dim=1)


def write_program(path: str, content: dict[str, Any]) -> None:
    """The program takes any number of rows at a time."""
    program = Program(serving.build_model(content), content["task"], content["length"]).eval().requires_grad_(False)
    example = torch.zeros(2, content["length"], dtype=torch.int64)
    exported = torch.export.export(program, (example,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    tokens = {f"{name}.txt": content[name].numpy().tobytes().decode() for name in ("items", "targets")}
    with whole_file(path) as file, torch_writing():
        torch.export.save(exported, file, extra_files=tokens)
    print(f"wrote {path} ({os.path.getsize(path) / 1e6:.2f} MB, float32), for rows of length {content['length']}")


def kind_of(name: str, task: int) -> str:
    """Which row of the table of sizes a tensor of a checkpoint or serving file belongs to."""
    if name.startswith("heads."):
        return f"head of task {task}" if name.startswith(f"heads.{task}.") else "heads of other tasks"
    if name.endswith(("owner", "readable")):
        return "which weights the task may read"
    if "conv" in name:
        return "convolutions"
    return "item embedding" if name.startswith("embedding") else "positions and layer norms"


def sizes(content: dict[str, Any], task: int) -> dict[str, int]:
    """Bytes by what they are for, of a checkpoint's or a serving file's tensors."""
    tensors = dict(content["model"] if "model" in content else content["weights"])
    for name, layer in content.get("conv", {}).items():
        tensors |= {f"{name}.weight": layer["weights"], f"{name}.readable": layer["readable"]}
    found = defaultdict(int)
    for name, tensor in tensors.items():
        found[kind_of(name, task)] += tensor.nbytes
    lists = [record["targets"] for record in content["tasks"].values()] if "tasks" in content else [content["targets"]]
    found["vocabularies"] = sum(tensor.nbytes for tensor in (content["items"], *lists))
    return found


def print_sizes(before: dict[str, int], after: dict[str, int]) -> None:
    print(f"{'megabytes':34}{'checkpoint':>12}{'serving':>12}")
    for name in before:
        print(f"{name:34}{before[name] / 1e6:12.3f}{after.get(name, 0) / 1e6:12.3f}")
    print(f"{'all of it':34}{sum(before.values()) / 1e6:12.3f}{sum(after.values()) / 1e6:12.3f}")


def main(hp: Hyperparameters) -> None:
    path = hp.checkpoint or checkpoint.newest(hp.checkpoint_dir)
    content, _ = checkpoint.load(path)
    if hp.task not in content["tasks"]:
        raise InputError(f"{path} has learned tasks 1 to {max(content['tasks'])}: task {hp.task} is not among them")
    if hp.program and not hp.program.endswith(".pt2"):
        raise InputError(f"--program {hp.program}: the name must end with .pt2")
    print(f"checkpoint: {path}")
    served = serving.extract(content, hp.task, DTYPES[hp.dtype])
    output = hp.output or serving.path_of(hp.checkpoint_dir, hp.task)
    save_sealed(output, served)
    print_sizes(sizes(content, hp.task), sizes(served, hp.task))
    before, after = (os.path.getsize(each) / 1e6 for each in (path, output))
    print(f"wrote {output} ({after:.2f} MB; the checkpoint has {before:.2f})")
    if hp.program:
        write_program(hp.program, served)
    print(f"next: python -m tools.recommend --task {hp.task} --serving {output} --data_path FILE")


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
