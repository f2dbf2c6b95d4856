"""Write a serving file: one task, with the weights that it reads and nothing of the other tasks.

READS  the newest checkpoint in checkpoint_dir, or the one named; the task may be any that it has learned
WRITES output, for tools.represent and tools.recommend; with --program also the task as a torch.export program, which
       runs without this repository:
           lists = {"items.txt": "", "targets.txt": ""}
           program = torch.export.load("task.pt2", extra_files=lists).module()
           users, scores = program(ids)     ids (B, length) int64 → (B, channels), (B, targets) float32
       A token's id is its line number in the list, from 0. Pad rows on the left to `length`, which is printed, with
       the id of the token `0`; in task 1 that padding token has a score too. Unknown tokens have id 0, whose score is
       -inf.
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

from tools.serving import file
from tools.serving.program import program_of


@dataclass
class Hyperparameters:
    task: Task = 1  # the task to serve
    checkpoint_dir: str = "checkpoints"  # where the scripts wrote their checkpoints
    checkpoint: str = ""  # a checkpoint file; empty: the newest in checkpoint_dir
    output: str = ""  # the serving file; empty: serving_tK.pt in checkpoint_dir, K being the task
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the weights in the file; 16 bits halve its size
    program: str = ""  # a .pt2 file for the torch.export program; empty: none is written
    overwrite: bool = False  # replace existing files; a serving file of the same task is replaced without it


def write_program(path: str, content: dict[str, Any]) -> None:
    exported = program_of(file.build_model(content), content["task"], content["length"])
    tokens = {f"{name}.txt": content[name].numpy().tobytes().decode() for name in ("items", "targets")}
    with whole_file(path) as output, torch_writing():
        torch.export.save(exported, output, extra_files=tokens)
    print(f"wrote {path} ({os.path.getsize(path) / 1e6:.2f} MB, float32), for rows of length {content['length']}")


def main(hp: Hyperparameters) -> None:
    output = hp.output or file.path_of(hp.checkpoint_dir, hp.task)
    check_output(output, hp.overwrite, own=file.is_of_task(output, hp.task))
    if hp.program and not hp.program.endswith(".pt2"):
        raise InputError(f"--program {hp.program}: the name must end with .pt2")
    check_output(hp.program, hp.overwrite)
    path = hp.checkpoint or checkpoint.newest(hp.checkpoint_dir)
    if os.path.realpath(path) == os.path.realpath(output):
        raise InputError(f"--output {output} is the checkpoint that is read: give another name")
    content, _ = checkpoint.load(path)
    if hp.task not in content["tasks"]:
        raise InputError(f"{path} has learned tasks 1 to {max(content['tasks'])}: task {hp.task} is not among them")
    print(f"checkpoint: {path}")
    served = file.extract(content, hp.task, getattr(torch, hp.dtype))
    save_sealed(output, served)
    before, after = (os.path.getsize(each) / 1e6 for each in (path, output))
    print(f"wrote {output} ({after:.2f} MB; the checkpoint has {before:.2f})")
    if hp.program:
        write_program(hp.program, served)
    print(f"next: python -m tools.recommend --task {hp.task} --serving {output} --data_path FILE")


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
