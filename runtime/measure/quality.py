"""What compression cost: perplexity, and the divergence from the original, token by token.

Both models are walked block by block over the same windows, so nothing larger than a block and a
head is in memory, and the weights are what the artifact stores, whatever kernel will run them.

    nll(t) = -log p(x_t | x_<t)        perplexity = exp(mean nll)
    KL(t)  = Σ_v p_base(v) log(p_base(v) / p(v))

Where the tokenizer begins every text with BOS, it is read before each window: such a model computes
nonsense without. It is not measured, nor is the window's first token, so that the same tokens count
for every model. Static integers whose prefix holds the BOS already are not given a second one.

A sparse model (sparsity/side_file.py) is dense while it reads a prompt. Its windows are therefore
prompts of half a window, computed densely, and what follows, computed sparsely; only that is
measured, of the base as well.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.sparsity.bytes_read import read_share, site_sizes
from optim.runtime.sparsity.rules import SparseWalk
from optim.runtime.sparsity.side_file import Side, read_side
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.gate import OVERFLOWN
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.system.devices import pick_device
from optim.runtime.system.hashes import tokens_sha256
from optim.runtime.text.windows import evaluation_windows
from optim.runtime.walk.static import static_walk
from optim.runtime.walk.walk import HiddenStates, Walk

Progress = Callable[[int, int, str], None]
LOGIT_BYTES = 256 * 2**20  # logits held at a time


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over `tokens` predictions; errors are standard errors over the windows
    (None of one window).

    `delta_nll` is the mean of nll - base nll (paired, so its error is far smaller than either's).
    """

    perplexity: float
    nll: float
    nll_error: float | None
    tokens: int
    windows: int
    window: int
    text_sha256: str
    begin: tuple[int, ...] = ()  # tokens before each window that are read and not measured
    prompt: int = 0  # tokens of each window that are read densely and not measured
    skipped: list[dict[str, Any]] | None = None  # of each block, see sparsity/rules.py
    read: float | None = None  # share of the blocks' weights that a token reads
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
    text_column: str = "text",
    window: int = 1024,
    max_windows: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda at, total, text: None,
) -> Evaluation:
    """Perplexity of `source` on `text`, and with `against` the divergence from that model.

    Raises OptimError (2) for sources and texts that cannot be used, or vocabularies that differ.
    """
    if threads:
        torch.set_num_threads(threads)
    trust = trust_remote_code
    checkpoint = open_checkpoint(source, trust_remote_code=trust)
    base = None if against is None else open_checkpoint(against, trust_remote_code=trust)
    tokenizer = checkpoint.tokenizer()
    if base is not None and base.tokenizer().vocab_size != tokenizer.vocab_size:
        raise OptimError(
            f"{source} and {against} have different vocabularies",
            "--against wants the model that this one was made from",
            USAGE,
        )
    windows = evaluation_windows(
        text, tokenizer, window=window, max_windows=max_windows, text_column=text_column
    )
    begin = tokenizer.begin
    return evaluate_windows([checkpoint], base, windows, device, progress, begin=begin)[0]


def evaluate_windows(
    checkpoints: Sequence[Checkpoint],
    base: Checkpoint | None,
    windows: Tensor,
    device: str = "auto",
    progress: Progress = lambda at, total, text: None,
    sides: Sequence[Side | None] | None = None,
    begin: Sequence[int] = (),
) -> list[Evaluation]:
    """`evaluate` of several models against one base, on token windows int64 `[n, length]`.

    `begin` is read before each window. `sides` are used in place of the models' own side files.
    """
    place = pick_device(device)
    sides = [read_side(model) for model in checkpoints] if sides is None else sides
    prompt = windows.shape[1] // 2 if any(sides) else 0
    first = len(begin) + prompt
    ids = torch.cat((torch.tensor(begin, dtype=torch.int64).expand(len(windows), -1), windows), 1)
    sparse_walks: list[SparseWalk | None] = []
    models = [*checkpoints, *([base] if base else [])]
    steps = sum(_block_count(m) for m in models)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        walked: list[tuple[Walk, HiddenStates]] = []
        done = 0
        for k, model in enumerate(models):
            side = sides[k] if k < len(sides) else None
            static = static_walk(model, place)
            walk = Walk(PlainView(model), place) if static is None else static.walk

            def step(i: int, done: int = done, name: str = model.name) -> None:
                progress(done + i, steps, name)

            sparse = None if side is None else SparseWalk(walk, side, first)
            path = Path(folder) / str(k)
            if static is None:
                walked.append((walk, _hidden(walk, ids, path, step, sparse)))
            else:
                walked.append((walk, static.hidden(ids, path, step, len(begin))))
            sparse_walks.append(sparse)
            done += len(walk)
        reference = walked.pop() if base else None
        rows = torch.stack(
            [_measure(walked, reference, ids[i : i + 1], i, first) for i in range(len(ids))]
        )
    for k, model in enumerate(models):
        column = rows[:, k, 0] if k < len(sides) else rows[:, 0, 1]
        if not bool(column.isfinite().all()):
            raise OptimError(f"what {model.name} computes is not a finite number", OVERFLOWN, USAGE)
    found = [_summary(rows[:, k], windows, prompt, base is not None) for k in range(len(sides))]
    found = [replace(each, begin=tuple(begin)) for each in found]
    return [_with_skips(*pair) for pair in zip(found, sparse_walks, strict=False)]


