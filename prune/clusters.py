"""Kinds of calibration text: k-means over what its windows excite in the first block."""

import torch
from torch import Tensor

from optim.recipes.schema import CoreInfer
from optim.runtime.sparsity.core_neurons import direction

ROUNDS = 50
DEFAULT = 4  # clusters of `guide: similarity` where the recipe gives none


def group(scores: Tensor, section: CoreInfer) -> tuple[Tensor | None, Tensor]:
    """Centroids `[k, neurons]` of unit length and each window's cluster int64 `[windows]`.

    `scores` `[windows, neurons]` are those of block 0. None where the recipe wants no clusters.
    """
    count = section.clusters or (DEFAULT if section.guide == "similarity" else 1)
    count = min(count, len(scores))
    if count == 1:
        return None, torch.zeros(len(scores), dtype=torch.int64)
    points = direction(scores)
    centroids = _spread(points, count)
    kinds = (points @ centroids.T).argmax(1)
    for _ in range(ROUNDS):
        sums = torch.zeros_like(centroids).index_add_(0, kinds, points)
        filled = sums.norm(dim=1, keepdim=True) > 0
        centroids = torch.where(filled, torch.nn.functional.normalize(sums), centroids)
        before, kinds = kinds, (points @ centroids.T).argmax(1)
        if torch.equal(before, kinds):
            break
    present = torch.unique(kinds)
    return centroids[present], torch.searchsorted(present, kinds)


def _spread(points: Tensor, count: int) -> Tensor:
    """The first point, then each time the one farthest from those taken: nothing is random."""
    taken = [0]
    for _ in range(count - 1):
        nearest = (points @ points[taken].T).amax(1)
        taken.append(int(nearest.argmin()))
    return points[taken]
