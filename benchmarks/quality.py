"""What each form of the solver loses on `demo`, on two texts: the table of docs/awq.md.

    python benchmarks/quality.py [--windows FILE.npz] [--samples 16] [--bits 4 3] [--forms awq]

`--windows` is an .npz with token ids of `demo`: `calibration` [n, 512], `evaluation` [m, 1024].
Without it, or with `--calibration`, calibration comes from built-in or other text. Text A is
`evaluation` (its first 10 windows), text B is builtin:eval (chats, code, several languages).
"Taken back" is the share of plain rounding's loss of log-likelihood that a form recovers.

The form `llm-compressor` is that package's own AWQ on the same tokens, where it is installed.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from optim.quant.run import plan, quantize
from optim.recipes.build import build_recipe
from optim.runtime.measure.quality import Evaluation, evaluate_windows
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.text.windows import calibration_windows, evaluation_windows

PEER = "llm-compressor"
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
    keys = {"model": "demo", "output": str(out), "quantize.bits": bits, "quantize.sym": sym}
    fitted = [] if form == "rtn" else list(sets)
    recipe = build_recipe(None, keys | {"quantize.group_size": 64} | FORMS[form], fitted)
    start, cpu = time.monotonic(), time.process_time()
    given = None if form == "rtn" else windows
    quantize(plan(recipe), lambda at, total, text: None, given)
    wall, used = time.monotonic() - start, time.process_time() - cpu
    print(f"# {out.name}: {wall:.0f} s wall, {used:.0f} s CPU", flush=True)
    return open_checkpoint(str(out))


def make_peer(bits: int, sym: bool, windows: torch.Tensor, folder: Path) -> Checkpoint:
    """llm-compressor's AWQ with the settings of its examples, at our group size."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM

    if not torch.cuda.is_available():  # it pins memory for a device that is not there
        IntermediatesCache.pin_memory = lambda *args, **kwargs: None
    source, out = folder / "plain", folder / f"llm-compressor-{bits}"
    if not source.is_dir():
        write_plain(open_checkpoint("demo"), source)
    args = QuantizationArgs(num_bits=bits, symmetric=sym, strategy="group", group_size=64)
    scheme = {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
    rows = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    start, cpu = time.monotonic(), time.process_time()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=[AWQModifier(ignore=["lm_head"], config_groups=scheme)],
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
    )
    model.save_pretrained(out, save_compressed=True)
    wall, used = time.monotonic() - start, time.process_time() - cpu
    print(f"# {out.name}: {wall:.0f} s wall, {used:.0f} s CPU", flush=True)
    open_checkpoint("demo").write_sidecars(out)
    return open_checkpoint(str(out))


def write_plain(checkpoint: Checkpoint, folder: Path) -> None:
    """The model as an ordinary Hugging Face folder."""
    folder.mkdir()
    tensors = {checkpoint.disk_name(n): checkpoint.read(n) for n in checkpoint.tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    checkpoint.write_sidecars(folder)


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
    peer = [PEER] if importlib.util.find_spec("llmcompressor") else []
    known = [*FORMS, *peer]
    parser.add_argument("--forms", nargs="+", default=known, choices=known)
    options = parser.parse_args()
    calibration, evaluations = texts(options.windows, options.calibration, options.samples)
    base = open_checkpoint("demo")
    with tempfile.TemporaryDirectory() as folder:
        for bits in options.bits:
            made = {}
            for form in dict.fromkeys(["rtn", *options.forms]):
                if form == PEER:
                    made[form] = make_peer(bits, options.sym, calibration, Path(folder))
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
