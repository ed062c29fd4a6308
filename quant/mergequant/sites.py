"""The sites of one block, one after the other: choose steps, sum up H' = q q^T, round the readers.

A site is watched by running the calibration text up to it, through everything of the block that is
quantized already. What it sees is kept for the second look, where that is little.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optim.quant import gptq
from optim.quant.grid import Grid, make_grid, ranges, round_to
from optim.quant.mergequant.balance import Feeder, choose_divisors, divide_rows
from optim.quant.mergequant.rotation import NormSite
from optim.quant.mergequant.steps import (
    WEIGHT_SCHEME,
    Columns,
    Steps,
    choose_clip,
    choose_steps,
    clipped_grid,
    one_step,
    site_parts,
    split,
)
from optim.quant.observe import add_gram, mirror
from optim.recipes.errors import USAGE, OptimError
from optim.runtime.decoder.linears.static_int import StepLinear, StepNorm
from optim.runtime.formats.hadamard import Mixing, mixing
from optim.runtime.formats.static_int import (
    Exact,
    Site,
    StaticSite,
    TokenSite,
    pack_nibbles,
)
from optim.runtime.walk.walk import HiddenStates, Walk, linear_at

SAMPLE_TOKENS = 4096  # the steps are chosen on so many
PREFIX_SHARE = 1 / 16  # of a Gram matrix's trace that the prefix is given
KEPT_BYTES = 256 * 2**20  # what a site sees is kept for its second use up to here
ROW_BYTES = 16 * 2**20  # float32 rows of a linear that are rounded at a time


@dataclass(frozen=True, slots=True)
class Form:
    """What is done at each kind of site.

    `norm`, `out`, `down`: "channel" (a step a channel), "tensor" (one step) or "token" (a step a
    token, found at run time).
    """

    bits: int = 4
    down_bits: int = 4
    rotate: bool = True
    norm: str = "channel"
    out: str = "channel"
    down: str = "channel"
    centred: bool = True
    mixed: bool = True
    feedback: bool = True
    clipped: bool = True
    damping: float = 0.01


class _Left(Exception):
    """Raised at the site: what the block computes after it is not needed."""


@dataclass(slots=True)
class SiteRounder:
    """One block on its way from floats to codes."""

    walk: Walk
    form: Form
    exact: Exact
    """How many leading positions of every window belong to the prefix."""
    i: int
    block: nn.Module
    states: HiddenStates
    solved: dict[str, StepLinear] = field(default_factory=dict)
    plain: dict[str, StepLinear] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    ahead: dict[str, Tensor] = field(default_factory=dict)
    """What sites see of the prefix, `[positions, n]`."""
    divided: dict[str, Tensor] = field(default_factory=dict)

    def norm_site(self, where: NormSite) -> None:
        """Steps into the norm, or where a router reads it too, before each of its linears."""
        form = self.form
        sample = self._sample(where.norm, after=True)
        site, steps, columns = self._site(sample, form.norm, form.bits, None, not form.rotate)
        gram = self._gram([where.norm], site, after=True)[where.norm]
        fused = where.fused and isinstance(site, StaticSite)
        known = self._feedback(where.norm, gram)
        for name in where.linears:
            weight = linear_at(self.block, name).dense()
            made = weight, steps, columns, known, gram.diagonal()
            self._round(name, *made, form.bits, None if fused else site)
        if fused:
            assert isinstance(site, StaticSite)
            norm = self.block.get_submodule(where.norm)
            eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))
            self.block.set_submodule(where.norm, StepNorm(site, eps))

    def read_site(self, names: list[str], kind: str, bits: int, source: Feeder | None) -> None:
        """Steps in front of linears that no norm feeds: what they read is mixed first.

        Where `source` makes it, its rows are divided so that the channels are alike.
        """
        sites: dict[str, Site] = {}
        steps: dict[str, Steps | None] = {}
        mix = mixing(linear_at(self.block, names[0]).in_features) if self.form.mixed else None
        mix = None if mix is None else mix.to(self.walk.device, torch.float32)
        if kind == "token" and len(names) > 1:
            sites = dict.fromkeys(names, TokenSite(1.0, bits, mix))
            steps = dict.fromkeys(names)
        else:
            (name,) = names
            sample = self._sample(name, after=False)
            if source is not None and mix is not None:
                sample = self._balance(name, sample, source, kind, bits, mix)
            sites[name], steps[name], _ = self._site(sample, kind, bits, mix, False)
        grams = self._gram(names, sites, after=False)
        for name in names:
            linear = linear_at(self.block, name)
            weight = linear.dense() * self.divided[name] if name in self.divided else linear.dense()
            weight = weight if mix is None else mix(weight)
            gram = grams.pop(name, None)
            if gram is None:
                self.notes.append(f"no token reached {name}: rounded plainly")
                gram = torch.eye(weight.shape[1], device=weight.device)
            energy = gram.diagonal().clone()
            known = self._feedback(name, gram)
            self._round(name, weight, steps[name], None, known, energy, bits, sites[name])

    def _balance(
        self, name: str, sample: Tensor, source: Feeder, kind: str, bits: int, mix: Mixing
    ) -> Tensor:
        """Divide what `source` makes, and all that was seen of it; returns the sample divided."""
        loud = sample.square().mean(0)
        if name in self.ahead:
            loud += self.ahead[name].square().sum(0) / self.states.length
        weight = linear_at(self.block, name).dense()
        d = choose_divisors(sample, loud, weight, source, kind, bits, mix)
        for made in (self.solved[source.name], self.plain[source.name]):
            divide_rows(made, source.rows(d))
        for x in self.kept.get(name, []):
            x /= d
        if name in self.ahead:
            self.ahead[name] = self.ahead[name] / d
        self.divided[name] = d
        return sample / d

    def _site(
        self, sample: Tensor, kind: str, bits: int, mix: Mixing | None, divided: bool
    ) -> tuple[Site, Steps | None, Columns | None]:
        if mix is not None:
            sample = mix(sample)
        if kind == "token":
            return TokenSite(choose_clip(sample, bits), bits, mix), None, None
        form, columns = self.form, None
        if kind == "tensor":
            steps = one_step(sample, bits)
        else:
            steps = choose_steps(sample, bits, form.centred and not divided)
        if divided and kind == "channel":
            columns = split(steps.step)
        return StaticSite(site_parts(steps, columns), bits, mix, self.exact), steps, columns

    def _feedback(self, name: str, gram: Tensor) -> gptq.Feedback | None:
        form = self.form
        if not form.feedback:
            return None
        known = gptq.feedback(gram.clone(), form.damping)
        if known.damping > form.damping:
            self.notes.append(
                f"{name}: too little calibration text, damping raised to {known.damping:g}"
            )
        return known

    def _round(
        self,
        name: str,
        weight: Tensor,
        steps: Steps | None,
        columns: Columns | None,
        known: gptq.Feedback | None,
        energy: Tensor,
        bits: int,
        site: Site | None,
    ) -> None:
        """One linear's weight `[out, n]`, its input mixed and its norm folded, to nibbles."""
        bias = linear_at(self.block, name).dense_bias()
        if steps is not None and steps.center is not None:
            constant = weight @ steps.center
            bias = constant if bias is None else bias + constant
        if columns is not None:
            weight = weight[:, columns.index] * columns.worth
        elif steps is not None:
            weight = weight * steps.step
        grids = [self._grid(rows, energy) for rows in _some_rows(weight)]
        nearest = [make_grid(*ranges(r, WEIGHT_SCHEME), WEIGHT_SCHEME, r.dtype) for r in
                   _some_rows(weight)]  # fmt: skip

        def linear(levels: Iterable[Tensor], used: list[Grid]) -> StepLinear:
            packed = torch.cat([pack_nibbles(q.to(torch.uint8)) for q in levels])
            scale = torch.cat([grid.scale[:, 0] for grid in used])
            return StepLinear(packed, scale, bias, bits, site, self.exact)

        parts = list(zip(_some_rows(weight), grids, strict=True))
        if known is None:
            levels = [round_to(rows, grid) for rows, grid in parts]
        else:
            levels = [gptq.round_with_feedback(rows, grid, known) for rows, grid in parts]
        self.solved[name] = linear(levels, grids)
        pairs = zip(_some_rows(weight), nearest, strict=True)
        self.plain[name] = linear((round_to(rows, grid) for rows, grid in pairs), nearest)
        self.block.set_submodule(name, self.solved[name])

    def _grid(self, rows: Tensor, energy: Tensor) -> Grid:
        if self.form.clipped:
            return clipped_grid(rows, energy)
        return make_grid(*ranges(rows, WEIGHT_SCHEME), WEIGHT_SCHEME, rows.dtype)

    def _sample(self, name: str, after: bool) -> Tensor:
        """Some of what a site sees: float32 `[tokens, n]`, without the prefix."""
        seen: list[Tensor] = []
        module = self.block.get_submodule(name)
        width = int(getattr(module, "in_features", self.states.shape[2]))
        fits = self.states.shape[0] * self.states.length * width * 4 <= KEPT_BYTES
        self._watch([name], after, lambda _name, x: seen.append(x), None if fits else SAMPLE_TOKENS)
        if fits:
            self.kept = {name: seen}
        sample = torch.cat([x[:: len(seen) * len(x) // SAMPLE_TOKENS + 1] for x in seen])
        if not bool(sample.isfinite().all()):
            raise not_finite(self.i, name)
        return sample

    def _gram(
        self, names: list[str], sites: Site | Mapping[str, Site], after: bool
    ) -> dict[str, Tensor]:
        """Mean of q q^T over the calibration text (for token steps: of what q stands for).

        The prefix is few tokens, and all others look at them: they get a share of their own.
        """
        grams: dict[str, Tensor] = {}
        count: dict[str, int] = {}

        def read(name: str, x: Tensor) -> Tensor:
            site = sites if isinstance(sites, nn.Module) else sites[name]
            codes, step = site.forward(x)
            return codes if step is None else codes * step

        def add(name: str, x: Tensor) -> None:
            codes = read(name, x)
            if name not in grams:
                grams[name] = torch.zeros(codes.shape[1], codes.shape[1], device=codes.device)
            add_gram(grams[name], codes)
            count[name] = count.get(name, 0) + len(codes)

        if names[0] in self.kept:
            for x in self.kept.pop(names[0]):
                add(names[0], x)
        else:
            self._watch(names, after, add, None)
        for name, gram in grams.items():
            mirror(gram)
            gram /= count[name]
            if name in self.ahead:
                _add_share(gram, read(name, self.ahead[name][None])[0])
        return grams

    def _watch(
        self, names: list[str], after: bool, see: Callable[[str, Tensor], None], most: int | None
    ) -> None:
        """`see` what modules give (`after`) or read, on all the text or `most` tokens of it."""
        first, alone = self.exact.positions, len(names) == 1

        def look(name: str, x: Tensor) -> None:
            if first and x.dim() == 3:
                self.ahead.setdefault(name, x[0, :first].float())
                x = x[:, first:]
            see(name, x.flatten(0, -2).float())
            if alone:
                raise _Left

        def hook(name: str) -> torch.utils.hooks.RemovableHandle:
            module = self.block.get_submodule(name)
            if after:
                return module.register_forward_hook(lambda m, args, out: look(name, out))
            return module.register_forward_pre_hook(lambda m, args: look(name, args[0]))

        handles = [hook(name) for name in names]
        try:
            tokens = 0
            for rows in self.walk.slices(self.states):
                if most is not None and tokens >= most:
                    break
                hidden = self.states[rows]
                tokens += hidden.shape[0] * hidden.shape[1]
                with suppress(_Left):
                    self.walk.run(self.i, self.block, hidden)
        finally:
            for handle in handles:
                handle.remove()


def not_finite(i: int, name: str) -> OptimError:
    """What is said where a block meets a value that is no number."""
    return OptimError(
        f"block {i}: what {name} sees or gives is not finite on the calibration text",
        "check the model's weights; a 16-bit overflow would show in its own output too",
        USAGE,
    )


def _add_share(gram: Tensor, rows: Tensor) -> None:
    """Add rows `[k, n]`, made equally large, and together a share of the trace."""
    size = PREFIX_SHARE * gram.trace() / len(rows)
    rows = rows * (size / rows.square().sum(1, keepdim=True).clamp(min=1e-20)).sqrt()
    gram.addmm_(rows.T, rows)


def _some_rows(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, ROW_BYTES // (4 * weight.shape[1])))
