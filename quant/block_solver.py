"""Solve one block: observe what its linears read, fold scales, clip, round, and compare.

The block is run on the calibration states as the blocks before it, already compressed, left them.
Each linear's input becomes one Gram matrix. After solving, the block's output on a probe is
measured against plain rounding of the same block; a block that got worse is rounded plainly and
says so.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optim.quant import awq, gptq
from optim.quant.attempts import Attempt, replace
from optim.quant.fold import Probe, discover, family_groups, fold_checked, query_repeats
from optim.quant.grid import Grid
from optim.quant.guide import Costs, Guide, compared
from optim.quant.observe import GRAM_BYTES, Inputs, leaders_of, observe
from optim.quant.rounding import (
    NearestLinear,
    RoundedLinear,
    descend_linear,
    round_linear,
    round_rows,
    row_groups,
)
from optim.quant.solver import Solved, Task
from optim.quant.stored import block_tensors
from optim.recipes.schema import Awq, Gptq, Guided
from optim.runtime.architecture.table import FAMILIES, Group
from optim.runtime.formats.pack_quantized import Scheme, write_config
from optim.runtime.storage.foreign.blocks import blocks_config
from optim.runtime.system.memory import release_memory
from optim.runtime.walk.skeleton import EXPERT_PARTS
from optim.runtime.walk.walk import HiddenStates, StoredLinear, linear_at, linears

PROBE_TOKENS = 512
WIDE_BYTES = 256 * 2**20
INNER = EXPERT_PARTS[2]
Way = tuple[Mapping[str, str], Mapping[str, Tensor] | None]
"""How a block is solved: linears that share one Gram matrix by its first, and tokens' weights."""
SCARCE = 2.0  # with sweeps the damping grows by this times inputs over effective tokens
STARVED = 0.125  # an expert that saw fewer tokens than this share of its inputs is rounded plainly


