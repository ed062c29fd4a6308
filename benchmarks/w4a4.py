"""What static integers lose on `demo`: the table of docs/mergequant.md.

    python benchmarks/w4a4.py [--windows FILE.npz] [--samples 16] [--evaluate 10] [--rows NAME ...]

`--windows` is an .npz with token ids of `demo`: `calibration` [n, 512], `evaluation` [m, 1024];
without it the built-in texts are used. Each row is a way to quantize, carried out and judged block
by block on the same tokens; "x" is its perplexity over the unquantized model's. Rows with a prefix
begin every window with the tokens that the calibration text asks for, and are compared with the
unquantized model without one, which is the stricter base.
"""

import argparse
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from optim.quant.mergequant.prefix import find_prefix
from optim.quant.mergequant.solver import Form, MergeSolver
from optim.runtime.formats.hadamard import mixing, random_signs
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.text.windows import calibration_windows, evaluation_windows
from optim.runtime.walk.walk import HiddenStates, Walk

STATIC = Form()
TOKENS = Form(norm="token", out="token", down="token", centred=False)
ROWS: dict[str, tuple[Form, bool]] = {
    "naive: one step a tensor, plain rounding": (
        Form(
            rotate=False,
            norm="tensor",
            out="tensor",
            down="tensor",
            mixed=False,
            feedback=False,
            clipped=False,
            centred=False,
        ),
        False,
    ),
    "dynamic: a step a token everywhere, clip tuned": (TOKENS, False),
    "static norms without centres, dynamic o and down": (
        Form(out="token", down="token", centred=False),
        False,
    ),
    "static norms, dynamic o and down": (Form(out="token", down="token"), False),
    "static norms, dynamic o and 8-bit down": (
        Form(out="token", down="token", down_bits=8),
        False,
    ),
    "static, no prefix": (STATIC, False),
    "static, prefix": (STATIC, True),
    "static, prefix, 8-bit down": (Form(down_bits=8), True),
    "static, no prefix, 8-bit down": (Form(down_bits=8), False),
    "W4A8 static, no prefix": (Form(bits=8, down_bits=8), False),
    "W4A8 static, prefix": (Form(bits=8, down_bits=8), True),
    "literal: split channels, dynamic o and down": (
        Form(rotate=False, out="token", down="token", centred=False),
        False,
    ),
    "literal: split channels, static, prefix, 8-bit down": (Form(rotate=False, down_bits=8), True),
}


def texts(path: str | None, samples: int, windows: int, base: Checkpoint) -> tuple[Tensor, Tensor]:
    """Calibration and evaluation windows."""
    if path is not None:
        data = np.load(path)
        pair = data["calibration"][:samples], data["evaluation"][:windows]
        return torch.from_numpy(pair[0].astype(np.int64)), torch.from_numpy(
            pair[1].astype(np.int64)
        )
    tokenizer = base.tokenizer()
    made = calibration_windows("builtin:mixed", tokenizer, num_samples=samples, seq_len=512, seed=0)
    return made, evaluation_windows("builtin:eval", tokenizer, window=1024, max_windows=windows)


def losses(walk: Walk, states: HiddenStates, windows: Tensor, first: int) -> Tensor:
    """Mean loss of each window `[n]`; the states begin with `first` tokens that are not judged."""
    found = []
    for i in range(len(windows)):
        logits = walk.logits(windows[i : i + 1], states[slice(i, i + 1)][:, first:])[0, :-1]
        found.append(torch.nn.functional.cross_entropy(logits, windows[i, 1:]))
    return torch.stack(found)


def plain(base: Checkpoint, windows: Tensor, folder: Path) -> Tensor:
    """The unquantized model's losses."""
    walk = Walk(base)
    states = walk.embed(windows, folder / "plain")
    for i in range(len(walk)):
        block = walk.block(i)
        for rows in walk.slices(states):
            states[rows] = walk.run(i, block, states[rows])
    return losses(walk, states, windows, 0)


def quantized(
    base: Checkpoint, form: Form, prefix: Tensor, calibration: Tensor, windows: Tensor, folder: Path
) -> tuple[Tensor, float]:
    """A form's losses, and the processor seconds that quantizing took."""
    walk, judge = Walk(base), Walk(base)
    width = int(base.text_config["hidden_size"])
    rotation = mixing(width, random_signs(width, 0)) if form.rotate else None
    solver = MergeSolver(walk, form, rotation, len(prefix))
    seen = judged = None
    with_prefix = [torch.cat((prefix.expand(len(w), -1), w), 1) for w in (calibration, windows)]
    seen = walk.embed(with_prefix[0], folder / "seen")
    judged = judge.embed(with_prefix[1], folder / "judged")
    used = 0.0
    for states in (seen, judged):
        solver.begin(states)
    for i in range(len(walk)):
        start = time.process_time()
        block = solver.solve(i, seen).block
        for rows in walk.slices(seen):
            seen[rows] = walk.run(i, block, seen[rows])
        used += time.process_time() - start
        for rows in judge.slices(judged):
            judged[rows] = judge.run(i, block, judged[rows])
    if rotation is not None:
        for rows in judge.slices(judged):
            judged[rows] = rotation.inverse(judged[rows])
    return losses(judge, judged, windows, len(prefix)), used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--evaluate", type=int, default=10)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="parts of their names")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of the Form, for trials")
    options = parser.parse_args()
    base = open_checkpoint("demo")
    calibration, windows = texts(options.windows, options.samples, options.evaluate, base)
    trial = {k: json.loads(v) for k, v in (item.split("=") for item in options.set)}
    parts = [[part] if part in ROWS else [n for n in ROWS if part in n] for part in options.rows]
    wanted = {name: ROWS[name] for names in parts for name in names}
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        expected = plain(base, windows, folder)
        print(json.dumps({"row": "unquantized", "ppl": round(math.exp(expected.mean()), 3)}))
        found = None
        for row, (form, prefixed) in wanted.items():
            if prefixed and found is None:
                found = torch.tensor(find_prefix(base, calibration, folder / "prefix"))
                print(json.dumps({"prefix": found.tolist()}), flush=True)
            prefix = found if prefixed and found is not None else torch.zeros(0, dtype=torch.int64)
            got, used = quantized(
                base, replace(form, **trial), prefix, calibration, windows, folder
            )
            ratio = got.mean() - expected.mean()
            error = (got - expected).std() / len(got) ** 0.5
            line = {
                "row": row,
                "ppl": round(math.exp(got.mean()), 2),
                "x": round(math.exp(ratio), 3),
                "error": round(math.exp(ratio) * float(error), 3),
                "cpu_s": round(used),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
