"""The losses of task 1 and of the tasks after it, each a callable that draws its own negatives, if it takes any.

Batches come on the CPU, where negatives and labels are made ready without waiting for the device.
"""

from collections.abc import Callable
from typing import Any

from conure import processes, samplers
from conure.matmul import matmul_dtype, pieces, product
from conure.processes import Shard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_loader import TaskData
from nextitnet import NextItNet
from pruning import Stage

LOGITS_AT_ONCE = 1 << 26  # 256 MB whatever the number of negatives, and half as much again for bfloat16 products
ROWS = 64  # the number of rows is rounded up to a multiple, as oneDNN compiles and keeps a kernel for each shape
ENCODED_ROWS = 8  # likewise, of the distinct rows in a batch
EXCLUDED = -1e30  # a logit that counts for nothing; finite, as a piece may hold no other
ALONE = Shard()  # of a batch: all of it


def rows(weight: Tensor, ids: Tensor) -> Tensor:
    """weight[ids] with a deterministic gradient; plain indexing sums repeated ids in no fixed order."""
    return F.embedding(ids, weight)


def entries(bias: Tensor, ids: Tensor) -> Tensor:
    """bias[ids], likewise."""
    return rows(bias[:, None], ids).squeeze(-1)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, without waiting for what the device has still to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class LogSumExp(torch.autograd.Function):
    """`LogSumExp.apply(hidden, counts, own, weight, bias, hits, dtype)`: the sum of counts[i] * logsumexp of row i.

    Row i is the logit `own[i]` and hidden[i] @ weight.T + bias without column `hits[i]`, if that is not -1: so the
    logit of a label is known better than products in bfloat16 tell, and its gradient vanishes where the model is sure.
    hidden (N, C), counts (N,), own (N,), weight (S, C), bias (S,), hits (N,) int64; products in `dtype`, all else in
    float32. Gradients are made in the same pass, so that never more than `LOGITS_AT_ONCE` logits exist, and none is
    computed twice.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        counts: Tensor,
        own: Tensor,
        weight: Tensor,
        bias: Tensor,
        hits: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        n, size = len(hidden), len(weight)
        hidden = F.pad(hidden, (0, 0, 0, -n % ROWS))
        counts, own, hits = (F.pad(each, (0, -n % ROWS)) for each in (counts, own, hits))  # added rows count nothing
        hidden_gradient, own_gradient = torch.empty_like(hidden), torch.empty_like(own)
        # Transposed, (C, S): oneDNN takes half the time for a product whose shorter side comes first.
        weight_gradient, bias_gradient = hidden.new_zeros(hidden.shape[1], size), torch.zeros_like(bias)
        total, weight = hidden.new_zeros(()), weight.to(dtype)
        at_once = max(1, LOGITS_AT_ONCE // size)
        for start in range(0, len(hidden), at_once):
            block = slice(start, start + at_once)
            inputs = hidden[block].to(dtype)
            parts = [softmax_of(inputs, weight, bias, hits[block], columns) for columns in pieces(hidden, size)]
            log_sums = torch.stack([own[block], *(log_sum for _, log_sum in parts)], dim=1)
            log_sum = log_sums.logsumexp(dim=1)
            total += (counts[block] * log_sum).sum()
            # What each has of the softmax over all, times the count.
            own_gradient[block], *shares = ((log_sums - log_sum[:, None]).exp() * counts[block, None]).unbind(dim=1)
            hidden_gradient[block] = 0.0
            for columns, (within, _), share in zip(pieces(hidden, size), parts, shares):
                scaled = (hidden[block] * share[:, None]).to(dtype)
                bias_gradient[columns] += share.to(dtype) @ within
                hidden_gradient[block] += product(within, weight[columns].t()) * share[:, None]
                weight_gradient[:, columns] += product(scaled.t(), within.t())
        ctx.save_for_backward(hidden_gradient[:n], own_gradient[:n], weight_gradient.t(), bias_gradient)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        hidden, own, weight, bias = (each.mul_(gradient) for each in ctx.saved_tensors)
        return hidden, None, own, weight, bias, None, None


def softmax_of(inputs: Tensor, weight: Tensor, bias: Tensor, hits: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """The softmax over some columns of inputs @ weight.T + bias, in the dtype of `inputs`, and its log sums (N,)."""
    logits = product(inputs, weight[columns]) + bias[columns]
    hits = (hits - columns.start)[:, None]
    nearest = hits.clamp(0, logits.shape[1] - 1)
    logits.scatter_(1, nearest, torch.where(hits == nearest, EXCLUDED, logits.gather(1, nearest)))
    highest = logits.amax(dim=1)
    within = torch.softmax(logits, dim=1, out=logits)
    return within.to(inputs.dtype), highest - within.amax(dim=1).log()  # the highest logit's probability is 1 / sum


def sampled_softmax(
    hidden: Tensor, labels: Tensor, head: nn.Linear, negatives: Tensor, label_counts: Tensor, negative_counts: Tensor
) -> Tensor:
    """The summed loss of `labels` (N,) given `hidden` (N, C) against `negatives` (S,), which all rows share.

    From every logit goes the log of the count expected in the sample (`label_counts` (N,), `negative_counts` (S,));
    negatives that equal the label are left out. As tf.nn.sampled_softmax_loss.
    """
    ids = torch.cat([labels, negatives])
    biases = entries(head.bias, ids) - torch.cat([label_counts, negative_counts]).log()
    sizes = [len(labels), len(negatives)]
    (label_weight, weight), (label_bias, bias) = rows(head.weight, ids).split(sizes), biases.split(sizes)
    own = (hidden * label_weight).sum(dim=1) + label_bias
    places = torch.full((len(head.weight),), -1, device=ids.device)
    places[negatives] = torch.arange(len(negatives), device=ids.device)
    counts = torch.ones_like(own)
    return LogSumExp.apply(hidden, counts, own, weight, bias, places[labels], matmul_dtype(hidden)) - own.sum()


def full_softmax(hidden: Tensor, row_of: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The summed cross entropy of `labels` (N,) among all rows of `weight` (n, C), `bias` (n,).

    Label i belongs to hidden[row_of[i]], of `hidden` (R, C); `row_of` (N,) comes on the CPU. In the blocks of
    LogSumExp, which on 2 cores take 0.61 s for 1,568 rows and 33,080 items; F.linear_cross_entropy takes 0.70 s with
    all logits in memory and 2.5 s in chunks.
    """
    if bias is None:
        bias = weight.new_zeros(len(weight))
    counts = row_of.bincount(minlength=len(hidden))
    first = row_of.argsort(stable=True)[(counts.cumsum(0) - counts).clamp(max=len(row_of) - 1)]  # label of each row
    counts, first, row_of = (to_device(each, hidden.device) for each in (counts.float(), first, row_of))
    logits = (rows(hidden, row_of) * rows(weight, labels)).sum(dim=1) + entries(bias, labels)
    own, hits = entries(logits, first), labels[first]
    return LogSumExp.apply(hidden, counts, own, weight, bias, hits, matmul_dtype(hidden)) - logits.sum()


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """-log sigmoid(positive - negative), elementwise: Bayesian personalised ranking."""
    return F.softplus(negative - positive)


