"""`optim plan`: a width for each linear, so that a budget is met and the end loss feels it least.

Every width is solved for all linears on little text; a gradient each tells what every linear costs
there (divergence.py); the knapsack finds the best widths for every size. Linears of those solved
models are then put together as the plan says, and that model is measured beside the uniform ones:
where a uniform width that fits is better, it is the plan.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from optim.quant.mixed.divergence import Judge
from optim.quant.mixed.knapsack import Frontier, frontier
from optim.quant.mixed.shrink import settled
from optim.quant.mixed.units import PLAIN, Unit, rest_bytes, units_of
from optim.quant.plan import AUTO_GROUPS, linear_shapes
from optim.quant.plan import plan as plan_of
from optim.quant.run import quantize
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import Calibration, Recipe
from optim.runtime.formats.schemes import Scheme
from optim.runtime.storage.checkpoint import Checkpoint, require_plain
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.system.devices import pick_device
from optim.runtime.system.paths import cache_folder
from optim.runtime.text.windows import windows_for
from optim.runtime.walk.walk import Walk

WIDTHS = (2, 3, 4, 8)
SOLVED_ON, JUDGED_ON = 8, 8  # windows of the text: for the widths, and others to judge by
JUDGED = 256  # tokens of these
TRIALS = 8  # plans that are measured to meet a divergence
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Budget:
    """What a plan has to meet: one of `nbytes` of all weights, `bits` a weight of the blocks, or a
    divergence, `max_kl`."""

    nbytes: int | None = None
    bits: float | None = None
    max_kl: float | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """How linears may be stored: `apart` where those that read one input need not have one width;
    with `lossless` what stays 16 bits is packed in 12."""

    method: str = "awq"
    group_size: int | None = None
    sym: bool = False
    widths: tuple[int, ...] = WIDTHS
    apart: bool = False
    lossless: bool = False
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Point:
    """One way to store the model: its bytes, bits a weight of the blocks, and what it diverges by:
    as its linears' costs add up, and measured on the widths that were solved."""

    name: str
    nbytes: int
    bits: float
    predicted: float
    kl: float


@dataclass(frozen=True, slots=True)
class Made:
    """A plan: the recipe that carries it out, and what it was chosen from."""

    recipe: Recipe
    chosen: Point
    uniform: tuple[Point, ...]
    widths: dict[str, dict[int, int]]
    """Kind of unit -> width -> how many units have it."""
    curve: tuple[tuple[int, float], ...]
    """Bytes and predicted divergence along the frontier."""

    def as_dict(self) -> dict[str, Any]:
        """For the screen and for `--json`."""
        return {
            "chosen": asdict(self.chosen),
            "uniform": [asdict(point) for point in self.uniform],
            "widths": self.widths,
            "frontier": self.curve,
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
        }


def make(
    source: str, text: Calibration, form: Form, budgets: Sequence[Budget], progress: Progress
) -> list[Made]:
    """Solve and measure once, and choose for each budget.

    Raises OptimError: 2 for a model that cannot be planned, or a budget that cannot be met.
    """
    checkpoint = open_checkpoint(source)
    require_plain(checkpoint)
    model = _Model.of(checkpoint, form)
    for budget in budgets:
        model.most(budget)
    place = cache_folder()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        bench = _Bench(model, text, form, Path(folder), progress)
        return [_plan(bench, source, text, form, budget) for budget in budgets]


def _plan(bench: "_Bench", source: str, text: Calibration, form: Form, budget: Budget) -> Made:
    model, whole = bench.model, bench.whole
    if budget.max_kl is not None:
        choices = _diverging(bench, budget.max_kl)
    else:
        choices = _fitting(whole, model.most(budget))
    chosen = bench.point(choices, "plan")
    for k, other in enumerate(bench.uniform):
        if _better(other, chosen, model.rest + model.most(budget), budget.max_kl):
            chosen, choices = other, [k] * len(model.units)
    return Made(
        recipe=_recipe(source, text, model, choices, form),
        chosen=chosen,
        uniform=bench.uniform,
        widths=_counted(model.units, choices, (*form.widths, PLAIN)),
        curve=tuple(
            (model.rest + int(size), float(cost))
            for size, cost in zip(whole.sizes, whole.costs, strict=True)
        ),
    )


