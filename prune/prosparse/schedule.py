"""How hard sparsity is asked for, step by step (ProSparse, arXiv 2402.13516, Algorithm 1).

Stage 0 swaps the activation and asks for nothing. Then come S stages of equal length with peaks
l_1 <= ... <= l_S: the first holds l_1, and stage i goes from l_{i-1} to l_i on half a sine,

    eta = (sin(-pi/2 + pi * (t - T_{i-1}) / (T_i - T_{i-1})) + 1) / 2
    lambda = l_{i-1} + eta * (l_i - l_{i-1})

so that equal neighbours are a stage of rest. The swap is itself gradual here: over the first part
of stage 0 the activation goes from the model's own to ReLU, so that the student never leaves the
neighbourhood of its teacher.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schedule:
    """`steps` in all; the first `substitution` of them are stage 0, its first `blend` the swap."""

    steps: int
    substitution: int
    blend: int
    peaks: tuple[float, ...]

    def relu_share(self, step: int) -> float:
        """How much of the activation is ReLU at `step`: 1 from step `blend` on."""
        return 1.0 if step >= self.blend else (step + 0.5) / self.blend

    def l1(self, step: int) -> float:
        """lambda at `step` (counted from 0)."""
        t, length = step + 1 - self.substitution, self.steps - self.substitution
        if t <= 0 or not self.peaks:
            return 0.0
        stage = min(len(self.peaks) - 1, math.ceil(t * len(self.peaks) / length) - 1)
        if stage == 0:
            return self.peaks[0]
        start, end = (length * k / len(self.peaks) for k in (stage, stage + 1))
        eta = (math.sin(-math.pi / 2 + math.pi * (t - start) / (end - start)) + 1) / 2
        before, peak = self.peaks[stage - 1 : stage + 1]
        return before + eta * (peak - before)

    def stage(self, step: int) -> int:
        """0 while the activation is swapped and settles, then 1 to S."""
        t, length = step + 1 - self.substitution, self.steps - self.substitution
        return 0 if t <= 0 or not self.peaks else math.ceil(t * len(self.peaks) / length)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """A linear rise over `warmup` steps, then a cosine down to a tenth of nothing."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * (step + 0.5) / steps))
