"""Planned widths beside uniform ones: KL from the original, and the error of their difference.

    python benchmarks/mixed_widths.py MODEL [--apart] [--method awq] [--bits 3.3 3.8 4.32]

For each budget, in bits a weight of the blocks, the plan is carried out and measured beside the
widest uniform width that fits. Windows are 512 tokens of builtin:eval; the text of the plan and of
the method is builtin:mixed.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from optim.quant.mixed.run import Budget, Form, Point, make
from optim.quant.run import plan, quantize
from optim.recipes.build import build_recipe
from optim.recipes.schema import Recipe
from optim.runtime.measure.quality import evaluate_windows
from optim.runtime.storage.manifest import read_manifest
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.text.windows import evaluation_windows

WINDOW = 512


def main() -> None:
    """Make, measure, print a row a budget."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--method", default="awq")
    parser.add_argument("--bits", type=float, nargs="*", default=[3.3, 3.8, 4.32])
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16, help="windows for the method")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        _compare(given, Path(name))


def _compare(given: argparse.Namespace, folder: Path) -> None:
    text = {"calibration.num_samples": given.samples, "calibration.seq_len": 512}
    recipe = build_recipe(None, text | {"model": given.model, "quantize.method": given.method})
    start = time.process_time()
    budgets = [Budget(bits=bits) for bits in given.bits]
    plans = make(
        given.model,
        recipe.calibration,
        Form(given.method, apart=given.apart),
        budgets,
        lambda *_: None,
    )
    print(f"# {len(plans)} plans in {time.process_time() - start:.0f} s of CPU", flush=True)
    places: dict[str, Path] = {}
    base = open_checkpoint(given.model)
    tokenizer = base.tokenizer()
    windows = evaluation_windows(
        "builtin:eval", tokenizer, window=WINDOW, max_windows=given.windows
    )
    print("| budget, bits | plan, bytes | KL | uniform | bytes | KL | plan less uniform |")
    print("|---|---|---|---|---|---|---|")
    for bits, made in zip(given.bits, plans, strict=True):
        print(f"# {made.chosen}; {made.widths}", flush=True)
        below = [point for point in made.uniform if point.bits <= bits + 1e-3][-1]
        pair = [
            _stored(f"plan-{bits}", made.recipe, places, folder),
            _stored(below.name, _uniform(recipe, below), places, folder),
        ]
        sizes = [read_manifest(place).bytes for place in pair]  # type: ignore[union-attr]
        models = [open_checkpoint(str(place)) for place in pair]
        found = torch.tensor(
            [
                [e.kl for e in evaluate_windows(models, base, one[None], begin=tokenizer.begin)]
                for one in windows
            ]
        )
        means, apart = found.mean(0), found[:, 0] - found[:, 1]
        error = float(apart.std() / len(apart) ** 0.5)
        print(
            f"| {bits} | {sizes[0]:,} | {means[0]:.4f} | {below.name} | {sizes[1]:,} "
            f"| {means[1]:.4f} | {apart.mean():.4f} +- {error:.4f} |",
            flush=True,
        )


def _uniform(recipe: Recipe, point: Point) -> Recipe:
    bits = int(point.name.split()[1])
    section = recipe.quantize.model_copy(update={"bits": bits, "sym": bits == 8})  # type: ignore[union-attr]
    return recipe.model_copy(update={"quantize": section})


def _stored(name: str, recipe: Recipe, places: dict[str, Path], folder: Path) -> Path:
    if name not in places:
        places[name] = folder / name.replace(" ", "-")
        start = time.process_time()
        recipe = recipe.model_copy(update={"output": str(places[name])})
        quantize(plan(recipe), lambda *_: None)
        print(f"# {name}: {time.process_time() - start:.0f} s of CPU", flush=True)
    return places[name]


if __name__ == "__main__":
    main()
