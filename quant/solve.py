"""Solve one block: observe what its linears read, fold scales, clip, round, and compare.

The block is run on the calibration states as the blocks before it, already compressed, left them.
Each linear's input becomes one Gram matrix. After solving, the block's output on a probe is
measured against plain rounding of the same block; a block that got worse is rounded plainly and
says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optim.quant import awq, gptq
from optim.quant.fold import discover, family_groups, query_repeats, try_fold
from optim.quant.grid import Grid, make_grid, nearest, ranges, restore, round_to
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import Awq, Gptq, Rtn
from optim.runtime.architectures import FAMILIES, Group
from optim.runtime.formats.packed import Scheme
from optim.runtime.walk import HiddenStates, StoredLinear, Walk, linear_at, linears

PROBE_TOKENS = 1024
STARVED = 0.125  # an expert that saw fewer tokens than this share of its inputs is rounded plainly


class RoundedLinear(StoredLinear):
    """A linear as it is stored after rounding: integers and a grid; `dense` is what runs."""

    def __init__(self, q: Tensor, grid: Grid, bias: Tensor | None) -> None:
        super().__init__(q.to(torch.uint8), bias)
        self.grid = grid

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Rows of the weight the integers stand for, float32 `[rows, in]`."""
        part = Grid(self.grid.scale[rows], self.grid.zero[rows], self.grid.scheme)
        return restore(self.weight[rows], part)


@dataclass(slots=True)
class Solved:
    """A compressed block and what it cost: squared errors of its output on the probe, relative."""

    block: nn.Module
    error: float | None
    rounding_error: float | None
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Inputs:
    """What a linear reads: gram XᵀX / n `[in, in]`, mean |x| `[in]`, tokens seen."""

    gram: Tensor
    magnitude: Tensor
    tokens: int


