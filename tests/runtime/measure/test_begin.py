"""BOS where the tokenizer puts one: before each window, once, and nowhere else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from optim.runtime.measure.quality import evaluate
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.text.tokenizer import Tokenizer
from optim.runtime.text.windows import calibration_windows, described, evaluation_windows


@pytest.fixture
def begun(make_begun: Any) -> Path:
    return make_begun("llama", torch.float32)


def tokenizer_of(model: Path) -> Tokenizer:
    return open_checkpoint(str(model)).tokenizer()


def test_a_tokenizer_says_what_it_begins_with(begun: Path, make_model: Any) -> None:
    assert tokenizer_of(begun).begin == (1,)
    assert tokenizer_of(make_model("llama")).begin == ()


@pytest.mark.parametrize("kind", ["text", "chats"])
def test_each_calibration_window_begins_once(kind: str, begun: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    chat = [{"role": "user", "content": "hello there " * 5}]
    record = {"text": "hello there " * 5} if kind == "text" else {"messages": chat}
    path.write_text("\n".join(json.dumps(record) for _ in range(30)))
    tokenizer = tokenizer_of(begun)
    windows = calibration_windows(str(path), tokenizer, num_samples=8, seq_len=32, seed=0)
    assert windows.shape == (8, 32)
    assert windows.eq(1).sum(1).tolist() == [1] * 8
    assert windows[:, 0].eq(1).all()
    assert described(windows, tokenizer)["begin"] == [1]


def test_nothing_changes_where_the_tokenizer_puts_none(make_model: Any, some_text: Path) -> None:
    tokenizer = tokenizer_of(make_model("llama"))
    windows = calibration_windows(str(some_text), tokenizer, num_samples=8, seq_len=32, seed=0)
    assert not windows.eq(1).any()
    assert described(windows, tokenizer)["begin"] == []


def test_evaluation_reads_bos_and_measures_the_text(begun: Path, some_text: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = evaluate(str(begun), text=str(some_text), window=32, max_windows=3)
    assert (found.window, found.windows, found.tokens, found.begin) == (32, 3, 93, (1,))
    windows = evaluation_windows(str(some_text), tokenizer_of(begun), window=32, max_windows=3)
    ids = torch.cat((torch.ones(3, 1, dtype=torch.int64), windows), 1)
    model: Any = AutoModelForCausalLM.from_pretrained(begun).eval()
    with torch.inference_mode():
        logits = model(ids).logits[:, 1:-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())
    assert found.nll == pytest.approx(float(nll), abs=1e-4)


def test_the_text_is_the_same_with_and_without(
    begun: Path, make_model: Any, some_text: Path
) -> None:
    """What is measured is a matter of the text alone, so hashes compare across tokenizers."""
    plain = make_model("llama", torch.float32)
    sides = [
        evaluate(str(m), text=str(some_text), window=32, max_windows=3) for m in (begun, plain)
    ]
    assert sides[0].text_sha256 == sides[1].text_sha256
    assert sides[0].tokens == sides[1].tokens
    assert sides[1].begin == ()
