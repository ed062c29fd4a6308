"""Core neurons: which neurons of a feed-forward a prompt needs (CoreInfer, arXiv 2410.18311).

With h `[tokens, neurons]` the input of down_proj, w_j the norm of its column j, a neuron's score is

    energy     sum_t h_tj^2 w_j^2
    griffin    sum_t h_tj^2 / sum_k h_tk^2              (GRIFFIN, arXiv 2404.01365)
    paper      in how many tokens h_tj is among the top `alpha` of the positive h_t  (CoreInfer)

The paper's ignores negative activations, half of the useful ones of a SwiGLU model; it is here to
be compared with. A score of the prompt and the same score of calibration text, the prior, each
divided by its sum, are added: with the prior 64 tokens choose as well as 512. With clusters, the
prior is that of the calibration windows that resemble the prompt.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.runtime.sparsity.side_file import Core, Side


def scores(h: Tensor, norm: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The sum over tokens of each neuron's score: h `[tokens, neurons]` -> float32 `[neurons]`.

    `norm` `[neurons]` are the squared column norms of down_proj; `energy` alone needs them.
    """
    kind = options["score"]
    if kind == "paper":
        return _top_positives(h, float(options["alpha"]))
    square = h.float().square()
    if kind == "griffin":
        return (square / square.sum(1, keepdim=True).clamp_min(1e-30)).sum(0)
    assert norm is not None
    return square.sum(0) * norm.to(square.device)


def _top_positives(h: Tensor, alpha: float) -> Tensor:
    """How often each neuron is among the top `alpha` of a token's positive activations."""
    ranked = h.float().sort(1, descending=True).values
    count = (alpha * (ranked > 0).sum(1, keepdim=True)).ceil().long().clamp(min=1)
    least = ranked.gather(1, count - 1)
    return ((h >= least) & (h > 0)).float().sum(0)


@dataclass(slots=True)
class Guide:
    """Which cluster of calibration text each prompt resembles, found in block 0."""

    side: Side
    clusters: list[int]

    @classmethod
    def none(cls) -> "Guide":
        """A guide for blocks without fixed sets."""
        return cls(Side("", {}, (), None), [])

    def assign(self, prompt: Tensor) -> None:
        """`prompt` `[neurons]`: the scores of a further prompt in the first block."""
        self.clusters.append(nearest(prompt, self.side.centroids))

    def total(self, prompt: Tensor, core: Core, at: int = 0) -> Tensor:
        """The scores that choose, of prompt number `at`: `[neurons]`."""
        guide = self.side.options["guide"]
        if core.prior is None:
            return prompt
        own = core.prior[self.clusters[at]] if core.prior.dim() == 2 else core.prior
        prior = _share(own.to(prompt.device, torch.float32))
        return prior if guide == "similarity" else _share(prompt) + prior


def _share(scores: Tensor) -> Tensor:
    """Scores that sum to one."""
    share: Tensor = scores / max(float(scores.sum()), 1e-30)
    return share


def nearest(prompt: Tensor, centroids: Tensor | None) -> int:
    """The centroid (rows of unit length) that points most as `prompt` does."""
    if centroids is None:
        return 0
    return int((centroids.to(prompt.device) @ direction(prompt)).argmax())


def direction(scores: Tensor) -> Tensor:
    """Scores as a vector of unit length; roots, so that a few neurons do not decide all."""
    root: Tensor = scores.float().clamp_min(0).sqrt()
    length: Tensor = root.norm(dim=-1, keepdim=True) + 1e-30
    return root / length


def chosen(total: Tensor, keep: int) -> Tensor:
    """The `keep` neurons with the largest scores, in ascending order: int64 `[keep]`."""
    return total.topk(keep).indices.sort().values