def bce(positive: Tensor, negative: Tensor) -> Tensor:
    """-log sigmoid(positive) - log(1 - sigmoid(negative)), elementwise."""
    return F.softplus(-positive) + F.softplus(negative)


class NextItemLoss:
    """Task 1: the next item at every position, by sampled softmax, or full softmax if the sample is to be all items."""

    def __init__(self, sampler: samplers.LogUniformSampler, ignored_label: int | None):
        """Positions whose next item is `ignored_label` do not count; None: all count, as in the original."""
        self.sampler, self.ignored_label = sampler, ignored_label

    def __call__(
        self,
        model: NextItNet,
        stage: Stage,
        inputs: Tensor,
        targets: Tensor,
        generator: torch.Generator,
        shard: Shard = ALONE,
    ) -> Tensor:
        """The mean over the batch (`inputs` (B, T), `targets` (B,)), or this process's share of that sum."""
        device = model.head(1).weight.device
        labels = torch.cat([inputs[:, 1:], targets[:, None]], dim=1)  # (B, T)
        counted = labels != self.ignored_label if self.ignored_label is not None else torch.ones_like(labels) > 0
        total = max(int(counted.sum()), 1)
        sampled = self.sampler.count < self.sampler.items
        negatives, draws = self.sampler.draw(generator) if sampled else (None, 0)
        inputs, labels, counted = (shard.of(tensor) for tensor in (inputs, labels, counted))
        hidden = model(to_device(inputs, device), stage).transpose(0, 1).flatten(0, 1)  # (T * B, C)
        labels, counted = labels.t().flatten(), counted.t().flatten()
        if not counted.all():
            places = counted.nonzero().squeeze(1)
            hidden, labels = rows(hidden, to_device(places, device)), labels[places]
        if sampled:
            counts = [self.sampler.expected_count(ids, draws) for ids in (labels, negatives)]
            labels, negatives, *counts = (to_device(tensor, device) for tensor in (labels, negatives, *counts))
            return sampled_softmax(hidden, labels, model.head(1), negatives, *counts) / total
        head, row_of = model.head(1), torch.arange(len(labels))
        return full_softmax(hidden, row_of, to_device(labels, device), head.weight, head.bias) / total


