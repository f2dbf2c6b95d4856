"""Spectral initialisation of the item embedding: items that occur near the same items start with similar vectors."""

from conure import processes

import numpy as np
import torch
from torch import Tensor

WINDOW = 10  # places
ITERATIONS = 6  # of the subspace iteration; more gave no better models
ROWS_AT_ONCE = 64  # few enough for a CPU's cache


def times_co_occurrence(rows: np.ndarray, vectors: Tensor) -> Tensor:
    """M @ vectors (items, C), where M (items, items) is never in memory.

    M[a, b] counts how often `rows` (R, T) have items a and b within WINDOW places of each other, each time divided by
    the distance.
    """
    place = torch.arange(rows.shape[1], device=vectors.device)
    distance = (place - place[:, None]).abs()
    weights = torch.where((distance > 0) & (distance <= WINDOW), 1 / distance, 0.0)  # (T, T)
    product = torch.zeros_like(vectors)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        ids = torch.from_numpy(rows[start : start + ROWS_AT_ONCE]).long().to(vectors.device)
        product.index_add_(0, ids.flatten(), (weights @ vectors[ids]).flatten(0, 1))
    return product


def leading_eigenvectors(rows: np.ndarray, items: int, count: int, ignored: list[int], device: torch.device) -> Tensor:
    """(items, count), or as many as there are items: the leading eigenvectors of D^-1/2 M D^-1/2, in any rotation.

    M is the co-occurrence matrix without the ids `ignored`, D its row sums. Items without a neighbour have zeros. By
    subspace iteration, from torch's seed.
    """
    counted = torch.ones(items, 1, device=device)
    counted[ignored] = 0.0
    degrees = counted * times_co_occurrence(rows, counted)
    scale = torch.where(degrees > 0, degrees.rsqrt(), 0.0)
    basis = torch.randn(items, min(items, count)).to(device)
    for _ in range(ITERATIONS):
        basis, _ = torch.linalg.qr(scale * times_co_occurrence(rows, scale * basis))
    basis = torch.where(degrees > 0, basis, 0.0)
    # The first process's, because the last bits of others may differ.
    return processes.total(basis if processes.is_main() else torch.zeros_like(basis))
