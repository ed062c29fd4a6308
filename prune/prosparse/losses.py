"""What a student is taught: its teacher's next-token odds and hidden states, and to be sparse.

    KL         mean_t Σ_v p(v) log(p(v) / q(v))                 p the teacher's, q the student's
    SquareHead Σ_l mean_t ‖f_l - g_l‖² / ‖f_l‖²                 f, g the outputs of block l
    L1         Σ_l mean_j |x1_j|                                x1 = relu(gate) * up

SquareHead (arXiv 2310.06927) divides by each layer's own size, so that no layer dominates; here by
each token's too, as a few tokens have outputs a hundred times the others'. The paper's L1 is a sum
over neurons; the mean makes lambda independent of the width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean divergence of logits `[..., vocab]`, float32, a scalar."""
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()


def square_head(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Each block output's relative squared error, mean over tokens: `[blocks]`, float32."""
    pairs = zip(teacher, student, strict=True)
    return torch.stack([_relative(f.float(), g.float()) for f, g in pairs])


def _relative(f: Tensor, g: Tensor) -> Tensor:
    size = f.square().sum(-1).clamp_min(1e-12)
    return ((g - f).square().sum(-1) / size).mean()


def mean_abs(x1: Tensor) -> Tensor:
    """Mean |x1| of a block, float32, a scalar; x1 `[..., neurons]` is the input of `down_proj`."""
    return x1.float().abs().mean()


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross entropy of the tokens `ids` `[n, t]` themselves, for those who want labels too."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
