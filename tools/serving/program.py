"""One task as a torch.export program, which runs without this repository."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextitnet import NextItNet
from pruning import Stage


class Program(nn.Module):
    """The model's own forward pass for one task, with the scores of its head."""

    def __init__(self, model: NextItNet, task: int):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, length) → user representations (B, C), scores (B, targets), which are -inf for `<UNK>`."""
        if self.task > 1:
            ids = F.pad(ids, (0, 1))  # the separator, where the target would come
        user = self.model.user_representation(ids, Stage(self.task, "inference"))
        scores = self.model.head(self.task)(user)
        return user, torch.cat([torch.full_like(scores[:, :1], -torch.inf), scores[:, 1:]], dim=1)


@torch.no_grad()
def program_of(model: NextItNet, task: int, length: int) -> torch.export.ExportedProgram:
    """Takes ids (rows, length) of any number of rows."""
    example = torch.zeros(2, length, dtype=torch.int64)
    return torch.export.export(Program(model, task), (example,), dynamic_shapes=({0: torch.export.Dim("rows")},))