@dataclass(frozen=True, slots=True)
class _Model:
    """What is to be planned, and the bytes of it."""

    checkpoint: Checkpoint
    schemes: tuple[Scheme, ...]
    units: list[Unit]
    rest: int
    """Bytes of what belongs to no unit."""
    weights: int
    """How many the units have together."""
    blocks: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, form: Form) -> "_Model":
        walk = Walk(checkpoint)
        shapes = {k: v for k, v in linear_shapes(checkpoint, walk).items() if k != walk.head_name}
        fits = (g for g in AUTO_GROUPS if all(inputs % g == 0 for _, inputs in shapes.values()))
        group = form.group_size or next(fits, -1)
        schemes = tuple(Scheme(bits, group, form.sym or bits == 8) for bits in form.widths)
        units = units_of(checkpoint, shapes, schemes, apart=form.apart, lossless=form.lossless)
        rest = rest_bytes(checkpoint, shapes, form.lossless)
        weights = sum(outputs * inputs for outputs, inputs in shapes.values())
        return cls(checkpoint, schemes, units, rest, weights, len(walk))

    def most(self, budget: Budget) -> int:
        """Bytes that the units may take; OptimError (2) where they cannot, or all can stay."""
        plain = sum(unit.sizes[-1] for unit in self.units)
        if budget.max_kl is not None:
            return plain
        wanted = (budget.bits or 0) * self.weights / 8
        most = int(wanted) if budget.nbytes is None else budget.nbytes - self.rest
        least = sum(min(unit.sizes) for unit in self.units)
        if most < least:
            bits = 8 * least / self.weights
            what = f"the smallest is {self.rest + least:,} bytes, {bits:.2f} bits a weight"
            raise OptimError(f"no choice of widths is so small: {what}", "ask for more", USAGE)
        if most >= plain:
            fix = "use it as it is, or ask for less"
            raise OptimError("the model fits without any quantization", fix, USAGE)
        return most


class _Bench:
    """The model solved at each width, and what its parts, put together, diverge by."""

    def __init__(
        self, model: _Model, text: Calibration, form: Form, folder: Path, progress: Progress
    ) -> None:
        few = text.model_copy(update={"num_samples": SOLVED_ON + JUDGED_ON})
        windows = windows_for(few, model.checkpoint.tokenizer())
        self.model = model
        step = _Steps(progress, model.blocks * (1 + 4 * len(model.schemes)))
        self.solved = [
            _solved(model.checkpoint, windows[:SOLVED_ON], scheme, form, folder, step)
            for scheme in model.schemes
        ]
        judged, device = windows[SOLVED_ON:, :JUDGED], pick_device(form.device)
        self.judge = Judge(model.checkpoint, judged, folder, device, step)
        self.costs = self._costs()
        items = zip(model.units, self.costs, strict=True)
        self.whole = frontier([(unit.sizes, costs) for unit, costs in items])
        self.uniform = tuple(
            self.point([k] * len(model.units), f"all {scheme.bits} bits")
            for k, scheme in enumerate(model.schemes)
        )

    def _costs(self) -> list[tuple[float, ...]]:
        """Of each unit at each scheme, never less than with more bits; as it is, nothing."""
        felt = [self.judge.shares(view.read) for view in self.solved]
        units = self.model.units
        shares = np.array(
            [[sum(each[name] for name in unit.linears) for each in felt] for unit in units]
        )
        costs = settled(shares, [unit.kind for unit in units])
        costs = np.maximum.accumulate(costs[:, ::-1], 1)[:, ::-1]
        return [(*row.tolist(), 0.0) for row in costs]

    def point(self, choices: Sequence[int], name: str) -> Point:
        """The model with a choice for each unit; the last one is to stay as it is."""
        model = self.model
        size = sum(unit.sizes[k] for unit, k in zip(model.units, choices, strict=True))
        predicted = sum(costs[k] for costs, k in zip(self.costs, choices, strict=True))
        bits, kl = 8 * size / model.weights, self.divergence(choices)
        return Point(name, model.rest + size, bits, predicted, kl)

    def divergence(self, choices: Sequence[int]) -> float:
        """Measured, in nats a token."""
        pairs = zip(self.model.units, choices, strict=True)
        of = {f"{name}.weight": k for unit, k in pairs for name in unit.linears}
        sources: list[PlainView | Checkpoint] = [*self.solved, self.model.checkpoint]
        return self.judge.divergence(lambda name: sources[of.get(name, -1)].read(name))


