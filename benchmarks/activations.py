"""What rounding activations to 8 bits on a CPU changes: divergences of a packed model's logits.

    python benchmarks/activations.py ARTIFACT [--against demo] [--windows 4]
    python benchmarks/activations.py demo --llama-cpp      a GGUF file: llama.cpp beside it

Windows of 512 tokens of builtin:eval through the engine: the original, the artifact through the C
kernels, and the artifact with torch's own products (OPTIM_NO_C=1, in a process of its own).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from optim.runtime.engine.load import load_model
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.text.windows import evaluation_windows


def write_logits(source: str, count: int, to: str) -> None:
    model = load_model(source, device="cpu")
    windows = evaluation_windows("builtin:eval", model.tokenizer, window=512, max_windows=count)
    parts = [model.forward(w[None], model.new_cache(), all_logits=True)[0] for w in windows]
    torch.save(torch.cat(parts), to)


def llama_cpp_logits(source: str, count: int) -> Tensor:
    """Log-probabilities `[tokens, vocab]` of a GGUF file in llama.cpp, on a CPU."""
    import numpy as np
    from llama_cpp import Llama

    checkpoint = open_checkpoint(source)
    windows = evaluation_windows(
        "builtin:eval", checkpoint.tokenizer(), window=512, max_windows=count
    )
    file = str(checkpoint.store.files[0])
    model = Llama(file, n_ctx=512, n_batch=512, logits_all=True, n_gpu_layers=0, verbose=False)
    rows = []
    for window in windows:
        model.reset()
        model.eval(window.tolist())
        rows.append(torch.from_numpy(np.array(model.scores[:512])))
    model.close()
    return torch.cat(rows).log_softmax(-1)


def logits(source: str, count: int, **environment: str) -> Tensor:
    """Log-probabilities `[tokens, vocab]`, computed in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "logits.pt")
        command = [sys.executable, __file__, source, "--windows", str(count), "--write", path]
        subprocess.run(command, check=True, env=os.environ | environment)
        found: Tensor = torch.load(path)
    return found.log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> dict[str, float]:
    each = (p.exp() * (p - q)).sum(-1)
    return {
        "kl": round(float(each.mean()), 5),
        "error": round(float(each.std()) / len(each) ** 0.5, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--against", default="demo")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--llama-cpp", action="store_true")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        return write_logits(options.artifact, options.windows, options.write)
    if options.llama_cpp:
        exact = logits(options.artifact, options.windows, OPTIM_NO_C="1")
        for name, theirs in {
            "optim": logits(options.artifact, options.windows),
            "llama.cpp": llama_cpp_logits(options.artifact, options.windows),
        }.items():
            print(json.dumps({"name": name, "tokens": len(exact)} | divergence(exact, theirs)))
        return None
    base = logits(options.against, options.windows)
    ours = logits(options.artifact, options.windows)
    torchs = logits(options.artifact, options.windows, OPTIM_NO_C="1")
    pairs = {"8-bit activations": (base, ours), "torch": (base, torchs), "between": (torchs, ours)}
    for name, pair in pairs.items():
        print(json.dumps({"name": name, "tokens": len(base)} | divergence(*pair)), flush=True)


if __name__ == "__main__":
    main()
