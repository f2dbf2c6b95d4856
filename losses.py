"""The losses of task 1 and of the tasks after it, each a callable that draws its own negatives."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_loader import LogUniformSampler, TargetSampler
from nextitnet import NextItNet
from pruning import Reading


def rows(weight: Tensor, ids: Tensor) -> Tensor:
    """weight[ids], whose gradient is the same bits each time: that of an index sums equal ids in any order."""
    return F.embedding(ids, weight)


def entries(bias: Tensor, ids: Tensor) -> Tensor:
    """bias[ids], in the same way."""
    return rows(bias[:, None], ids).squeeze(1)


def sampled_softmax(
    hidden: Tensor, labels: Tensor, head: nn.Linear, negatives: Tensor, label_counts: Tensor, negative_counts: Tensor
) -> Tensor:
    """Loss (N,) of `labels` (N,) given `hidden` (N, C) against `negatives` (S,), which all rows share.

    From every logit goes the log of the count expected in the sample (`label_counts` (N,), `negative_counts` (S,));
    negatives that equal the label are left out. As tf.nn.sampled_softmax_loss.
    """
    own = (hidden * rows(head.weight, labels)).sum(dim=1) + entries(head.bias, labels) - label_counts.log()  # (N,)
    bias = entries(head.bias, negatives) - negative_counts.log()  # (S,)
    others = F.linear(hidden, rows(head.weight, negatives), bias)  # (N, S)
    others = others.masked_fill(negatives == labels[:, None], -torch.inf)
    return torch.cat([own[:, None], others], dim=1).logsumexp(dim=1) - own


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """-log sigmoid(positive - negative), elementwise: Bayesian personalised ranking."""
    return F.softplus(negative - positive)


def bce(positive: Tensor, negative: Tensor) -> Tensor:
    """-log sigmoid(positive) - log(1 - sigmoid(negative)), elementwise."""
    return F.softplus(-positive) + F.softplus(negative)


class NextItemLoss:
    """Task 1: the next item at every position, by sampled softmax, or full softmax if the sample is to be all items."""

    def __init__(self, sampler: LogUniformSampler, ignored_label: int | None):
        """Positions whose next item is `ignored_label` do not count; None: all count, as in the original."""
        self.sampler, self.ignored_label = sampler, ignored_label

    def __call__(
        self, model: NextItNet, reading: Reading, inputs: Tensor, targets: Tensor, generator: torch.Generator
    ) -> Tensor:
        hidden = model(inputs, reading).flatten(0, 1)  # (N, C), N = B * T
        labels = torch.cat([inputs[:, 1:], targets[:, None]], dim=1).flatten()  # (N,)
        if self.ignored_label is not None:
            counted = labels != self.ignored_label
            hidden, labels = hidden[counted], labels[counted]
        head = model.head(1)
        if self.sampler.count == self.sampler.items:
            losses = F.cross_entropy(head(hidden), labels, reduction="none")
        else:
            negatives, draws = self.sampler.draw(generator)
            negatives = negatives.to(labels.device)
            counts = [self.sampler.expected_count(ids, draws) for ids in (labels, negatives)]
            losses = sampled_softmax(hidden, labels, head, negatives, *counts)
        return losses.sum() / max(len(losses), 1)


class PairLoss:
    """Tasks 2+: the target against one sampled negative, by `bpr` or `bce`, plus l2 * |head|^2 / 2."""

    def __init__(self, compare: Callable[[Tensor, Tensor], Tensor], sampler: TargetSampler, l2: float):
        self.compare, self.sampler, self.l2 = compare, sampler, l2

    def __call__(
        self, model: NextItNet, reading: Reading, inputs: Tensor, targets: Tensor, generator: torch.Generator
    ) -> Tensor:
        user = model.user_representation(inputs, reading)  # (B, C)
        head = model.head(reading.task).weight
        negatives = self.sampler.draw(targets, generator)
        positive, negative = ((user * rows(head, ids)).sum(dim=1) for ids in (targets, negatives))  # (B,)
        return self.compare(positive, negative).mean() + self.l2 * head.square().sum() / 2


Loss = NextItemLoss | PairLoss
