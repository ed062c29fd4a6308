"""What each form of the solver loses on `demo`, on two texts: the table of docs/awq.md.

    python benchmarks/quality.py [--windows FILE.npz] [--samples 16] [--bits 4 3] [--forms awq]

`--windows` is an .npz with token ids of `demo`: `calibration` [n, 512], `evaluation` [m, 1024].
Without it, or with `--calibration`, calibration comes from built-in or other text; with `--mixed`
half is the file's and half builtin:mixed. Text A is `evaluation` (its first 10 windows), text B is
builtin:eval (chats, code, several languages). `--keep FOLDER` is where artifacts stay: a later run
with the same settings measures them again, and a run that was stopped goes on there.
"Taken back" is the share of plain rounding's loss of log-likelihood that a form recovers.

A form that ends in `+tune` goes on from the form before it with `optim tune` on the same tokens.
The forms `llm-compressor` (its AWQ) and `auto-round` (200 iterations) are those packages' own work
on the same tokens, where they are installed; seconds of each form are printed as it is made.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
    path: str | None, spec: str | None, samples: int, mixed: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Calibration windows and the evaluation windows of each text."""
    tokenizer = open_checkpoint("demo").tokenizer()
    count = samples // 2 if mixed else samples
    evaluations = {"B": evaluation_windows("builtin:eval", tokenizer, window=1024, max_windows=10)}
    if path is not None:
        data = np.load(path)
        a = torch.from_numpy(data["evaluation"][:10].astype(np.int64))
        evaluations = {"A": a} | evaluations
        given = torch.from_numpy(data["calibration"][:count].astype(np.int64))
        if spec is None and not mixed:
            return given, evaluations
    windows = calibration_windows(
        spec or "builtin:mixed", tokenizer, num_samples=count, seq_len=512, seed=0
    )
    if not mixed:
        return windows, evaluations
    return torch.stack((given, windows), 1).flatten(0, 1), evaluations  # in turn


def make(
    form: str, bits: int, asked: argparse.Namespace, windows: torch.Tensor, folder: Path
) -> Checkpoint:
    """One artifact; prints what it cost."""
    out = folder / f"{form}-{bits}{'-sym' if asked.sym else ''}-g{asked.group}"
    if out.is_dir():  # a tuned form has needed it
        return open_checkpoint(str(out))
    if form.endswith(TUNE):
        before = make(form.removesuffix(TUNE), bits, asked, windows, folder).folder
        with timed(out.name):
            text = Calibration(num_samples=len(windows), seq_len=windows.shape[1])
            tune(str(before), "demo", str(out), text, Asked(), said_nothing, windows=windows)
        return open_checkpoint(str(out))
    keys = {"model": "demo", "output": str(out), "quantize.bits": bits, "quantize.sym": asked.sym}
    fitted = [] if form == "rtn" else asked.set
    recipe = build_recipe(None, keys | {"quantize.group_size": asked.group} | FORMS[form], fitted)
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


@contextmanager
def temporary() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows")
    parser.add_argument("--calibration", help="a spec, in place of the file's windows")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--sym", action="store_true")
    parser.add_argument("--mixed", action="store_true", help="half the file's, half built-in text")
    parser.add_argument("--keep", type=Path, help="a folder where the artifacts stay")
    parser.add_argument("--set", action="append", default=[], help="as quantize.damping=0.3")
    tuned = [form + TUNE for form in FORMS if form != "rtn"]
    known = [*FORMS, *tuned, *installed()]
    parser.add_argument("--forms", nargs="+", default=[*FORMS, *installed()], choices=known)
    asked = parser.parse_args()
    calibration, evaluations = texts(asked.windows, asked.calibration, asked.samples, asked.mixed)
    base = open_checkpoint("demo")
    if asked.keep:
        asked.keep.mkdir(exist_ok=True)
    with nullcontext(asked.keep) if asked.keep else temporary() as folder:
        for bits in asked.bits:
            made = {}
            for form in dict.fromkeys(["rtn", *asked.forms]):
                if form in PEERS:
                    out = PEERS[form].make(bits, asked.group, asked.sym, calibration, folder)
                    made[form] = open_checkpoint(str(out))
                else:
                    made[form] = make(form, bits, asked, calibration, folder)
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
