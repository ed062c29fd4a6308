"""What a ProSparse model costs and how sparse it is, on two held-back texts: docs/prosparse.md.

    optim prune demo -m prosparse -o smollm2-relu
    python benchmarks/prosparse.py smollm2-relu [--windows FILE.npz] [--count 10]
    python benchmarks/prosparse.py demo --relu      # the swap alone, with no training

Text A is `evaluation` `[n, 1024]` of the .npz (token ids of `demo`), text B is builtin:eval. Every
position of a window counts. `ratio` is the geometric mean of the windows' perplexity ratios to the
original, `error` its standard error in log units; `token` is the share of zeros in the product of
gate and up, `chunk` the share of neurons that are zero for 8 tokens in a row, in percent, means
over the blocks.
"""

import argparse
import json
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from optim.prune.prosparse.relu import feed_forwards, swap
from optim.prune.prosparse.student import load_teacher
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.text.windows import evaluation_windows
from optim.runtime.walk.walk import find_blocks

CPU = torch.device("cpu")


def texts(path: str | None, count: int) -> dict[str, torch.Tensor]:
    """The evaluation windows of each text."""
    tokenizer = open_checkpoint("demo").tokenizer()
    found = {"B": evaluation_windows("builtin:eval", tokenizer, window=1024, max_windows=count)}
    if path is not None:
        ids = np.load(path)["evaluation"][:count].astype(np.int64)
        found = {"A": torch.from_numpy(ids)} | found
    return found


class Zeros:
    """Counts the zeros that reach each `down_proj`."""

    def __init__(self, model: Any, name: str) -> None:
        self.ffns = feed_forwards(find_blocks(model)[1], name)
        self.token, self.chunk = torch.zeros(2, len(self.ffns))
        self.passes = 0
        for i, ffn in enumerate(self.ffns):
            ffn.get_submodule("down_proj").register_forward_pre_hook(self._hook(i))

    def _hook(self, i: int) -> Any:
        def look(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            zero = inputs[0][0] == 0
            whole = zero[: len(zero) // 8 * 8].unflatten(0, (-1, 8))
            self.token[i] += zero.float().mean()
            self.chunk[i] += whole.all(1).float().mean()
            self.passes += i == 0

        return look

    def means(self) -> dict[str, Any]:
        """What was counted since the last call, in percent; `blocks` of each block."""
        token, chunk = 100 * self.token / self.passes, 100 * self.chunk / self.passes
        blocks = [round(float(z), 1) for z in token]
        self.token, self.chunk, self.passes = token * 0, chunk * 0, 0
        return {
            "token": round(float(token.mean()), 2),
            "chunk": round(float(chunk.mean()), 2),
            "blocks": blocks,
        }


@torch.inference_mode()
def nll(model: Any, row: torch.Tensor) -> float:
    """Mean negative log likelihood of a window `[length]`."""
    logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
    return float(F.cross_entropy(logits, row[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--windows")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--relu", action="store_true", help="swap the activation first")
    options = parser.parse_args()
    base = load_teacher(open_checkpoint("demo"), CPU, torch.float32)
    model = load_teacher(open_checkpoint(options.model), CPU, torch.float32)
    zeros = Zeros(model, options.model)
    if options.relu:
        swap(zeros.ffns)
    for text, windows in texts(options.windows, options.count).items():
        pairs = torch.tensor([[nll(model, row), nll(base, row)] for row in windows]).double()
        delta = pairs[:, 0] - pairs[:, 1]
        facts = {
            "text": text,
            "windows": len(windows),
            "ppl": round(math.exp(pairs[:, 0].mean()), 3),
            "base": round(math.exp(pairs[:, 1].mean()), 3),
            "ratio": round(math.exp(delta.mean()), 3),
            "error": round(float(delta.std() / len(delta) ** 0.5), 4),
            "worst": round(math.exp(delta.max()), 3),
        }
        print(json.dumps(facts | zeros.means()), flush=True)


if __name__ == "__main__":
    main()