def _with_skips(found: Evaluation, sparse: SparseWalk | None) -> Evaluation:
    if sparse is None:
        return found
    skipped = [block.as_dict() for block in sparse.skips]
    sizes = site_sizes(sparse.walk, sparse.facts)
    return replace(found, skipped=skipped, read=read_share(skipped, sizes))


def _block_count(checkpoint: Checkpoint) -> int:
    return int(checkpoint.text_config.get("num_hidden_layers", 0))


def _hidden(
    walk: Walk,
    windows: Tensor,
    path: Path,
    step: Callable[[int], None],
    sparse: SparseWalk | None = None,
) -> HiddenStates:
    """The last block's output for every window."""
    states = walk.embed(windows, path)
    walk.release()
    for i in range(len(walk)):
        block = walk.block(i) if sparse is None else sparse.block(i)
        for rows in walk.slices(states):
            states[rows] = walk.run(i, block, states[rows])
        step(i + 1)
    return states


def _measure(
    walked: list[tuple[Walk, HiddenStates]],
    reference: tuple[Walk, HiddenStates] | None,
    ids: Tensor,
    i: int,
    first: int,
) -> Tensor:
    """Means over window i, `ids` [1, t], after its token `first`.

    nll, base nll, KL, share of equal likeliest tokens: float64 `[models, 4]`.
    """
    sums = torch.zeros(len(walked), 4, dtype=torch.float64)
    vocab = int(walked[0][0].model.config.get_text_config().vocab_size)
    last = ids.shape[1] - 1
    step = max(1, LOGIT_BYTES // (8 * vocab))
    for start in range(first, last, step):
        part = slice(start, min(start + step, last))
        target = ids[0, part.start + 1 : part.stop + 1, None]
        base = None if reference is None else _log_probs(reference, ids, i, part)
        for k, model in enumerate(walked):
            logs = _log_probs(model, ids, i, part)
            sums[k, 0] -= logs.gather(1, target).double().sum()
            if base is not None:
                sums[k, 1] -= base.gather(1, target).double().sum()
                sums[k, 2] += (base.exp() * (base - logs)).sum(-1).double().sum()
                sums[k, 3] += (base.argmax(-1) == logs.argmax(-1)).double().sum()
    return sums / (last - first)


def _log_probs(model: tuple[Walk, HiddenStates], ids: Tensor, i: int, part: slice) -> Tensor:
    """log p `[t, vocab]` after each token of `part` of window i."""
    walk, states = model
    hidden = states[slice(i, i + 1)][:, part]
    return walk.logits(ids[:, part], hidden)[0].log_softmax(-1).cpu()


def _summary(rows: Tensor, windows: Tensor, prompt: int, compared: bool) -> Evaluation:
    nll, base, kl, same = rows.T
    found = Evaluation(
        perplexity=math.exp(nll.mean()),
        nll=float(nll.mean()),
        nll_error=_standard_error(nll),
        tokens=len(rows) * (windows.shape[1] - 1 - prompt),
        windows=len(rows),
        window=windows.shape[1],
        text_sha256=tokens_sha256(windows),
        prompt=prompt,
    )
    if not compared:
        return found
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


def _standard_error(values: Tensor) -> float | None:
    """Of the mean of `values`; one alone says nothing of how far it may be off."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
