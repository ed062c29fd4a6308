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

from optim.prune.plan import plan
from optim.prune.run import solve
from optim.recipes.build import build_recipe
from optim.runtime.checkpoint import open_checkpoint
from optim.runtime.corpus import calibration_windows, evaluation_windows
from optim.runtime.evaluate import evaluate_windows
from optim.runtime.side import Side, make_side
from optim.runtime.traffic import read_share

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
    **{
        f"core {score}{' +prior' if prior else ''} {budget} keep {keep}": [
            "prune.method=coreinfer",
            f"prune.keep={keep}",
            f"prune.score={score}",
            f"prune.prior={str(prior).lower()}",
            f"prune.bias={str(score != 'paper').lower()}",
            f"prune.budget={budget}",
        ]
        for keep in (0.4, 0.6, 0.8)
        for score, prior, budget in (
            ("paper", False, "uniform"),
            ("griffin", False, "uniform"),
            ("energy", False, "uniform"),
            ("energy", True, "uniform"),
            ("energy", True, "measured"),
            ("griffin", True, "uniform"),
            ("griffin", True, "measured"),
        )
    },
}


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


def solved(keys: list[str], windows: torch.Tensor) -> tuple[Side, dict[str, int]]:
    """The side that a recipe's keys lead to."""
    recipe = build_recipe(None, {"model": "demo", "output": "/nowhere/x"}, keys)
    made = plan(recipe, force=True)
    assert recipe.prune is not None
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        found = solve(made, windows, Path(folder), lambda at, total, text: None)
    options = recipe.prune.model_dump(mode="json")
    return make_side(made.checkpoint, recipe.prune.method, options, found.tensors), made.sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-windows", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[""])
    options = parser.parse_args()
    calibration, windows = texts(options.windows, options.samples, options.max_windows)
    demo = open_checkpoint("demo")
    chosen = {name: keys for name, keys in ROWS.items() if any(w in name for w in options.only)}
    sides = [solved(keys, calibration) for keys in chosen.values()]
    found = evaluate_windows([demo] * len(sides), demo, windows, sides=[side for side, _ in sides])
    for name, one, (_, sizes) in zip(chosen, found, sides, strict=True):
        row: dict[str, Any] = {
            "name": name,
            "read": round(read_share(one.skipped or [], sizes), 3),
            "ratio": round(one.ppl_ratio or 0, 4),
            "error_percent": round(100 * (one.delta_nll_error or 0), 2),
            "kl": round(one.kl or 0, 4),
            "base": round(one.base_perplexity or 0, 3),
            "windows": one.windows,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
