"""Negative samplers: log-uniform for the sampled softmax of task 1, by probabilities for the pairwise losses."""

import numpy as np
import torch
from torch import Tensor


class LogUniformSampler:
    """Negatives for the sampled softmax: distinct ids, id i drawn with probability ~ log((i + 2) / (i + 1)).

    TensorFlow's default candidate sampler, which assumes that smaller ids are more frequent.
    """

    def __init__(self, items: int, negative_fraction: float):
        self.items = items
        self.count = max(1, int(items * negative_fraction))
        ids = torch.arange(items, dtype=torch.float64)
        self.log_miss = torch.log1p(-torch.log1p(1 / (ids + 1)) / np.log(items + 1))  # log(1 - p)
        self.batch, self.stream = self.count, None
        if self.count < items:
            self.batch = self.draw(torch.Generator().manual_seed(0))[1] * 51 // 50  # what a trial takes, plus 2 %

    def draw(self, generator: torch.Generator) -> tuple[Tensor, int]:
        """`count` distinct ids (S,) on the generator's device, in the order of the draws, and the number of draws."""
        device = generator.device
        if device.type == "cpu":
            return self.distinct(generator)
        # The host waits for the draw. On a stream of its own, of high priority, it does not wait for pending steps too.
        self.stream, pending = self.stream or torch.cuda.Stream(device, priority=-1), torch.cuda.current_stream(device)
        with torch.cuda.stream(self.stream):
            ids, draws = self.distinct(generator)
        pending.wait_stream(self.stream)
        ids.record_stream(pending)
        return ids, draws

    def distinct(self, generator: torch.Generator) -> tuple[Tensor, int]:
        """As `draw`, on the current stream."""
        device = generator.device
        drawn = torch.empty(0, dtype=torch.int64, device=device)
        while True:
            count = max(self.batch, len(drawn))
            uniform = torch.rand(count, generator=generator, dtype=torch.float64, device=device)
            more = uniform.mul_(np.log(self.items + 1)).exp_().sub_(1).long().clamp_(max=self.items - 1)
            drawn = torch.cat([drawn, more])
            found = first_places(drawn, self.items)
            if len(found) >= self.count:
                found = found[: self.count]
                return drawn[found], int(found[-1]) + 1

    def expected_count(self, ids: Tensor, draws: int) -> Tensor:
        """The expected count of each id in the sample, float32, as in TensorFlow's range sampler; the shape of `ids`.

        p * draws if no draw was a repeat, else the probability that the id is among the distinct ones.
        """
        self.log_miss = self.log_miss.to(ids.device)
        if draws == self.count:
            return (draws * -torch.expm1(self.log_miss[ids])).float()
        return -torch.expm1(draws * self.log_miss[ids]).float()


def first_places(ids: Tensor, size: int) -> Tensor:
    """The positions of first occurrences in `ids`, whose values are below `size`; ascending."""
    if ids.device.type != "cpu":
        return first_places_by_sorting(ids)
    ids = ids.numpy()
    places = np.arange(len(ids), dtype=np.int32)
    first = np.empty(size, dtype=np.int32)  # uninitialised: read only where it was written
    first[ids[::-1]] = places[::-1]  # of equal ids the last write stays, which is the first occurrence
    return torch.from_numpy(np.flatnonzero(first[ids] == places))


def first_places_by_sorting(ids: Tensor) -> Tensor:
    """The same for a GPU, where the order of writes is undefined; on a CPU it takes four times as long."""
    ordered, places = ids.sort(stable=True)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[places[1:]] = ordered[1:] != ordered[:-1]
    return is_first.nonzero().squeeze(1)


class TargetSampler:
    """Draws one negative for each positive target, from the probabilities of all other targets."""

    def __init__(self, probabilities: np.ndarray):
        """`probabilities` (targets - 1,): entry i belongs to target id i + 1; `<UNK>` is never drawn."""
        self.cumulative = torch.from_numpy(np.cumsum(probabilities) / np.sum(probabilities))

    def draw(self, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Ids (B,) for `targets` (B,), which are on the generator's device."""
        self.cumulative = self.cumulative.to(targets.device)
        positive = targets - 1
        after = self.cumulative[positive]
        before = torch.where(positive > 0, self.cumulative[positive - 1], 0.0)
        uniform = torch.rand(len(targets), generator=generator, dtype=torch.float64, device=targets.device)
        point = uniform * (1 - (after - before))
        point = torch.where(point < before, point, point + (after - before))  # skips the positive's own interval
        return torch.searchsorted(self.cumulative, point, right=True).clamp(max=len(self.cumulative) - 1) + 1


def static_probabilities(targets: np.ndarray, size: int, rho: float) -> np.ndarray:
    """LambdaFM's static sampler: p ~ exp(-(rank + 1) / (size * rho)), where rank 0 is the most frequent target.

    `targets` are all examples' target ids, held-out ones included as in the original; `size` counts `<UNK>`. Returns
    (size - 1,), entry i for id i + 1; of equally frequent targets the smaller id ranks first.
    """
    frequency = np.bincount(targets, minlength=size)[1:]
    rank = np.empty(size - 1)
    rank[np.argsort(-frequency, kind="stable")] = np.arange(size - 1)
    weight = np.exp(-rank / (size * rho))  # the + 1 cancels out, and could make all weights underflow to 0
    return weight / weight.sum()


def uniform_probabilities(size: int) -> np.ndarray:
    """Equal probabilities for target ids 1..size - 1."""
    return np.full(size - 1, 1 / (size - 1))
