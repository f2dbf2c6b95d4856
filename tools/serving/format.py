"""The serving file: one task of a model, with the weights that it reads and nothing else.

    format         version of this layout
    task, metric, leave_out   the task, how it is evaluated, and which targets its ranks leave out
    architecture   arguments of NextItNet
    length         items in a row: shorter rows are padded on the left, longer ones lose their oldest items
    weights        embedding, its updates by tasks 2 to this one, position embedding, layer norms, the task's
                   readout, and its head unless that is tied to the embedding
    conv           per conv layer: shape, mask of the weights that the task reads (one bit each), and these weights
    items, targets vocabularies, each as one uint8 tensor

Like checkpoints, it is written atomically and sealed with a digest. Weights may be stored in 16 bits; computation is in
float32.
"""

import os
from typing import Any

from conure import checkpoint
from conure.errors import InputError
from conure.files import load_sealed
from conure.line_reader import missing

import numpy as np
import torch

import pruning
from nextitnet import NextItNet

FORMAT = 5


def path_of(folder: str, task: int) -> str:
    return os.path.join(folder, f"serving_t{task}.pt")


def extract(content: dict[str, Any], task: int, dtype: torch.dtype) -> dict[str, Any]:
    """The content of a serving file, from that of a checkpoint; later tasks do not change it."""
    record, state = content["tasks"][task], dict(content["model"])
    stage, conv = checkpoint.stage_of_state(task, record["state"]), {}
    for name in [name.removesuffix(".owner") for name in state if name.endswith(".owner")]:
        readable, _ = pruning.used_and_trained(state.pop(f"{name}.owner"), stage)
        weight = state.pop(f"{name}.weight")
        bits = torch.from_numpy(np.packbits(readable.numpy()))
        conv[name] = {"shape": list(weight.shape), "readable": bits, "weights": weight[readable].to(dtype)}
    unread = [f"{group}.{other}." for other in content["tasks"] if other != task for group in ("heads", "readouts")]
    unread += [f"updates.{later}." for later in content["tasks"] if later > task]
    unread += ["heads.1.weight"] * content["architecture"]["tied"]
    return {
        "format": FORMAT,
        "task": task,
        "metric": record["protocol"]["metric"],
        "leave_out": record["protocol"]["leave_out"],
        "architecture": content["architecture"],
        "length": record["length"],
        "weights": {name: value.to(dtype) for name, value in state.items() if not name.startswith(tuple(unread))},
        "conv": conv,
        "items": content["items"],
        "targets": record["targets"],
    }


def content_of(path: str) -> dict[str, Any] | None:
    """The content of a serving file of any task and format; None if `path` is missing, damaged or another file."""
    content, _ = load_sealed(path)
    return content if content and "conv" in content else None


def is_of_task(path: str, task: int) -> bool:
    """Whether `path` is an undamaged serving file of `task`."""
    return (content_of(path) or {}).get("task") == task


def load(path: str, task: int) -> dict[str, Any]:
    """The serving file of `task`; InputError if it is missing, damaged, or of another task."""
    export = f"python -m tools.export --task {task}"
    content = content_of(path)
    if content is None:  # `path` may be a checkpoint, so the message must not propose to write there
        wrong = f"{path} is damaged, or no serving file" if os.path.exists(path) else missing(path)
        raise InputError(f"{wrong}: name one with --serving, or make one with `{export}`")
    if content["task"] != task:
        raise InputError(f"{path} serves task {content['task']}: give --task {content['task']}, or another --serving")
    if content["format"] != FORMAT:
        again = f"run `{export} --output {path}`"
        raise InputError(f"{path} has format {content['format']}, this version reads {FORMAT}: {again}")
    return content


def build_model(content: dict[str, Any]) -> NextItNet:
    """The model with this task's head alone; weights that the task does not read are free and zero."""
    task, state = content["task"], {name: value.float() for name, value in content["weights"].items()}
    for name, layer in content["conv"].items():
        size = int(np.prod(layer["shape"]))
        readable = torch.from_numpy(np.unpackbits(layer["readable"].numpy(), count=size)).bool()
        weight = torch.zeros(size)
        weight[readable] = layer["weights"].float()
        state[f"{name}.weight"] = weight.view(layer["shape"])
        state[f"{name}.owner"] = (readable * task).to(torch.uint8).view(layer["shape"])
    tied = task == 1 and content["architecture"]["tied"]
    if tied:
        state["heads.1.weight"] = state["embedding.weight"]
    with torch.device("meta"):  # no memory, no random initialisation
        model = NextItNet(**content["architecture"])
        if task > 1:
            del model.heads["1"]
            head = f"heads.{task}."
            model.add_head(task, len(state[f"{head}weight"]), bias=f"{head}bias" in state)
        for earlier in range(2, task + 1):
            model.add_stored(earlier, state)
    model.load_state_dict(state, assign=True)
    if tied:  # two parameters would take memory twice on a GPU
        model.head(1).weight = model.embedding.weight
    return model.eval()