class TargetLoss:
    """Tasks 2+: cross entropy of the target among all, `<UNK>` left out as it is in scores, plus l2 * |head|^2 / 2.

    A head that the model has an anchor for is held near that instead of 0 (L2-SP: Li et al., ICML 2018).
    """

    def __init__(self, l2: float):
        self.l2 = l2

    def __call__(
        self,
        model: NextItNet,
        stage: Stage,
        inputs: Tensor,
        targets: Tensor,
        generator: torch.Generator,
        shard: Shard = ALONE,
    ) -> Tensor:
        """The mean over the batch (`inputs` (B, T), `targets` (B,)) plus the penalty, or this process's share of it."""
        head, ids = model.head(stage.task), self.ids(targets, generator)
        inputs, row_of = shard.of(inputs).unique(dim=0, return_inverse=True)  # each row is encoded once
        inputs = F.pad(inputs, (0, 0, 0, -len(inputs) % ENCODED_ROWS))
        inputs, ids = (to_device(tensor, head.weight.device) for tensor in (inputs, shard.of(ids)))
        users = model.user_representation(inputs, stage)  # (R, C)
        return self.summed(users, row_of, ids, head) / len(targets) + self.penalty(model, stage.task) / shard.count

    def penalty(self, model: NextItNet, task: int) -> Tensor:
        weight = model.head(task).weight
        if task in model.anchors:
            weight = weight - model.anchors[task]
        return self.l2 * weight.square().sum() / 2

    def ids(self, targets: Tensor, generator: torch.Generator) -> Tensor:
        """What each example is scored with; first dimension B."""
        return targets

    def summed(self, users: Tensor, row_of: Tensor, ids: Tensor, head: nn.Linear) -> Tensor:
        """The loss of all examples, of which example i is of users[row_of[i]]; `users` (R, C), `row_of` on the CPU."""
        return full_softmax(users, row_of, ids - 1, head.weight[1:], None if head.bias is None else head.bias[1:])


class PairLoss(TargetLoss):
    """The target against one sampled negative, by `bpr` or `bce`, in place of the cross entropy."""

    def __init__(self, compare: Callable[[Tensor, Tensor], Tensor], sampler: samplers.TargetSampler, l2: float):
        super().__init__(l2)
        self.compare, self.sampler = compare, sampler

    def ids(self, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Target and negative, (B, 2)."""
        return torch.stack([targets, self.sampler.draw(targets, generator)], dim=1)

    def summed(self, users: Tensor, row_of: Tensor, ids: Tensor, head: nn.Linear) -> Tensor:
        own = rows(users, to_device(row_of, users.device))
        scores = (rows(head.weight, ids) * own[:, None]).sum(dim=2)  # (B, 2)
        if head.bias is not None:
            scores = scores + entries(head.bias, ids)
        return self.compare(*scores.unbind(1)).sum()


Loss = NextItemLoss | TargetLoss


def next_item(hp: Any, data: TaskData) -> NextItemLoss:
    """The loss that the hyperparameters of a task 1 script ask for."""
    negatives = samplers.LogUniformSampler(len(data.items), hp.negative_fraction)
    return NextItemLoss(negatives, None if hp.padding_in_loss else data.padding_id)


def target(hp: Any, data: TaskData) -> TargetLoss:
    """The loss that the hyperparameters of a later task's script ask for: negatives by `rho`, or without it uniform."""
    if hp.loss == "softmax":
        return TargetLoss(hp.l2)
    size = len(data.target_vocabulary)
    if hasattr(hp, "rho"):
        probabilities = samplers.static_probabilities(data.targets, size, hp.rho)
    else:
        probabilities = samplers.uniform_probabilities(size)
    return PairLoss({"bpr": bpr, "bce": bce}[hp.loss], samplers.TargetSampler(probabilities), hp.l2)


class Objective:
    """A process's share of the loss of a batch: all shares, and their gradients, add up to the batch's."""

    def __init__(self, loss: Loss, model: nn.Module, stage: Stage, generator: torch.Generator, precision: torch.dtype):
        """`generator` draws the negatives, the same ones in all processes."""
        self.loss, self.model, self.stage, self.generator = loss, model, stage, generator
        self.precision = precision

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """`inputs` (B, T) and `targets` (B,) of the whole batch, on the CPU."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            return self.loss(self.model, self.stage, inputs, targets, self.generator, processes.own_shard())
