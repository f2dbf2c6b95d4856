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
from collections import Counter
from dataclasses import dataclass
from typing import Any

from conure import checkpoint, launch
from conure.errors import InputError
from conure.files import save_sealed, torch_writing, whole_file

import torch

from tools import check_output
from tools.serving import file
from tools.serving.program import program_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Hyperparameters:
    task: int = 1  # the task to serve
    checkpoint_dir: str = "checkpoints"  # where the scripts wrote their checkpoints
    checkpoint: str = ""  # a checkpoint file; empty: the newest in checkpoint_dir
    output: str = ""  # the serving file; empty: serving_tK.pt in checkpoint_dir, K being the task
    dtype: str = "float32"  # of the weights in the file: float32, or float16 or bfloat16 for half its size
    program: str = ""  # a .pt2 file for the torch.export program; empty: none is written
    overwrite: bool = False  # replace what stands there and is no serving file of the task


def write_program(path: str, content: dict[str, Any]) -> None:
    exported = program_of(file.build_model(content), content["task"], content["length"])
    tokens = {f"{name}.txt": content[name].numpy().tobytes().decode() for name in ("items", "targets")}
    with whole_file(path) as output, torch_writing():
        torch.export.save(exported, output, extra_files=tokens)
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


def sizes(content: dict[str, Any], task: int) -> Counter[str]:
    """Bytes by what they are for, of a checkpoint's or a serving file's tensors."""
    tensors = dict(content["model"] if "model" in content else content["weights"])
    for name, layer in content.get("conv", {}).items():
        tensors |= {f"{name}.weight": layer["weights"], f"{name}.readable": layer["readable"]}
    found = Counter()
    for name, tensor in tensors.items():
        found[kind_of(name, task)] += tensor.nbytes
    lists = [record["targets"] for record in content["tasks"].values()] if "tasks" in content else [content["targets"]]
    found["vocabularies"] = sum(tensor.nbytes for tensor in (content["items"], *lists))
    return found


def print_sizes(before: Counter[str], after: Counter[str]) -> None:
    print(f"{'megabytes':34}{'checkpoint':>12}{'serving':>12}")
    for name in before:
        print(f"{name:34}{before[name] / 1e6:12.3f}{after[name] / 1e6:12.3f}")
    print(f"{'all of it':34}{before.total() / 1e6:12.3f}{after.total() / 1e6:12.3f}")


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
    served = file.extract(content, hp.task, DTYPES[hp.dtype])
    save_sealed(output, served)
    print_sizes(sizes(content, hp.task), sizes(served, hp.task))
    before, after = (os.path.getsize(each) / 1e6 for each in (path, output))
    print(f"wrote {output} ({after:.2f} MB; the checkpoint has {before:.2f})")
    if hp.program:
        write_program(hp.program, served)
    print(f"next: python -m tools.recommend --task {hp.task} --serving {output} --data_path FILE")


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