def _solved(
    checkpoint: Checkpoint,
    windows: Tensor,
    scheme: Scheme,
    form: Form,
    folder: Path,
    step: Callable[[str], None],
) -> PlainView:
    """The model at one width: with error feedback and no scales, which leaves norms as they are.

    Eight bits are rounded plainly, as rtn rounds all.
    """
    method = "rtn" if form.method == "rtn" or scheme.bits == 8 else "gptq"
    output = str(folder / f"{scheme.bits}-bits")
    made = {"version": 1, "model": checkpoint.source, "output": output}
    recipe = Recipe.model_validate(made | {"quantize": _section(method, scheme, [], [])})

    def progress(at: int, total: int, what: str) -> None:
        if at:
            step(f"{scheme.bits} bits, {what.partition(' · ')[0]}")

    quantize(plan_of(recipe, device=form.device), progress, windows)
    return PlainView(open_checkpoint(output))


class _Steps:
    """Counts what is done, of `total`."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.at = progress, total, 0

    def __call__(self, what: str) -> None:
        self.at = min(self.at + 1, self.total)
        self.progress(self.at, self.total, what)


def _fitting(whole: Frontier, most: int) -> list[int]:
    """The best choices of at most so many bytes."""
    return whole.choices(int(np.searchsorted(whole.sizes, most, side="right")) - 1)


def _better(one: Point, other: Point, most: int, max_kl: float | None) -> bool:
    """Whether `one` meets the budget and has less of what is to be little."""
    if max_kl is not None:
        return one.kl <= max_kl and one.nbytes < other.nbytes
    return one.nbytes <= most and one.kl < other.kl


def _diverging(bench: _Bench, max_kl: float) -> list[int]:
    """The smallest choices that are measured to diverge by no more, by bisection."""
    whole = bench.whole
    low, high = -1, len(whole.sizes) - 1  # plain weights do not diverge
    middle = int(np.argmax(whole.costs <= max_kl))
    for _ in range(TRIALS):
        if high - low < 2:
            break
        middle = min(max(middle, low + 1), high - 1)
        fine = bench.divergence(whole.choices(middle)) <= max_kl
        low, high = (low, middle) if fine else (middle, high)
        middle = (low + high) // 2
    return whole.choices(high)


def _counted(
    units: Sequence[Unit], choices: Sequence[int], widths: Sequence[int]
) -> dict[str, dict[int, int]]:
    found: dict[str, dict[int, int]] = {}
    for unit, choice in zip(units, choices, strict=True):
        found.setdefault(unit.kind, dict.fromkeys(widths, 0))[widths[choice]] += 1
    return found


def _recipe(
    source: str, text: Calibration, model: _Model, choices: Sequence[int], form: Form
) -> Recipe:
    """The most common width is the section's; the others are overrides, plain linears ignored."""
    named: dict[int, list[str]] = {}
    for unit, choice in zip(model.units, choices, strict=True):
        named.setdefault(choice, []).extend(unit.linears)
    schemes, plain = model.schemes, named.pop(len(model.schemes), [])
    common = max(named, key=lambda k: len(named[k]))
    overrides = [
        {"targets": names, "bits": schemes[k].bits, "sym": schemes[k].symmetric}
        for k, names in sorted(named.items())
        if k != common
    ]
    section = _section(form.method, schemes[common], plain, overrides)
    pack = {"pack": {"layout": "bf12"}} if form.lossless else {}
    data = {"version": 1, "model": source, "calibration": text.model_dump(), "quantize": section}
    return Recipe.model_validate(data | pack)


def _section(
    method: str, scheme: Scheme, plain: Sequence[str], overrides: Sequence[Any]
) -> dict[str, Any]:
    return {
        "method": method,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "ignore": ["lm_head", *plain],
        "overrides": overrides,
    }
