"""What each kind of activation sparsity costs on `demo`, decoded after a dense prompt.

    python benchmarks/sparsity_quality.py [--windows FILE.npz] [--max-windows 20] [--only WORD ...]

`--windows` is an .npz with token ids of `demo`: `calibration` [n, 512], `evaluation` [m, 1024].
Without it the built-in texts are used. The first half of each window is read densely, the loss is
taken on the second. `ratio` is to the dense model, `± %` its standard error over the windows,
`read` the share of the blocks' weights that a token needs. One JSON line a row.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optim.prune.coreinfer import share
from optim.prune.plan import plan
from optim.prune.pruner import Plan, Solved
from optim.recipes.build import build_recipe
from optim.runtime.measure.quality import evaluate_windows
from optim.runtime.sparsity.side_file import Side, make_side
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.text.windows import calibration_windows, evaluation_windows

BUDGETS = ("uniform", "measured")
ROWS: dict[str, list[str]] = {
    **{
        f"threshold {kind} {p:.0%}": [
            "prune.method=threshold",
            f"prune.sparsity={p}",
            f"prune.allocation={kind}",
        ]
        for p in (0.25, 0.4, 0.5)
        for kind in ("uniform", "greedy")
    },
    **{
        f"threshold {only} {p:.0%}": [
            "prune.method=threshold",
            f"prune.sparsity={p}",
            f"prune.only={only}",
        ]
        for only, p in (("down", 0.4), ("down", 0.6), ("ffn", 0.5), ("gate", 0.5))
    },
}


CORE_ROWS = [  # score, prior, budget, keep
    *(("energy", True, budget, keep) for keep in (0.4, 0.6, 0.8) for budget in BUDGETS),
    ("energy", False, "uniform", 0.4),
    ("griffin", False, "uniform", 0.4),
    ("paper", False, "uniform", 0.4),
]


def texts(file: str | None, samples: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration [samples, 512] and evaluation windows [count, 1024]."""
    if file is None:
        tokenizer = open_checkpoint("demo").tokenizer()
        given = calibration_windows(
            "builtin:mixed", tokenizer, num_samples=samples, seq_len=512, seed=0
        )
        return given, evaluation_windows("builtin:eval", tokenizer, window=1024, max_windows=count)
    data = np.load(file)
    parts = data["calibration"][:samples], data["evaluation"][:count]
    given, measured = (torch.from_numpy(part.astype(np.int64)) for part in parts)
    return given, measured


def solved(keys: list[str], windows: torch.Tensor) -> tuple[Plan, Solved]:
    """What a recipe's keys lead to on calibration windows."""
    recipe = build_recipe(None, {"model": "demo", "output": "/nowhere/x"}, keys)
    made = plan(recipe, force=True)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        assert made.method.solve is not None
        return made, made.method.solve(made, windows, Path(folder), lambda at, total, text: None)


def side_of(made: Plan, found: Solved) -> Side:
    """The side file's content."""
    section = made.recipe.prune
    assert section is not None
    return make_side(made.checkpoint, section.method, section.model_dump(), found.tensors)


def core_sides(windows: torch.Tensor, wanted: list[str]) -> dict[str, Side]:
    """The rows of CoreInfer: one calibration, the budgets and scores derived from it."""
    made, found = solved(["prune.method=coreinfer", "prune.keep=0.4"], windows)
    curves = [row["errors"] for row in found.blocks]
    losses = [row["kl_alone"] for row in found.blocks]
    sides = {}
    for score, prior, budget, keep in CORE_ROWS:
        name = f"core {score}{' +prior' if prior else ''} {budget} keep {keep}"
        if not any(word in name for word in wanted):
            continue
        drops = share(curves, losses, 0.4, keep) if budget == "measured" else [1 - keep] * 30
        tensors = {
            key: value
            for key, value in found.tensors.items()
            if (prior or not key.endswith("prior")) and (score != "paper" or "mean" not in key)
        }
        for i, drop in enumerate(drops):
            tensors[f"{made.facts.layers}.{i}.keep"] = torch.tensor(
                round((1 - drop) * made.neurons)
            )
        options = {"score": score, "alpha": 0.4, "guide": "auto"}
        sides[name] = make_side(made.checkpoint, "coreinfer", options, tensors)
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-windows", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[""])
    options = parser.parse_args()
    calibration, windows = texts(options.windows, options.samples, options.max_windows)
    demo = open_checkpoint("demo")
    wanted = {name: keys for name, keys in ROWS.items() if any(w in name for w in options.only)}
    sides = {name: side_of(*solved(keys, calibration)) for name, keys in wanted.items()}
    if any(word in "core energy griffin paper measured keep" for word in options.only):
        sides |= core_sides(calibration, options.only)
    found = evaluate_windows([demo] * len(sides), demo, windows, sides=list(sides.values()))
    for name, one in zip(sides, found, strict=True):
        row: dict[str, Any] = {
            "name": name,
            "read": round(one.read or 1, 3),
            "ratio": round(one.ppl_ratio or 0, 4),
            "error_percent": round(100 * (one.delta_nll_error or 0), 2),
            "kl": round(one.kl or 0, 4),
            "base": round(one.base_perplexity or 0, 3),
            "windows": one.windows,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
