"""What compression cost: perplexity, and the divergence from the original, token by token.

Both models are walked block by block over the same windows, so nothing larger than a block and a
head is in memory, and the weights are what the artifact stores, whatever kernel will run them.

    nll(t) = -log p(x_t | x_<t)        perplexity = exp(mean nll)
    KL(t)  = Σ_v p_base(v) log(p_base(v) / p(v))
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.checkpoint import Checkpoint, open_checkpoint
from optim.runtime.corpus import evaluation_windows, token_hash
from optim.runtime.machine import pick_device
from optim.runtime.plain import PlainView
from optim.runtime.walk import HiddenStates, Walk

Progress = Callable[[int, int, str], None]
LOGIT_BYTES = 256 * 2**20  # logits held at a time


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over `tokens` predictions; errors are standard errors over the windows.

    `delta_nll` is the mean of nll - base nll (paired, so its error is far smaller than either's).
    """

    perplexity: float
    nll: float
    nll_error: float
    tokens: int
    windows: int
    window: int
    text_sha256: str
    base_perplexity: float | None = None
    ppl_ratio: float | None = None
    delta_nll: float | None = None
    delta_nll_error: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    same_top: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary, for `--json` and the manifest."""
        return asdict(self)


def evaluate(
    source: str,
    *,
    against: str | None = None,
    text: str = "builtin:eval",
    window: int = 1024,
    max_windows: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = lambda at, total, text: None,
) -> Evaluation:
    """Perplexity of `source` on `text`, and with `against` the divergence from that model.

    Raises OptimError (2) for sources and texts that cannot be used, or vocabularies that differ.
    """
    if threads:
        torch.set_num_threads(threads)
    checkpoint = open_checkpoint(source)
    base = None if against is None else open_checkpoint(against)
    tokenizer = checkpoint.tokenizer()
    if base is not None and base.tokenizer().vocab_size != tokenizer.vocab_size:
        raise OptimError(
            f"{source} and {against} have different vocabularies",
            "--against wants the model that this one was made from",
            USAGE,
        )
    windows = evaluation_windows(text, tokenizer, window=window, max_windows=max_windows)
    return evaluate_windows(checkpoint, base, windows, device, progress)


def evaluate_windows(
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    windows: Tensor,
    device: str = "auto",
    progress: Progress = lambda at, total, text: None,
) -> Evaluation:
    """`evaluate` on token windows int64 `[n, length]` that are already there."""
    place = pick_device(device)
    models = [m for m in (checkpoint, base) if m is not None]
    steps = sum(_block_count(m) for m in models)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        walked, done = [], 0
        for k, model in enumerate(models):
            walk = Walk(PlainView(model), place)

            def step(i: int, done: int = done, name: str = model.name) -> None:
                progress(done + i, steps, name)

            walked.append((walk, _hidden(walk, windows, Path(folder) / str(k), step)))
            done += len(walk)
        rows = [_measure(walked, windows, i) for i in range(len(windows))]
    return _summary(rows, windows, base is not None)


def _block_count(checkpoint: Checkpoint) -> int:
    return int(checkpoint.text_config.get("num_hidden_layers", 0))


def _hidden(walk: Walk, windows: Tensor, path: Path, step: Callable[[int], None]) -> HiddenStates:
    """The last block's output for every window."""
    states = walk.embed(windows, path)
    walk.release()
    for i in range(len(walk)):
        block = walk.block(i)
        for rows in walk.slices(states):
            states[rows] = walk.run(i, block, states[rows])
        step(i + 1)
    return states


def _measure(
    walked: list[tuple[Walk, HiddenStates]], windows: Tensor, i: int
) -> tuple[float, float, float, float]:
    """Sums over one window's predictions: nll, base nll, KL, agreements on the likeliest token."""
    ids = windows[i : i + 1]
    sums = torch.zeros(4, dtype=torch.float64)
    vocab = int(walked[0][0].model.config.get_text_config().vocab_size)
    step = max(1, LOGIT_BYTES // (4 * vocab * len(walked)))
    for start in range(0, ids.shape[1] - 1, step):
        part = slice(start, min(start + step, ids.shape[1] - 1))
        target = ids[0, part.start + 1 : part.stop + 1, None]
        logs = [
            w.logits(ids[:, part], states[slice(i, i + 1)][:, part])[0].log_softmax(-1).cpu()
            for w, states in walked
        ]
        sums[0] -= logs[0].gather(1, target).double().sum()
        if len(logs) == 2:
            sums[1] -= logs[1].gather(1, target).double().sum()
            sums[2] += (logs[1].exp() * (logs[1] - logs[0])).sum(-1).double().sum()
            sums[3] += (logs[0].argmax(-1) == logs[1].argmax(-1)).double().sum()
    nll, base, kl, same = sums.tolist()
    return nll, base, kl, same


def _summary(
    rows: list[tuple[float, float, float, float]], windows: Tensor, compared: bool
) -> Evaluation:
    per = windows.shape[1] - 1
    nll, base, kl, same = (torch.tensor(rows, dtype=torch.float64) / per).T
    found = Evaluation(
        perplexity=math.exp(nll.mean()),
        nll=float(nll.mean()),
        nll_error=_standard_error(nll),
        tokens=per * len(rows),
        windows=len(rows),
        window=windows.shape[1],
        text_sha256=token_hash(windows),
    )
    if not compared:
        return found
    from dataclasses import replace

    return replace(
        found,
        base_perplexity=math.exp(base.mean()),
        ppl_ratio=math.exp(nll.mean() - base.mean()),
        delta_nll=float((nll - base).mean()),
        delta_nll_error=_standard_error(nll - base),
        kl=float(kl.mean()),
        kl_error=_standard_error(kl),
        same_top=float(same.mean()),
    )


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
