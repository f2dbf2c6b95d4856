"""Write a serving file: one task, with the weights that it reads and nothing of other tasks.

READS  the newest checkpoint in checkpoint_dir, or the one given; --task may be any task that it has learned
WRITES output, for tools.represent and tools.recommend; with --program also a torch.export program, which runs without
       this repository:
           lists = {"items.txt": "", "targets.txt": ""}
           program = torch.export.load("task.pt2", extra_files=lists).module()
           users, scores = program(ids)     ids (B, length) int64 → (B, channels), (B, targets) float32
       A token's id is its line number in the list, counted from 0. An unknown token has id 0, whose score is -inf. Pad
       rows on the left to `length`, which is printed, with the id of the token `0`; in task 1 this token has a score.
NEXT   python -m tools.represent, python -m tools.recommend
"""

import os
from dataclasses import dataclass
from typing import Any, Literal

from conure import checkpoint, launch
from conure.errors import InputError
from conure.files import check_output, save_sealed, torch_writing, whole_file
from conure.settings import Task

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextitnet import NextItNet
from pruning import Stage
from tools.serving.format import build_model, extract, is_of_task, path_of


@dataclass
class Hyperparameters:
    task: Task = 1  # the task to serve
    checkpoint_dir: str = "checkpoints"  # folder of the chain's checkpoints
    checkpoint: str = ""  # checkpoint file to export from; empty: the newest in checkpoint_dir
    output: str = ""  # serving file to write; empty: serving_tK.pt in checkpoint_dir, for task K
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # dtype of stored weights; 16 bits halve the file
    program: str = ""  # .pt2 file for the torch.export program; empty: none
    overwrite: bool = False  # replace existing files; a serving file of the same task is replaced without it


class Program(nn.Module):
    """Forward pass of one task: user representation and scores."""

    def __init__(self, model: NextItNet, task: int):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, length) → user representations (B, C), scores (B, targets), which are -inf for `<UNK>`."""
        if self.task > 1:
            ids = F.pad(ids, (0, 1))  # the separator (id 0), which precedes the target
        user = self.model.user_representation(ids, Stage(self.task, "inference"))
        scores = self.model.head(self.task)(user)
        return user, torch.cat([torch.full_like(scores[:, :1], -torch.inf), scores[:, 1:]], dim=1)


@torch.no_grad()
def program_of(model: NextItNet, task: int, length: int) -> torch.export.ExportedProgram:
    """A program for ids (rows, length), with any number of rows."""
    example = torch.zeros(2, length, dtype=torch.int64)
    return torch.export.export(Program(model, task), (example,), dynamic_shapes=({0: torch.export.Dim("rows")},))


def write_program(path: str, content: dict[str, Any]) -> None:
    exported = program_of(build_model(content), content["task"], content["length"])
    tokens = {f"{name}.txt": content[name].numpy().tobytes().decode() for name in ("items", "targets")}
    with whole_file(path) as output, torch_writing():
        torch.export.save(exported, output, extra_files=tokens)
    print(f"wrote {path} ({os.path.getsize(path) / 1e6:.2f} MB, float32), for rows of length {content['length']}")


def main(hp: Hyperparameters) -> None:
    output = hp.output or path_of(hp.checkpoint_dir, hp.task)
    check_output(output, hp.overwrite, own=is_of_task(output, hp.task))
    if hp.program and not hp.program.endswith(".pt2"):
        raise InputError(f"--program {hp.program}: the name must end with .pt2")
    if os.path.realpath(hp.program) == os.path.realpath(output):
        raise InputError(f"--program and --output are both {hp.program}: give another name for one")
    check_output(hp.program, hp.overwrite)
    path = hp.checkpoint or checkpoint.newest(hp.checkpoint_dir)
    for flag, written in (("output", output), ("program", hp.program)):
        if os.path.realpath(path) == os.path.realpath(written):
            raise InputError(f"--{flag} {written} is the checkpoint to export from: give another name")
    content, _ = checkpoint.load(path)
    if hp.task not in content["tasks"]:
        raise InputError(f"{path} has learned tasks 1 to {max(content['tasks'])}, not {hp.task}: give one of them")
    checkpoint.build_model(content)  # InputError if the checkpoint holds another network than the scripts train
    print(f"checkpoint: {path}")
    served = extract(content, hp.task, getattr(torch, hp.dtype))
    save_sealed(output, served)
    before, after = (os.path.getsize(each) / 1e6 for each in (path, output))
    print(f"wrote {output} ({after:.2f} MB; the checkpoint has {before:.2f})")
    if hp.program:
        write_program(hp.program, served)
    print(f"next: python -m tools.recommend --task {hp.task} --serving {output} --data_path FILE")


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
