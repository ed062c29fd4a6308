"""What each form of the solver loses on `demo`, on two texts: the table of docs/awq.md.

    python benchmarks/quality.py [--windows FILE.npz] [--samples 16] [--bits 4 3] [--forms awq]

`--windows` is an .npz with token ids of `demo`: `calibration` [n, 512], `evaluation` [m, 1024].
Without it, or with `--calibration`, calibration comes from built-in or other text. Text A is
`evaluation` (its first 10 windows), text B is builtin:eval (chats, code, several languages).
"Taken back" is the share of plain rounding's loss of log-likelihood that a form recovers.

A form that ends in `+tune` goes on from the form before it with `optim tune` on the same tokens.
The forms `llm-compressor` (its AWQ) and `auto-round` (200 iterations) are those packages' own work
on the same tokens, where they are installed; seconds of each form are printed as it is made.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from quality_peers import PEERS, installed, timed

from optim.quant.run import plan, quantize
from optim.quant.tune.run import tune
from optim.quant.tune.train import Asked
from optim.recipes.build import build_recipe
from optim.recipes.schema import Calibration
from optim.runtime.measure.quality import Evaluation, evaluate_windows
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.text.windows import calibration_windows, evaluation_windows

TUNE = "+tune"
FORMS = {
    "rtn": {"quantize.method": "rtn"},
    "gptq": {"quantize.method": "gptq"},
    "awq": {"quantize.method": "awq", "quantize.compensate": False},
    "awq+feedback": {"quantize.method": "awq", "quantize.compensate": True},
    "awq+guide": {"quantize.method": "awq", "quantize.guide": "loss"},
    "gptq+guide": {"quantize.method": "gptq", "quantize.guide": "loss"},
}


def texts(
    path: str | None, spec: str | None, samples: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Calibration windows and the evaluation windows of each text."""
    tokenizer = open_checkpoint("demo").tokenizer()
    evaluations = {"B": evaluation_windows("builtin:eval", tokenizer, window=1024, max_windows=10)}
    if path is not None:
        data = np.load(path)
        a = torch.from_numpy(data["evaluation"][:10].astype(np.int64))
        evaluations = {"A": a} | evaluations
        if spec is None:
            given = data["calibration"][:samples].astype(np.int64)
            return torch.from_numpy(given), evaluations
    windows = calibration_windows(
        spec or "builtin:mixed", tokenizer, num_samples=samples, seq_len=512, seed=0
    )
    return windows, evaluations


def make(
    form: str, bits: int, sym: bool, windows: torch.Tensor, folder: Path, sets: Sequence[str] = ()
) -> Checkpoint:
    """One artifact; prints what it cost. `sets`: keys of the forms that are fitted to text."""
    out = folder / f"{form}-{bits}{'-sym' if sym else ''}"
    if out.is_dir():  # a tuned form has needed it
        return open_checkpoint(str(out))
    if form.endswith(TUNE):
        before = make(form.removesuffix(TUNE), bits, sym, windows, folder, sets).folder
        with timed(out.name):
            text = Calibration(num_samples=len(windows), seq_len=windows.shape[1])
            tune(str(before), "demo", str(out), text, Asked(), said_nothing, windows=windows)
        return open_checkpoint(str(out))
    keys = {"model": "demo", "output": str(out), "quantize.bits": bits, "quantize.sym": sym}
    fitted = [] if form == "rtn" else list(sets)
    recipe = build_recipe(None, keys | {"quantize.group_size": 64} | FORMS[form], fitted)
    with timed(out.name):
        quantize(plan(recipe), said_nothing, None if form == "rtn" else windows)
    return open_checkpoint(str(out))


def said_nothing(_at: int, _total: int, _text: str) -> None:
    """No progress is shown."""


def row(name: str, text: str, found: Evaluation, lost: float) -> dict[str, object]:
    """One line of the table."""
    assert found.delta_nll is not None
    return {
        "form": name,
        "text": text,
        "ppl": round(found.perplexity, 3),
        "base": round(found.base_perplexity or 0, 3),
        "delta_nll": round(found.delta_nll, 4),
        "error": round(found.delta_nll_error or 0, 4),
        "kl": round(found.kl or 0, 4),
        "taken_back": round(1 - found.delta_nll / lost, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows")
    parser.add_argument("--calibration", help="a spec, in place of the file's windows")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--sym", action="store_true")
    parser.add_argument("--set", action="append", default=[], help="as quantize.damping=0.3")
    tuned = [form + TUNE for form in FORMS if form != "rtn"]
    known = [*FORMS, *tuned, *installed()]
    parser.add_argument("--forms", nargs="+", default=[*FORMS, *installed()], choices=known)
    options = parser.parse_args()
    calibration, evaluations = texts(options.windows, options.calibration, options.samples)
    base = open_checkpoint("demo")
    with tempfile.TemporaryDirectory() as folder:
        for bits in options.bits:
            made = {}
            for form in dict.fromkeys(["rtn", *options.forms]):
                if form in PEERS:
                    out = PEERS[form].make(bits, options.sym, calibration, Path(folder))
                    made[form] = open_checkpoint(str(out))
                else:
                    made[form] = make(
                        form, bits, options.sym, calibration, Path(folder), options.set
                    )
            for text, windows in evaluations.items():
                found = dict(
                    zip(made, evaluate_windows(list(made.values()), base, windows), strict=True)
                )
                lost = found["rtn"].delta_nll
                assert lost is not None
                for form, result in found.items():
                    print(json.dumps(row(f"{form} w{bits}", text, result, lost)), flush=True)


if __name__ == "__main__":
    main()