@dataclass(slots=True)
class BlockSolver:
    """Everything that is the same for every block of a run."""

    walk: Walk
    recipe: Awq | Gptq | Rtn
    schemes: Mapping[str, Scheme]
    """Canonical module name -> scheme, for each linear to be quantized."""
    dtype: torch.dtype
    """The dtype of the stored scales and norms."""

    def solve(self, i: int, states: HiddenStates) -> Solved:
        """Compress block i given its inputs; OptimError (2) for weights that are not finite."""
        block = self.walk.block(i)
        schemes = self._schemes(i, block)
        _refuse_non_finite(block, f"{self.walk.prefix}.{i}")
        hidden = states[slice(0, max(1, PROBE_TOKENS // states.length))]
        expected = self.walk.run(i, block, hidden)
        plain = {n: self._plain(linear_at(block, n), s) for n, s in schemes.items()}
        rounding_error = self._error(i, block, plain, hidden, expected)
        originals = {n: p.detach().clone() for n, p in _small_parameters(block)}
        notes: list[str] = []
        solved = self._solve_linears(i, block, schemes, states, (hidden, expected), notes)
        error = self._error(i, block, solved, hidden, expected)
        if not error < rounding_error:
            notes.append(f"plain rounding: the method's error {error:.3g} was no better")
            for name, parameter in _small_parameters(block):
                parameter.data.copy_(originals[name])
            solved, error = plain, rounding_error
        _replace(block, solved)
        return Solved(block, error, rounding_error, notes)

    def round(self, i: int) -> nn.Module:
        """Block i rounded plainly, with no calibration."""
        block = self.walk.block(i)
        _refuse_non_finite(block, f"{self.walk.prefix}.{i}")
        schemes = self._schemes(i, block)
        _replace(block, {n: self._plain(linear_at(block, n), s) for n, s in schemes.items()})
        return block

    def _schemes(self, i: int, block: nn.Module) -> dict[str, Scheme]:
        prefix = f"{self.walk.prefix}.{i}."
        names = (n for n in linears(block) if prefix + n in self.schemes)
        return {n: self.schemes[prefix + n] for n in names}

    def _plain(self, linear: StoredLinear, scheme: Scheme) -> RoundedLinear:
        q, grid = nearest(linear.dense(), scheme, self.dtype)
        return RoundedLinear(q, grid, linear.dense_bias())

    def _error(
        self,
        i: int,
        block: nn.Module,
        rounded: Mapping[str, RoundedLinear],
        hidden: Tensor,
        expected: Tensor,
    ) -> float:
        """Squared error of the block's output with `rounded` in place, relative to its update."""
        kept = {n: block.get_submodule(n) for n in rounded}
        _replace(block, rounded)
        got = self.walk.run(i, block, hidden)
        _replace(block, kept)
        scale = (expected - hidden.to(expected)).square().sum().clamp(min=1e-20)
        return float((got - expected).square().sum() / scale)

    def _solve_linears(
        self,
        i: int,
        block: nn.Module,
        schemes: Mapping[str, Scheme],
        states: HiddenStates,
        probe: tuple[Tensor, Tensor],
        notes: list[str],
    ) -> dict[str, RoundedLinear]:
        hidden = probe[0]
        leaders = _leaders(block, lambda: self.walk.run(i, block, hidden))
        inputs = observe(self.walk, i, block, states, {leaders[n] for n in schemes if n in leaders})
        starved = self._starved(block, schemes, leaders, inputs)
        if starved:
            notes.append(f"rounded plainly, too few tokens seen: {', '.join(starved)}")
        if isinstance(self.recipe, Awq):
            self._fold_scales(i, block, schemes, leaders, inputs, probe, notes)
        out = {}
        for name, scheme in schemes.items():
            linear = linear_at(block, name)
            if name in starved:
                out[name] = self._plain(linear, scheme)
            else:
                out[name] = self._round(linear, scheme, inputs[leaders[name]])
        return out

    def _starved(
        self,
        block: nn.Module,
        schemes: Mapping[str, Scheme],
        leaders: Mapping[str, str],
        inputs: Mapping[str, Inputs],
    ) -> list[str]:
        def enough(name: str) -> bool:
            seen = inputs.get(leaders.get(name, ""))
            least = STARVED * linear_at(block, name).in_features if ".experts." in name else 1
            return seen is not None and seen.tokens >= least

        return [name for name in schemes if not enough(name)]

    def _fold_scales(
        self,
        i: int,
        block: nn.Module,
        schemes: Mapping[str, Scheme],
        leaders: Mapping[str, str],
        inputs: Mapping[str, Inputs],
        probe: tuple[Tensor, Tensor],
        notes: list[str],
    ) -> None:
        """Search each group's scale and fold it, keeping the folds that change nothing."""
        run = lambda: self.walk.run(i, block, probe[0])  # noqa: E731
        model_type = self.walk.model.config.get_text_config().model_type
        groups, offset = family_groups(block, model_type)
        if model_type not in FAMILIES:
            groups = discover(block, run)
        for group in groups:
            scale = self._search(block, group, schemes, leaders, inputs)
            if scale is None:
                continue
            change = try_fold(
                block,
                group,
                scale,
                norm_offset=offset,
                norm_dtype=self.dtype,
                run=run,
                before=(probe[0].to(probe[1]), probe[1]),
            )
            if change is not None:
                notes.append(f"not folded: {group.source} (changes the block by {change:.2g})")

    def _search(
        self,
        block: nn.Module,
        group: Group,
        schemes: Mapping[str, Scheme],
        leaders: Mapping[str, str],
        inputs: Mapping[str, Inputs],
    ) -> Tensor | None:
        assert isinstance(self.recipe, Awq)
        seen = [n for n in group.readers if n in schemes and leaders.get(n) in inputs]
        seen = [n for n in seen if inputs[leaders[n]].tokens > 0]
        if not seen:
            return None
        readers = [
            awq.Reader(linear_at(block, n).dense(), inputs[leaders[n]].gram, schemes[n])
            for n in seen
        ]
        tokens = {leaders[n]: inputs[leaders[n]] for n in seen}.values()
        total = sum(t.tokens for t in tokens)
        magnitude = sum((t.magnitude * (t.tokens / total) for t in tokens), torch.zeros(()))
        forms = {"both": (False, True), True: (True,), False: (False,)}[self.recipe.duo]
        scale = awq.search_scale(
            readers,
            magnitude.to(readers[0].weight),
            n_grid=self.recipe.n_grid,
            forms=forms,
            repeats=query_repeats(block, group),
            dtype=self.dtype,
        )
        return None if bool((scale == 1).all()) else scale

    def _round(self, linear: StoredLinear, scheme: Scheme, inputs: Inputs) -> RoundedLinear:
        weight, gram = linear.dense(), inputs.gram
        if linear.in_scale is not None:
            gram = gram / torch.outer(linear.in_scale, linear.in_scale)
        if isinstance(self.recipe, Awq) and self.recipe.clip:
            grid = awq.search_clip(weight, gram, scheme, self.dtype)
        else:
            grid = make_grid(*ranges(weight, scheme), scheme, self.dtype)
        assert not isinstance(self.recipe, Rtn)
        if isinstance(self.recipe, Gptq) or self.recipe.compensate:
            q = gptq.solve(weight, grid, gram, self.recipe.damping)
        else:
            q = round_to(weight, grid)
        return RoundedLinear(q, grid, linear.dense_bias())


def observe(
    walk: Walk, i: int, block: nn.Module, states: HiddenStates, names: set[str]
) -> dict[str, Inputs]:
    """Run the calibration states through the block; the inputs of the linears in `names`."""
    found: dict[str, Inputs] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()
            if name not in found:
                zeros = torch.zeros(x.shape[1], device=x.device)
                found[name] = Inputs(zeros.new_zeros(len(zeros), len(zeros)), zeros, 0)
            seen = found[name]
            seen.gram.addmm_(x.T, x)
            seen.magnitude += x.abs().sum(0)
            seen.tokens += len(x)

        return hook

    handles = [block.get_submodule(n).register_forward_pre_hook(watch(n)) for n in names]
    try:
        for rows in walk.slices(states):
            walk.run(i, block, states[rows])
    finally:
        for handle in handles:
            handle.remove()
    for name, seen in found.items():
        seen.gram /= seen.tokens
        seen.magnitude /= seen.tokens
        if not bool(seen.gram.isfinite().all()):
            raise OptimError(
                f"block {i}: the inputs of {name} are not finite on the calibration text",
                fix="check the model's weights; a 16-bit overflow would show in its own output too",
                code=USAGE,
            )
    return found


def _leaders(block: nn.Module, run: Callable[[], Tensor]) -> dict[str, str]:
    """For each linear that ran, the first one that read the very same tensor."""
    first: dict[int, str] = {}
    leaders: dict[str, str] = {}
    kept: list[Tensor] = []  # alive, so that identities stay unique

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0])
            leaders[name] = first.setdefault(id(args[0]), name)

        return hook

    handles = [m.register_forward_pre_hook(watch(n)) for n, m in linears(block).items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return leaders


def _small_parameters(block: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that folds change: norms and routers, not the linears' weights."""
    owned = {id(p) for m in linears(block).values() for p in m.parameters()}
    return [(n, p) for n, p in block.named_parameters() if id(p) not in owned]


def _replace(block: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        block.set_submodule(name, module)


def _refuse_non_finite(block: nn.Module, prefix: str) -> None:
    for name, parameter in block.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            raise OptimError(
                f"{prefix}.{name} has values that are not finite",
                fix="the checkpoint is damaged, or was saved after an overflow: use another copy",
                code=USAGE,
            )
