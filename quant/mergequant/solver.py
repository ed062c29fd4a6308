"""Static 4-bit weights and activations in the manner of MergeQuant (arXiv 2503.07654).

Block after block, and in a block site after site (the norm before attention, what `o_proj` reads,
the norm before the feed-forward, what `down_proj` reads), each seen through everything that is
already quantized before it:

    fold the norms, turn the stream, mix what o_proj and down_proj read   (rotation.py)
    divide the rows that feed o_proj and down_proj                        (balance.py)
    choose the site's steps on a sample                                   (steps.py)
    H' = sum of q q^T over all calibration tokens, q the site's integers
    round W' = W diag(steps) with the error feedback of H'                (gptq.py)

The paper's text was not available: what is carried out here is its published idea, the step
in the norm and the de-quantization in the weights, completed by us; see docs/mergequant.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from optim.quant.mergequant.balance import feeder
from optim.quant.mergequant.rotation import Places, fold_norm, places, turn
from optim.quant.mergequant.sites import Form, SiteRounder, not_finite
from optim.quant.solver import Solved
from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.table import FAMILIES
from optim.runtime.decoder.linears.static_int import StepLinear
from optim.runtime.formats.hadamard import Mixing
from optim.runtime.formats.static_int import Exact
from optim.runtime.walk.walk import HiddenStates, Walk

__all__ = ["Form", "MergeSolver"]

PROBE_TOKENS = 512
FOLD_TOLERANCE = 1e-3


@dataclass(slots=True)
class MergeSolver:
    """Everything that is the same for every block of a run; `prefix` counts its tokens."""

    walk: Walk
    form: Form
    rotation: Mixing | None
    prefix: int = 0
    exact: Exact = field(init=False)

    def __post_init__(self) -> None:
        self.exact = Exact(self.prefix)

    def begin(self, states: HiddenStates) -> None:
        """Turn the stream that the first block reads, in place."""
        if self.rotation is None:
            return
        for rows in self.walk.slices(states):
            states[rows] = self.rotation(states[rows])

    def solve(self, i: int, states: HiddenStates) -> Solved:
        """Quantize block i given its inputs.

        OptimError (2) for weights or inputs that are not finite.
        """
        block = self.walk.block(i)
        hidden = states[slice(0, max(1, PROBE_TOKENS // states.length))]
        found = self._fold(i, block, hidden)
        expected = self.walk.run(i, block, hidden)
        form, several = self.form, len(found.downs) > 1
        model_type = str(self.walk.model.config.get_text_config().model_type)
        values, up = (feeder(block, name, model_type) for name in (found.out, found.downs[0]))
        job = SiteRounder(self.walk, form, self.exact, i, block, states)
        job.norm_site(found.attention)
        job.read_site([found.out], form.out, form.bits, values)
        job.norm_site(found.mlp)
        kind = "token" if several else form.down  # a mixture's positions are lost among experts
        job.read_site(list(found.downs), kind, form.down_bits, None if several else up)
        return self._compare(i, block, hidden, expected, job)

    def _fold(self, i: int, block: nn.Module, hidden: Tensor) -> Places:
        """Norms folded and the stream turned; OptimError if that changes the block."""
        model_type = str(self.walk.model.config.get_text_config().model_type)
        found = places(block, model_type)
        plain = hidden if self.rotation is None else self.rotation.inverse(hidden)
        before = self.walk.run(i, block, plain) - plain
        if not bool(before.isfinite().all()):
            raise not_finite(i, "the block")
        for site in (found.attention, found.mlp):
            fold_norm(block, site, FAMILIES[model_type].norm_offset)
        if self.rotation is not None:
            turn(block, found, self.rotation)
            before = self.rotation(before)
        after = self.walk.run(i, block, hidden) - hidden.to(before)
        change = float((after - before).norm() / before.norm().clamp(min=1e-20))
        if not change < FOLD_TOLERANCE:
            what = f"block {i}: folding its norms changes what it computes by {change:.1g}"
            raise OptimError(what, "-m awq checks each fold and leaves out what fails", USAGE)
        return found

    def _compare(
        self, i: int, block: nn.Module, hidden: Tensor, expected: Tensor, job: SiteRounder
    ) -> Solved:
        """The block's error on the probe, and that of the same steps with plain rounding."""
        text = slice(self.prefix, None)
        added = (expected - hidden.to(expected))[:, text].square().sum().clamp(min=1e-20)

        def error() -> float:
            got = self.walk.run(i, block, hidden)
            return float((got - expected)[:, text].square().sum() / added)

        def put(linears: Mapping[str, StepLinear]) -> None:
            for name, linear in linears.items():
                block.set_submodule(name, linear)

        best = error()
        put(job.plain)
        rounding = error()
        if best <= rounding:
            put(job.solved)
        else:
            job.notes.append(f"plain rounding: error feedback's error {best:.3g} was no better")
        return Solved(block, min(best, rounding), rounding, job.notes)
