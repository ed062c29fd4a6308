"""Several models side by side: size, what each cost in quality, and how fast it runs here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.measure.job import Job
from optim.runtime.measure.quality import Progress, evaluate_windows
from optim.runtime.measure.speed import measure
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.size_table import stored
from optim.runtime.text.windows import evaluation_windows


@dataclass(frozen=True, slots=True)
class Row:
    """One model. The first row is the base, which has no divergence from itself."""

    model: str
    nbytes: int
    bits_per_weight: float
    perplexity: float
    ppl_ratio: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    same_top: float | None = None
    tokens_per_second: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary, for `--json`."""
        return asdict(self)


def compare(
    base: str,
    others: Sequence[str],
    *,
    text: str,
    window: int,
    max_windows: int,
    speed: bool = True,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = lambda at, total, text: None,
) -> list[Row]:
    """A row for the base and for each other, on the same windows.

    Every model is read once; decoding is timed in a process of its own, after a prompt of 64
    tokens. Raises OptimError (2) where vocabularies differ.
    """
    if threads:
        torch.set_num_threads(threads)
    models = [open_checkpoint(source) for source in (base, *others)]
    tokenizer = models[0].tokenizer()
    for model in models[1:]:
        if model.tokenizer().vocab_size != tokenizer.vocab_size:
            what = f"{base} and {model.source} have different vocabularies"
            raise OptimError(what, "compare models that were made from one", USAGE)
    windows = evaluation_windows(text, tokenizer, window=window, max_windows=max_windows)
    found = evaluate_windows(
        models[1:], models[0], windows, device, progress, begin=tokenizer.begin
    )
    first = found[0].base_perplexity
    assert first is not None
    rows = [Row(base, *_sizes(models[0]), first)]
    for model, one in zip(models[1:], found, strict=True):
        compared = one.ppl_ratio, one.kl, one.kl_error, one.same_top
        rows.append(Row(model.source, *_sizes(model), one.perplexity, *compared))
    if not speed:
        return rows
    return [_timed(row, device, threads, progress) for row in rows]


def _sizes(model: Checkpoint) -> tuple[int, float]:
    """Bytes of the weights, and bits for each."""
    tensors = stored(model)
    nbytes, params = sum(t.nbytes for t in tensors), sum(t.params for t in tensors)
    return nbytes, 8 * nbytes / params


def _timed(row: Row, device: str, threads: int | None, progress: Progress) -> Row:
    progress(1, 1, f"speed of {row.model}")
    job = Job(row.model, prompt_tokens=(64,), new_tokens=32, device=device, threads=threads)
    (timing,) = measure(job)["timings"]
    rate = timing["decode_tokens_per_second"]["median"]
    return Row(**(row.as_dict() | {"tokens_per_second": rate}))
