"""Perplexity is transformers' cross entropy; a model diverges from itself by nothing."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.measure.quality import evaluate, evaluate_windows
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.system.hashes import tokens_sha256


def _windows(count: int, length: int) -> Tensor:
    return torch.randint(3, 259, (count, length), generator=torch.Generator().manual_seed(4))


def _log_probabilities(folder: Path, windows: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logs: Tensor = model(windows).logits[:, :-1].log_softmax(-1)
    return logs


@pytest.mark.parametrize("family_", ["llama", "gemma2", "granite"])
def test_perplexity_is_transformers(family_: str, make_model: Callable[..., Path]) -> None:
    folder, windows = make_model(family_), _windows(3, 24)
    (found,) = evaluate_windows([open_checkpoint(str(folder))], None, windows, "cpu")
    logs = _log_probabilities(folder, windows)
    nll = -logs.gather(2, windows[:, 1:, None]).squeeze(2).double()
    assert found.nll == pytest.approx(nll.mean().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    assert found.nll_error == pytest.approx(nll.mean(1).std().item() / 3**0.5, rel=1e-3)
    assert (found.tokens, found.windows, found.window) == (3 * 23, 3, 24)
    assert found.text_sha256 == tokens_sha256(windows)
    assert found.kl is None and found.base_perplexity is None


def test_divergence_from_another(make_model: Callable[..., Path]) -> None:
    base, other, windows = make_model("llama"), make_model("opt"), _windows(2, 16)
    two = [open_checkpoint(str(other)), open_checkpoint(str(base))]
    found, same = evaluate_windows(two, open_checkpoint(str(base)), windows, "cpu")
    p, q = _log_probabilities(base, windows), _log_probabilities(other, windows)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert found.kl == pytest.approx(kl, rel=1e-4) and kl > 0.1
    agree = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    assert found.same_top == pytest.approx(agree)
    assert found.ppl_ratio is not None and found.base_perplexity is not None
    assert found.perplexity / found.base_perplexity == pytest.approx(found.ppl_ratio)
    assert (same.kl, same.delta_nll, same.same_top, same.ppl_ratio) == (0, 0, 1, 1)


def test_parts_of_the_logits_change_nothing(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, windows = open_checkpoint(str(make_model("qwen3"))), _windows(2, 40)
    (whole,) = evaluate_windows([checkpoint], None, windows, "cpu")
    monkeypatch.setattr("optim.runtime.measure.quality.LOGIT_BYTES", 4 * 264 * 7)
    (parts,) = evaluate_windows([checkpoint], None, windows, "cpu")
    assert parts.nll == pytest.approx(whole.nll, rel=1e-6)


def test_a_text_and_its_base(make_model: Callable[..., Path], some_text: Path) -> None:
    folder, steps = str(make_model("opt")), []
    found = evaluate(
        folder,
        against=folder,
        text=str(some_text),
        window=32,
        max_windows=3,
        device="cpu",
        progress=lambda at, total, text: steps.append((at, total)),
    )
    assert found.kl == pytest.approx(0, abs=1e-7) and found.windows == 3
    assert steps[-1] == (4, 4)
    assert found.as_dict()["kl"] == found.kl


def test_other_vocabularies_are_refused(
    make_model: Callable[..., Path], some_text: Path, tmp_path: Path
) -> None:
    import json
    import shutil

    other = shutil.copytree(make_model("llama"), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    removed = tokenizer["model"]["vocab"].popitem()
    assert removed
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(OptimError, match="different vocabularies") as caught:
        evaluate(str(other), against=str(make_model("llama")), text=str(some_text), window=32)
    assert caught.value.code == 2