class BlockSolver:
    """What the weight-only methods share: everything that is the same for every block of a run.

    `clip` searches each group's range; `damping` is that of the error feedback, and without one
    rounding is plain and the scales are refitted.
    """

    def __init__(self, task: Task, clip: bool, damping: float | None) -> None:
        self.walk, self.checkpoint, self.windows = task.walk, task.checkpoint, task.windows
        self.schemes, self.dtype, self.team = task.schemes, task.dtype, task.team
        self.clip, self.damping = clip, damping
        section = task.recipe.quantize
        self.guide: Guide | None = None
        self.sweeps = section.sweeps if isinstance(section, Guided) else 0
        if isinstance(section, Guided) and section.guides:
            self.guide = Guide.of(task, section.guide_groups)

    def enter(self, states: HiddenStates) -> None:
        """Block 0 reads the embedded tokens as they are."""

    def tensors(self, block: nn.Module, prefix: str) -> dict[str, Tensor]:
        """Packed linears, and the rest in its own dtype."""
        return block_tensors(block, prefix, self.checkpoint, self.dtype)

    def config(self, schemes: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
        """That of compressed-tensors, or of GGUF's blocks."""
        blocks = {name: s.blocks for name, s in schemes.items() if s.blocks is not None}
        return blocks_config(blocks) if blocks else write_config(schemes, ignored)

    def solve(self, i: int, states: HiddenStates | None) -> Solved:
        """Compress block i given its inputs; OptimError (2) for weights that are not finite."""
        assert states is not None
        block = self.walk.block(i)
        schemes = self._schemes(i, block)
        hidden = self.team.share(states[slice(0, max(1, PROBE_TOKENS // states.length))])
        leaders, expected = leaders_of(block, lambda: self.walk.run(i, block, hidden))
        plain = {n: self._nearest(linear_at(block, n), s) for n, s in schemes.items()}
        rounding_error = self._error(i, block, plain, hidden, expected)
        probe = Probe(hidden.to(expected), expected, lambda: self.walk.run(i, block, hidden))
        own, untouched, held_back = linears(block), Attempt.of(block, {}, []), None
        if self.guide is None:
            best = self._attempt(i, block, schemes, states, (leaders, None), probe)
        else:
            best, held_back = self._guided(i, block, schemes, states, leaders, probe, plain)
        best.put(block, own)
        error, notes = self._error(i, block, {}, hidden, expected), best.notes
        if not error < rounding_error:
            notes.append(f"plain rounding: the method's error {error:.3g} was no better")
            untouched.put(block, own)
            replace(block, {n: linear.rounded() for n, linear in plain.items()})
            error = rounding_error
        return Solved(block, error, rounding_error, notes, held_back)

    def _guided(
        self,
        i: int,
        block: nn.Module,
        schemes: Mapping[str, Scheme],
        states: HiddenStates,
        leaders: Mapping[str, str],
        probe: Probe,
        plain: Mapping[str, NearestLinear],
    ) -> tuple[Attempt, Costs | None]:
        """The block solved guided or, where that has clearly cost the end loss more on held-back
        text so far, unguided; and what both cost there, where that is looked at."""
        assert self.guide is not None
        found = self.guide.block(i, block)
        each = {name: name for name in leaders}  # linears that read the same weigh it differently
        ways: dict[str, Way] = {"guided": (each, found.weights), "unguided": (leaders, None)}
        if self.guide.checks_at(i):
            own, untouched = linears(block), Attempt.of(block, {}, [])
            cost, costs = found.cost(self.walk, i, block, states), {}
            for name, way in ways.items():
                fitted = self.guide.fitted
                self._attempt(i, block, schemes, states, way, probe, fitted).put(block, own)
                costs[name] = cost()
                untouched.put(block, own)
            replace(block, plain)
            self.guide.checks[i] = compared(**costs, rounding=cost())
            replace(block, own)
        better = "guided" if self.guide.pays else "unguided"
        best = self._attempt(i, block, schemes, states, ways[better], probe)
        if better != "guided":
            best.notes.append("unguided: guiding has clearly cost more on held-back text so far")
        return best, self.guide.checks.get(i)

    def _schemes(self, i: int, block: nn.Module) -> dict[str, Scheme]:
        prefix = f"{self.walk.prefix}.{i}."
        names = (n for n in linears(block) if prefix + n in self.schemes)
        return {n: self.schemes[prefix + n] for n in names}

    def _nearest(self, linear: StoredLinear, scheme: Scheme) -> NearestLinear:
        return NearestLinear(linear, scheme, self.dtype)

    def _error(
        self,
        i: int,
        block: nn.Module,
        rounded: Mapping[str, StoredLinear],
        hidden: Tensor,
        expected: Tensor,
    ) -> float:
        """Squared error of the block's output with `rounded` in place, relative to its update."""
        kept = {n: block.get_submodule(n) for n in rounded}
        replace(block, rounded)
        got = self.walk.run(i, block, hidden)
        replace(block, kept)
        scale = (expected - hidden.to(expected)).square().sum().clamp(min=1e-20)
        return float((got - expected).square().sum() / scale)

    def _attempt(
        self,
        i: int,
        block: nn.Module,
        schemes: Mapping[str, Scheme],
        states: HiddenStates,
        way: Way,
        probe: Probe,
        fitted: int | None = None,
    ) -> Attempt:
        """Solve the block's linears on the first `fitted` windows, or all; its norms and its
        linears' scales change."""
        notes: list[str] = []
        leaders, weights = way
        # Which expert runs last differs from batch to batch.
        last = None if any(".experts." in n for n in leaders) else list(leaders)[-1]
        starved = [n for n in schemes if n not in leaders]
        out: dict[str, RoundedLinear] = {}
        for needed in _turns(block, {leaders[n] for n in schemes if n in leaders}):
            inputs = observe(self.walk, i, block, states, needed, last, weights, fitted, self.team)
            readers = {n: s for n, s in schemes.items() if leaders.get(n) in needed}
            few = _starved(block, readers, leaders, inputs)
            self._fold_scales(block, readers, leaders, inputs, probe, notes)
            enough = {n: s for n, s in readers.items() if n not in few}
            out |= self._round_all(block, enough, leaders, inputs)
            starved += few
        if starved:
            notes.append(f"rounded plainly, too few tokens seen: {', '.join(starved)}")
        out |= {n: self._nearest(linear_at(block, n), schemes[n]).rounded() for n in starved}
        return Attempt.of(block, {name: out[name] for name in schemes}, notes)

    def _round_all(
        self,
        block: nn.Module,
        schemes: Mapping[str, Scheme],
        leaders: Mapping[str, str],
        inputs: dict[str, Inputs],
    ) -> dict[str, RoundedLinear]:
        """Every linear rounded; the widest inputs first, each Gram matrix freed after its last."""
        readers: dict[str, list[str]] = {}
        for name in schemes:
            readers.setdefault(leaders[name], []).append(name)

        def solve(leader: str) -> dict[str, RoundedLinear]:
            seen = inputs.pop(leader)
            grams = seen.grams
            scale = linear_at(block, leader).in_scale
            if scale is not None:
                for gram in grams:
                    gram /= scale
                    gram /= scale[:, None]
            linears_ = {n: linear_at(block, n) for n in readers[leader]}
            if grams[0].nbytes >= WIDE_BYTES:  # it needs room: nothing may linger in the heap
                release_memory()
            return self._round_readers(linears_, schemes, grams, seen.scarcity())

        widest = sorted(readers, key=lambda n: -len(inputs[n].magnitude))
        return {n: each for part in self.team.divide(widest, solve) for n, each in part.items()}

    def _round_readers(
        self,
        readers: Mapping[str, StoredLinear],
        schemes: Mapping[str, Scheme],
        grams: list[Tensor],
        scarcity: list[float],
    ) -> dict[str, RoundedLinear]:
        """The linears that read one input, some rows at a time; uses up `grams`, the input's."""
        used = {schemes[name] for name in readers}
        blocks = {
            s: [awq.diagonal_blocks(gram, s) if self.clip else None for gram in grams] for s in used
        }
        known: Sequence[gptq.Feedback | Tensor] = grams
        if self.damping is not None:
            more = SCARCE if self.sweeps else 0.0
            damping = [self.damping + more * each for each in scarcity]
            known = [gptq.feedback(*pair) for pair in zip(grams, damping, strict=True)]
        out = {}
        for name, linear in readers.items():
            scheme = schemes[name]

            def solve(
                rows: slice, k: int, linear: StoredLinear = linear, scheme: Scheme = scheme
            ) -> tuple[Tensor, Grid]:
                weight = linear.dense(rows)
                return round_rows(weight, scheme, blocks[scheme][k], known[k], self.dtype)

            out[name] = round_linear(linear, scheme, solve, len(grams))
        if self.sweeps:
            damped = [each.gram() if isinstance(each, gptq.Feedback) else each for each in known]
            for name, linear in readers.items():
                descend_linear(linear, out[name], damped, self.sweeps, self.dtype)
        return out

    def _fold_scales(
        self,
        block: nn.Module,
        schemes: Mapping[str, Scheme],
        leaders: Mapping[str, str],
        inputs: Mapping[str, Inputs],
        probe: Probe,
        notes: list[str],
    ) -> None:
        """Scale what is about to be rounded, where a method does."""


class GptqSolver(BlockSolver):
    """gptq: error feedback, and nothing before it."""

    def __init__(self, task: Task) -> None:
        section = task.recipe.quantize
        assert isinstance(section, Gptq)
        super().__init__(task, clip=False, damping=section.damping)


class AwqSolver(BlockSolver):
    """awq: scales that are folded into the layers before, clipped ranges, then error feedback."""

    def __init__(self, task: Task) -> None:
        section = task.recipe.quantize
        assert isinstance(section, Awq)
        super().__init__(task, section.clip, section.damping if section.compensate else None)
        self.recipe = section

    def _fold_scales(
        self,
        block: nn.Module,
        schemes: Mapping[str, Scheme],
        leaders: Mapping[str, str],
        inputs: Mapping[str, Inputs],
        probe: Probe,
        notes: list[str],
    ) -> None:
        """Search each group's scale and fold those that change nothing."""
        model_type = self.walk.model.config.get_text_config().model_type
        groups, offset = family_groups(block, model_type)
        if model_type not in FAMILIES:
            groups = discover(block, probe.run)
        found = self.team.divide(
            groups, lambda group: self._search(block, group, schemes, leaders, inputs)
        )
        pairs = zip(groups, found, strict=True)
        folds = [(group, scale) for group, scale in pairs if scale is not None]
        for group, change in fold_checked(block, folds, offset, self.dtype, probe):
            notes.append(f"not folded: {group.source} (changes the block by {change:.2g})")

    def _search(
        self,
        block: nn.Module,
        group: Group,
        schemes: Mapping[str, Scheme],
        leaders: Mapping[str, str],
        inputs: Mapping[str, Inputs],
    ) -> Tensor | None:
        seen = [n for n in group.readers if n in schemes and leaders.get(n) in inputs]
        seen = [n for n in seen if inputs[leaders[n]].tokens > 0]
        if not seen:
            return None
        readers = [
            awq.Reader(weight, gram, schemes[n])
            for n in seen
            for weight, gram in _sampled(linear_at(block, n), inputs[leaders[n]].grams)
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


class NearestSolver(BlockSolver):
    """rtn: each block rounded plainly, with no calibration."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, clip=False, damping=None)

    def solve(self, i: int, states: HiddenStates | None) -> Solved:
        """Round block i; OptimError (2) for weights that are not finite."""
        block = self.walk.block(i)
        for name, scheme in self._schemes(i, block).items():
            plain = self._nearest(linear_at(block, name), scheme)
            block.set_submodule(name, plain.rounded())
        return Solved(block, None, None)


def _turns(block: nn.Module, names: set[str]) -> list[set[str]]:
    """Which inputs are observed at a time: all, or experts' inner ones in turns of GRAM_BYTES.

    The rest comes last: what an inner input is scaled by is divided out of rows of the rest.
    """
    sizes = {n: 4 * linear_at(block, n).in_features ** 2 for n in sorted(names)}
    inner = {n: size for n, size in sizes.items() if ".experts." in n and n.endswith(INNER)}
    turns: list[set[str]] = [set()]
    for name, size in inner.items():
        if turns[-1] and sum(sizes[n] for n in turns[-1]) + size > GRAM_BYTES:
            turns.append(set())
        turns[-1].add(name)
    rest = names - inner.keys()
    return [turns[0] | rest] if len(turns) == 1 else [*turns, rest]


def _starved(
    block: nn.Module,
    schemes: Mapping[str, Scheme],
    leaders: Mapping[str, str],
    inputs: Mapping[str, Inputs],
) -> list[str]:
    """The linears that saw too little text to be fitted to it."""

    def enough(name: str) -> bool:
        seen = inputs.get(leaders[name])
        least = STARVED * linear_at(block, name).in_features if ".experts." in name else 1
        return seen is not None and seen.tokens >= least

    return [name for name in schemes if not enough(name)]


def _sampled(linear: StoredLinear, grams: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows that the scale search looks at, standing for all of them in a sum of squares; each
    group of rows with its gram."""
    step = awq.sampled_rows(linear.out_features, linear.in_features).step
    for rows, gram in zip(row_groups(linear.out_features, len(grams)), grams, strict=True):
        yield linear.dense(slice(rows.start, rows.stop, step)) * math.sqrt(step), gram
