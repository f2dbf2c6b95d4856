"""The model that a stage starts to train."""

from conure import checkpoint, heads
from conure.errors import InputError
from conure.stage_files import StageFiles

import torch

import pruning
from nextitnet import NextItNet


def initial_model(files: StageFiles, device: torch.device) -> tuple[NextItNet, bool]:
    """The model as the stage before left it, with a new head in tp; a new one for the first stage.

    With whether its head starts as task 1's. InputError if no weight is left to train.
    """
    hp, data, (task, mode) = files.hp, files.data, files.stage
    if files.before is None:
        positions = data.rows.shape[1] if hp.positional_embedding else 0
        model = files.network(len(data.items), hp.channels, hp.dilations, hp.kernel_size, positions)
    else:
        model = checkpoint.build_model(files.before, files.network)
    if mode == "tp" and task > 1:
        check_capacity(model, task, files.prune_ratios())
        model.add_head(task, len(data.target_vocabulary))
    model.to(device)
    model.dropout.p = hp.dropout
    if mode == "ret":
        informed = files.tasks[task]["informed"]
    else:
        informed = task > 1 and hp.informed_head and heads.inform(model, data, files.stage, device)
    if informed:
        heads.anchor(model, data, task)
    return model, informed


def check_capacity(model: NextItNet, task: int, ratios: list[float]) -> None:
    """Prints how many weights are free for the task, and how many it will keep; InputError if a layer has none.

    `ratios` are the prune ratios of tasks 1 to it.
    """
    free, kept = zip(*(pruning.budget(layer, ratios) for layer in pruning.owned_weights(model)))
    total = sum(layer.owner.numel() for layer in pruning.owned_weights(model))
    if not all(free):
        raise InputError(
            f"no free weights are left for task {task}: {free.count(0)} of {len(free)} conv layers belong to tasks "
            f"1 to {task - 1} entirely, and of {total:,} weights {sum(free):,} are free; begin again at task 1 in "
            f"another --checkpoint_dir, with --prune_ratio {1 - 1 / task:.2f} or higher, which leaves room for {task} "
            "tasks, or more channels"
        )
    share = sum(free) / total
    print(f"capacity: {sum(free):,} of {total:,} conv weights are free ({share:.2%}); it will keep {sum(kept):,}")
