"""The losses of task 1 and of later tasks. Each is a callable that samples its own negatives, if it needs any.

Batches are on the CPU, so that their sizes are known without waiting for a GPU. Negatives are drawn on the generator's
device.
"""

from collections.abc import Callable
from typing import Annotated, Any

from conure import processes, ranking, samplers
from conure.matmul import matmul_dtype, pieces, product
from conure.processes import Shard
from conure.settings import OneOf

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_loader import Batch, TaskData
from nextitnet import NextItNet
from pruning import Stage

# For any number of negatives 256 MB, on a GPU 1 GB, and half as much again for bfloat16 products.
LOGITS_AT_ONCE = {"cpu": 1 << 26, "cuda": 1 << 28}
ROWS = 64  # the number of rows is padded to a multiple, as oneDNN compiles and caches a kernel per shape
ENCODED_ROWS = 8  # likewise the number of distinct rows in a batch
COLUMNS = {"cpu": 1, "cuda": 8}  # the number of columns likewise; a GPU takes three times as long for others
EXCLUDED = -1e30  # logit of an excluded column; finite, as a piece may have no other column
ALONE = Shard()  # the whole batch


def rows(weight: Tensor, ids: Tensor) -> Tensor:
    """weight[ids] with a deterministic gradient; that of plain indexing sums repeated ids in no fixed order."""
    return F.embedding(ids, weight)


