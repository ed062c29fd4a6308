"""A prefix that holds BOS stands in for the one that the tokenizer puts before every text."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optim.quant.run import plan, quantize
from optim.recipes.schema import Recipe
from optim.runtime.formats.static_int import read_config
from optim.runtime.measure.quality import evaluate_windows
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.text.windows import evaluation_windows


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    pass


@pytest.fixture
def base(make_begun: Callable[..., Path]) -> Path:
    return make_begun("llama", torch.float32)


@pytest.fixture
def artifact(base: Path, some_text: Path, tmp_path: Path) -> Path:
    recipe = {
        "version": 1,
        "model": str(base),
        "output": str(tmp_path / "out"),
        "calibration": {"dataset": str(some_text), "num_samples": 4, "seq_len": 32},
        "quantize": {"method": "mergequant"},
    }
    made = plan(Recipe.model_validate(recipe), device="cpu")
    quantize(made, lambda at, total, text: None)
    return tmp_path / "out"


def test_bos_is_never_doubled(base: Path, artifact: Path, some_text: Path) -> None:
    checkpoint = open_checkpoint(str(artifact))
    static = read_config(checkpoint.quantization)
    assert static is not None
    assert static.prefix[0] == 1
    assert static.prefix.count(1) == 1
    assert json.loads((artifact / "optim.json").read_text())["calibration"]["begin"] == [1]

    # It is run without another BOS in front, the base with one.
    chat = [{"role": "user", "content": "hi"}]
    ours, theirs = checkpoint.tokenizer(), open_checkpoint(str(base)).tokenizer()
    assert ours.encode("hi", special=True) == theirs.encode("hi", special=True)[1:]
    assert ours.chat(chat) == theirs.chat(chat)[1:]

    # It is measured with what it runs with: BOS once, from its prefix.
    windows = evaluation_windows(str(some_text), theirs, window=32, max_windows=3)
    asked = evaluate_windows([checkpoint], None, windows, "cpu", begin=theirs.begin)[0]
    alone = evaluate_windows([checkpoint], None, windows, "cpu")[0]
    assert asked.nll == pytest.approx(alone.nll, abs=1e-5)
    assert asked.tokens == alone.tokens
