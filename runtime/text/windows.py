"""Text in, token windows out: for calibration and for evaluation.

Calibration windows are packed: documents in seeded order, tokenized, joined, cut into equal
windows, shuffled. Evaluation windows follow each other in the text, with nothing put between them.

A model whose tokenizer begins every text with BOS has never read anything else, so each window
begins with it, once. A calibration window counts it; an evaluation window comes without, and the
walk puts it in front (quality.py), so that the tokens that are measured are the text's own.
"""

import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import Calibration
from optim.runtime.system.hashes import tokens_sha256
from optim.runtime.text.chat_template import system_folded
from optim.runtime.text.documents import MIXED, Document, builtin, documents
from optim.runtime.text.self_generated import Generate, self_texts
from optim.runtime.text.tokenizer import Tokenizer

SPARE = 4  # so many times the tokens needed are packed, then windows are drawn from them
MOST_DOCUMENTS = 100_000  # of a data set; more are not looked at


def described(windows: Tensor, tokenizer: Tokenizer) -> dict[str, Any]:
    """The calibration section of a manifest: size, what each window begins with, and hash."""
    samples, length = windows.shape
    begin = list(tokenizer.begin)
    begun = all(ids[: len(begin)] == begin for ids in windows[:, : len(begin)].tolist())
    return {
        "samples": samples,
        "seq_len": length,
        "begin": begin if begun else [],
        "sha256": tokens_sha256(windows),
    }


def document_ids(document: Document, tokenizer: Tokenizer, special: bool) -> list[int]:
    """Token ids of one document, without BOS; a chat goes through the template, if there is one."""
    if isinstance(document, str):
        ids = tokenizer.encode(document, special)
    elif tokenizer.has_chat_template:
        turns = document if tokenizer.takes_system else system_folded(document)
        ids = tokenizer.chat(turns, generation_prompt=False)
    else:
        lines = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in document)
        ids = tokenizer.encode(lines + "\n", special)
    return tokenizer.after_begin(ids)


def calibration_notes(tokenizer: Tokenizer) -> list[str]:
    """What is done to calibration text for this tokenizer's sake."""
    if tokenizer.takes_system or not tokenizer.has_chat_template:
        return []
    return [
        "the chat template takes no system message: in a chat of the calibration text it stands at "
        "the beginning of the first user turn"
    ]


def _pack(documents: Iterable[list[int]], length: int, tokens: int) -> list[list[int]]:
    """Full windows of `length` from joined documents; stops when there are `tokens`."""
    tokens = max(tokens, length)
    joined: list[int] = []
    for ids in documents:
        joined += ids
        if len(joined) >= tokens:
            break
    count = min(len(joined), tokens) // length
    return [joined[k * length : (k + 1) * length] for k in range(count)]


def _shares(num_samples: int) -> dict[str, int]:
    """Windows of each built-in kind, by largest remainder, so that few samples are mixed too."""
    total = sum(MIXED.values())
    exact = {kind: num_samples * weight / total for kind, weight in MIXED.items()}
    shares = {kind: int(value) for kind, value in exact.items()}
    by_rest = sorted(MIXED, key=lambda kind: shares[kind] - exact[kind])
    for kind in by_rest[: num_samples - sum(shares.values())]:
        shares[kind] += 1
    return shares


def _mixed(
    tokenizer: Tokenizer, num_samples: int, length: int, rng: random.Random
) -> list[list[int]]:
    """Windows of `builtin:mixed`: each kind packed apart; what a kind lacks, others give."""
    taken, spare = [], []
    for kind, share in _shares(num_samples).items():
        texts = list(builtin(kind))
        rng.shuffle(texts)
        ids = (document_ids(text, tokenizer, special=True) for text in texts)
        windows = _pack(ids, length, tokens=1 << 30)
        rng.shuffle(windows)
        taken += windows[:share]
        spare += windows[share:]
    rng.shuffle(spare)
    return taken + spare[: num_samples - len(taken)]


def _plain(
    spec: str, tokenizer: Tokenizer, length: int, tokens: int, rng: random.Random, **options: str
) -> list[list[int]]:
    found: list[Document] = []
    for document in documents(spec, seed=rng.randrange(1 << 30), **options):
        found.append(document)
        if len(found) >= MOST_DOCUMENTS:
            break
    rng.shuffle(found)
    return _pack((document_ids(d, tokenizer, special=True) for d in found), length, tokens)


def _too_short(
    spec: str, windows: int, wanted: int, length: int, fix: str = "a smaller --seq-len"
) -> OptimError:
    have = f"{windows} full windows of {length} tokens, {wanted} are wanted"
    fewer = f"--num-samples {windows}, " if windows else ""
    return OptimError(f"{spec} is too short: {have}", f"give {fewer}{fix} or a longer text", USAGE)


def windows_for(
    calibration: Calibration, tokenizer: Tokenizer, generate: Generate | None = None
) -> Tensor:
    """`calibration_windows` of a recipe."""
    options = calibration.model_dump()
    return calibration_windows(options.pop("dataset"), tokenizer, generate=generate, **options)


def calibration_windows(
    spec: str,
    tokenizer: Tokenizer,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    split: str | None = None,
    text_column: str = "text",
    generate: Generate | None = None,
) -> Tensor:
    """Token ids int64 [num_samples, seq_len] for calibration, the same for the same seed.

    Each window begins with the tokenizer's BOS, if it puts one before texts. `generate` samples
    from the model; only the spec `self` needs it. Raises OptimError (2) if the text is missing,
    malformed or too short.
    """
    rng = random.Random(seed)
    begin = list(tokenizer.begin)
    whole, seq_len = seq_len, seq_len - len(begin)
    if seq_len < 1:
        raise _too_short(spec, 0, num_samples, whole)
    if spec == "self":
        if generate is None:
            raise OptimError("calibration `self` needs a model that generates", code=USAGE)
        wanted = num_samples * seq_len
        found = self_texts(tokenizer, generate, tokens=wanted, length=seq_len, seed=seed)
        texts = (tokenizer.after_begin(ids) for ids in found)
        windows = _pack(texts, seq_len, wanted)
    elif spec == "builtin:mixed":
        windows = _mixed(tokenizer, num_samples, seq_len, rng)
    else:
        options = {"text_column": text_column} | ({"split": split} if split else {})
        windows = _plain(spec, tokenizer, seq_len, SPARE * num_samples * seq_len, rng, **options)
    if len(windows) < num_samples:
        raise _too_short(spec, len(windows), num_samples, whole)
    rng.shuffle(windows)
    return torch.tensor([begin + window for window in windows[:num_samples]], dtype=torch.int64)


def _in_order(found: Iterator[Document], tokenizer: Tokenizer) -> Iterator[list[int]]:
    for document in found:
        yield document_ids(document, tokenizer, special=False)


def evaluation_windows(
    spec: str,
    tokenizer: Tokenizer,
    *,
    window: int,
    max_windows: int | None = None,
    split: str | None = None,
    text_column: str = "text",
) -> Tensor:
    """Token ids int64 [n, window]: the text in order, no BOS, windows that do not overlap.

    Raises OptimError (2) if the text is missing, malformed or shorter than one window.
    """
    found = documents(spec, split=split, text_column=text_column)
    tokens = window * max_windows if max_windows else 1 << 40
    windows = _pack(_in_order(found, tokenizer), window, tokens)
    if not windows:
        raise _too_short(spec, 0, max_windows or 1, window, "a smaller --window")
    return torch.tensor(windows, dtype=torch.int64)