def entries(bias: Tensor, ids: Tensor) -> Tensor:
    """bias[ids] with a deterministic gradient."""
    return rows(bias[:, None], ids).squeeze(-1)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies the tensor to `device` without waiting for pending work there."""
    return tensor if tensor.device == device else tensor.pin_memory().to(device, non_blocking=True)


def part(batch: Batch, shard: Shard) -> tuple[Batch, slice]:
    """A process's share of the rows with their examples, and the slice of the batch's examples that these are."""
    numbers = shard.of(torch.arange(len(batch.rows))).tolist()
    start = numbers[0] if numbers else 0
    own = slice(start, start + len(numbers))
    examples = slice(*torch.searchsorted(batch.row_of, torch.tensor([own.start, own.stop])).tolist())
    row_of = batch.row_of[examples] - start
    return Batch(batch.rows[own], batch.inputs[own], row_of, batch.targets[examples]), examples


class LogSumExp(torch.autograd.Function):
    """`LogSumExp.apply(hidden, own, row_of, weight, bias, hits, dtype)`: the sum over labels of a logsumexp.

    The logsumexp of label i is over its own logit, own[i], and the logits of its row r = row_of[i],
    hidden[r] @ weight.T + bias, except columns hits[r] (-1: none). The label's own logit comes apart, in float32, so
    that its gradient vanishes where the model is certain, also with products in bfloat16. hidden (R, C), own (N,),
    weight (S, C), bias (S,), hits (R, M) int64; row_of (N,) int64, ascending, on the CPU. Products are in `dtype`, all
    else in float32. Gradients are computed in the forward pass, so that at most `LOGITS_AT_ONCE` logits exist, each
    computed once.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        own: Tensor,
        row_of: Tensor,
        weight: Tensor,
        bias: Tensor,
        hits: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        n, size, kind, weight = len(hidden), len(weight), hidden.device.type, weight.to(dtype)
        if padding := -size % COLUMNS[kind]:
            weight, bias = F.pad(weight, (0, 0, 0, padding)), F.pad(bias, (0, padding), value=EXCLUDED)
        hidden, hits = F.pad(hidden, (0, 0, 0, -n % ROWS)), F.pad(hits, (0, 0, 0, -n % ROWS), value=-1)
        labels = row_of.bincount(minlength=len(hidden))  # of each row
        first = [0, *labels.cumsum(0).tolist()]
        labels, row_of = (to_device(each, hidden.device) for each in (labels, row_of))
        hidden_gradient, own_gradient = torch.empty_like(hidden), torch.empty_like(own)
        # Transposed, (C, S), as oneDNN is twice as fast for a product whose shorter side comes first.
        weight_gradient, bias_gradient = hidden.new_zeros(hidden.shape[1], len(weight)), torch.zeros_like(bias)
        total, at_once = hidden.new_zeros(()), max(1, LOGITS_AT_ONCE[kind] // len(weight))
        slices = pieces(hidden, len(weight))
        for start in range(0, len(hidden), at_once):
            block = slice(start, min(start + at_once, len(hidden)))
            inputs, of_block = hidden[block].to(dtype), slice(first[block.start], first[block.stop])
            parts = [softmax_of(inputs, weight, bias, hits[block], columns) for columns in slices]
            log_sums = torch.stack([log_sum for _, log_sum in parts], dim=1)
            others = log_sums.logsumexp(dim=1)
            of_label = others[row_of[of_block] - start]
            log_sum = torch.logaddexp(of_label, own[of_block])
            total += log_sum.sum()
            own_gradient[of_block] = (own[of_block] - log_sum).exp()
            # The probability of all other columns, summed over the labels of a row.
            share, lengths = (of_label - log_sum).exp(), labels[block]
            # unsafe=True, as a check of the lengths would wait for the GPU.
            others_share = torch.segment_reduce(share, "sum", lengths=lengths, initial=0, unsafe=True)
            shares = (others_share[:, None] * (log_sums - others[:, None]).exp()).unbind(dim=1)
            hidden_gradient[block] = 0
            for columns, (within, _), share in zip(slices, parts, shares):
                scaled = inputs * share[:, None].to(dtype)
                bias_gradient[columns] += share.to(dtype) @ within
                hidden_gradient[block] += product(within, weight[columns].t()) * share[:, None]
                weight_gradient[:, columns] += product(scaled.t(), within.t())
        ctx.save_for_backward(hidden_gradient[:n], own_gradient, weight_gradient[:, :size].t(), bias_gradient[:size])
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        hidden, own, weight, bias = (each.mul_(gradient) for each in ctx.saved_tensors)
        return hidden, own, None, weight, bias, None, None


def softmax_of(inputs: Tensor, weight: Tensor, bias: Tensor, hits: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """The softmax over some columns of inputs @ weight.T + bias, in the dtype of `inputs`, and its log sums (R,)."""
    logits = product(inputs, weight[columns]) + bias[columns]
    hits = hits - columns.start
    inside = (hits >= 0) & (hits < logits.shape[1])
    # Minimum, as a hit outside of these columns must not undo another hit.
    excluded = torch.where(inside, EXCLUDED, torch.inf)
    logits.scatter_reduce_(1, hits.clamp(0, logits.shape[1] - 1), excluded, "amin")
    highest = logits.amax(dim=1)
    within = torch.softmax(logits, dim=1, out=logits)
    return within.to(inputs.dtype), highest - within.amax(dim=1).log()  # the highest logit's probability is 1 / sum


def sampled_softmax(
    hidden: Tensor,
    labels: Tensor,
    left_out: Tensor,
    head: nn.Linear,
    negatives: Tensor,
    label_counts: Tensor,
    negative_counts: Tensor,
) -> Tensor:
    """The summed loss of `labels` (N,) given `hidden` (N, C) against `negatives` (S,), which all rows share.

    The log of the expected count in the sample (`label_counts` (N,), `negative_counts` (S,)) is subtracted from every
    logit. Negatives among `left_out` (N, M), which must include the label, are masked. Otherwise as
    tf.nn.sampled_softmax_loss.
    """
    ids = torch.cat([labels, negatives])
    biases = entries(head.bias, ids) - torch.cat([label_counts, negative_counts]).log()
    sizes = [len(labels), len(negatives)]
    (label_weight, weight), (label_bias, bias) = rows(head.weight, ids).split(sizes), biases.split(sizes)
    own = (hidden * label_weight).sum(dim=1) + label_bias
    places = torch.full((len(head.weight),), -1, device=ids.device)
    places[negatives] = torch.arange(len(negatives), device=ids.device)
    row_of = torch.arange(len(labels))
    return LogSumExp.apply(hidden, own, row_of, weight, bias, places[left_out], matmul_dtype(hidden)) - own.sum()


def full_softmax(
    hidden: Tensor, row_of: Tensor, labels: Tensor, left_out: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The summed cross entropy of `labels` (N,) over all rows of `weight` (n, C), `bias` (n,), but those left out.

    Label i belongs to row r = row_of[i] of `hidden` (R, C). `left_out` (R, M) are the ids masked for each row, -1 for
    none; they must include the row's labels, which are not each other's negatives. `row_of` (N,) is ascending, on the
    CPU. On 2 cores this takes 0.61 s for 1,568 rows and 33,080 items; F.linear_cross_entropy takes 0.70 s with all
    logits in memory and 2.5 s in chunks.
    """
    if bias is None:
        bias = weight.new_zeros(len(weight))
    own = (rows(hidden, to_device(row_of, hidden.device)) * rows(weight, labels)).sum(dim=1) + entries(bias, labels)
    return LogSumExp.apply(hidden, own, row_of, weight, bias, left_out, matmul_dtype(hidden)) - own.sum()


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """-log sigmoid(positive - negative), elementwise: Bayesian personalised ranking."""
    return F.softplus(negative - positive)


def bce(positive: Tensor, negative: Tensor) -> Tensor:
    """-log sigmoid(positive) - log(1 - sigmoid(negative)), elementwise."""
    return F.softplus(-positive) + F.softplus(negative)


PAIRWISE = {"bpr": bpr, "bce": bce}  # losses of a target and one sampled negative, given their scores
Name = Annotated[str, OneOf(("softmax", *PAIRWISE))]  # of a later task's loss, in its script


class NextItemLoss:
    """Task 1: the next item at every position, by sampled softmax, or by full softmax if all items are sampled."""

    def __init__(self, sampler: samplers.LogUniformSampler, ignored_label: int | None, earlier_items: bool = True):
        """`ignored_label`: the next item of positions without loss; None: all have one, as in the original.

        `earlier_items`: whether the items before a position are among its negatives.
        """
        self.sampler, self.ignored_label, self.earlier_items = sampler, ignored_label, earlier_items

    def __call__(
        self, model: NextItNet, stage: Stage, batch: Batch, generator: torch.Generator, shard: Shard = ALONE
    ) -> Tensor:
        """The mean over the batch, or this process's share of that sum."""
        head = model.head(1)
        device = head.weight.device
        inputs = batch.inputs[batch.row_of]
        labels = torch.cat([inputs[:, 1:], batch.targets[:, None]], dim=1)  # (B, T)
        counted = labels != self.ignored_label if self.ignored_label is not None else torch.ones_like(labels) > 0
        total = max(int(counted.sum()), 1)
        sampled = self.sampler.count < self.sampler.items
        negatives, draws = self.sampler.draw(generator) if sampled else (None, 0)
        inputs, labels, counted = (shard.of(tensor) for tensor in (inputs, labels, counted))
        places = counted.t().flatten().nonzero().squeeze(1)
        inputs, labels, places = (to_device(tensor, device) for tensor in (inputs, labels, places))
        hidden = model(inputs, stage).transpose(0, 1).flatten(0, 1)  # (T * B, C)
        left_out = self.left_out(inputs, labels)  # (T * B, M)
        labels = labels.t().flatten()
        if len(places) < len(labels):
            hidden, labels, left_out = rows(hidden, places), labels[places], left_out[places]
        if not sampled:
            return full_softmax(hidden, torch.arange(len(labels)), labels, left_out, head.weight, head.bias) / total
        negatives = to_device(negatives, device)
        counts = [self.sampler.expected_count(ids, draws) for ids in (labels, negatives)]
        return sampled_softmax(hidden, labels, left_out, head, negatives, *counts) / total

    def left_out(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Ids that are no negatives (T * B, M): labels (B, T) and, without `earlier_items`, the items before them."""
        labels = labels.t()[:, :, None]  # (T, B, 1)
        if self.earlier_items:
            return labels.flatten(0, 1)
        later = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool, device=inputs.device).triu(1)  # (T, T)
        return torch.cat([labels, torch.where(later[:, None], labels, inputs)], dim=2).flatten(0, 1)


class TargetLoss:
    """Tasks 2+: cross entropy of the target over all targets but `<UNK>`, plus a penalty on the head.

    The softmax leaves out what is known of a row, its other targets included. The penalty is l2 * |head|^2 / 2, or if
    the model has an anchor for the head, l2_sp * |head - anchor|^2 / 2 (L2-SP: Li et al., ICML 2018).
    """

    def __init__(self, known: Callable[[np.ndarray], np.ndarray], l2: float, l2_sp: float = 0.0):
        """`known` maps rows (R,) to known targets (R, M) like Known.of_rows, training targets included."""
        self.known, self.l2, self.l2_sp = known, l2, l2_sp

    def __call__(
        self, model: NextItNet, stage: Stage, batch: Batch, generator: torch.Generator, shard: Shard = ALONE
    ) -> Tensor:
        """The mean over the batch plus the penalty, or this process's share of it."""
        head = model.head(stage.task)
        device = head.weight.device
        ids = self.ids(to_device(batch.targets, device), generator)
        own, examples = part(batch, shard)
        inputs = F.pad(own.inputs, (0, 0, 0, -len(own.inputs) % ENCODED_ROWS))
        users = model.user_representation(to_device(inputs, device), stage)[: len(own.inputs)]  # (R, C)
        summed = self.summed(users, own, ids[examples], head)
        return summed / len(ids) + self.penalty(model, stage.task) / shard.count

    def penalty(self, model: NextItNet, task: int) -> Tensor:
        weight = model.head(task).weight
        if task in model.anchors:
            return self.l2_sp * (weight - model.anchors[task]).square().sum() / 2
        return self.l2 * weight.square().sum() / 2

    def ids(self, targets: Tensor, generator: torch.Generator) -> Tensor:
        """The ids whose scores the loss of each example needs; first dimension B."""
        return targets

    def summed(self, users: Tensor, batch: Batch, ids: Tensor, head: nn.Linear) -> Tensor:
        """The summed loss of a batch's examples, given the representations (R, C) of its rows."""
        left_out = to_device(torch.from_numpy(self.known(batch.rows)).long(), users.device) - 1
        bias = None if head.bias is None else head.bias[1:]
        return full_softmax(users, batch.row_of, ids - 1, left_out, head.weight[1:], bias)


class PairLoss(TargetLoss):
    """The target against one sampled negative, by a loss of PAIRWISE, instead of the cross entropy."""

    def __init__(
        self,
        compare: Callable[[Tensor, Tensor], Tensor],
        sampler: samplers.TargetSampler,
        l2: float,
        l2_sp: float = 0.0,
    ):
        self.compare, self.sampler, self.l2, self.l2_sp = compare, sampler, l2, l2_sp

    def ids(self, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Target and negative, (B, 2)."""
        return torch.stack([targets, self.sampler.draw(targets, generator)], dim=1)

    def summed(self, users: Tensor, batch: Batch, ids: Tensor, head: nn.Linear) -> Tensor:
        own = rows(users, to_device(batch.row_of, users.device))
        scores = (rows(head.weight, ids) * own[:, None]).sum(dim=2)  # (B, 2)
        if head.bias is not None:
            scores = scores + entries(head.bias, ids)
        return self.compare(*scores.unbind(1)).sum()


Loss = NextItemLoss | TargetLoss


def next_item(hp: Any, data: TaskData) -> NextItemLoss:
    """The loss of task 1, by its hyperparameters."""
    negatives = samplers.LogUniformSampler(len(data.items), hp.negative_fraction)
    earlier_items = ranking.left_out(hp, data) != "known"
    return NextItemLoss(negatives, None if hp.padding_in_loss else data.padding_id, earlier_items)


def target(hp: Any, data: TaskData) -> TargetLoss:
    """The loss of a later task, by its hyperparameters; negatives follow `rho`, or are uniform without it."""
    l2_sp = getattr(hp, "l2_sp", hp.l2)  # not in scripts of classes, whose heads never start as task 1's rows
    if hp.loss == "softmax":
        known = "known" if ranking.left_out(hp, data) == "known" else "targets"
        return TargetLoss(ranking.Known(data, known).of_rows, hp.l2, l2_sp)
    size = len(data.target_vocabulary)
    if hasattr(hp, "rho"):
        probabilities = samplers.static_probabilities(data.targets, size, hp.rho)
    else:
        probabilities = samplers.uniform_probabilities(size)
    return PairLoss(PAIRWISE[hp.loss], samplers.TargetSampler(probabilities), hp.l2, l2_sp)


class Objective:
    """A process's share of a batch's loss; shares and their gradients add up to those of the batch."""

    def __init__(self, loss: Loss, model: nn.Module, stage: Stage, generator: torch.Generator, precision: torch.dtype):
        """`generator` samples the negatives, the same ones in all processes."""
        self.loss, self.model, self.stage, self.generator = loss, model, stage, generator
        self.precision = precision

    def __call__(self, batch: Batch) -> Tensor:
        """The share of the whole batch."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            return self.loss(self.model, self.stage, batch, self.generator, processes.own_shard())
