"""`optim bench`: what is refused before anything is measured, and what the table says."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from optim.cli import bench, bench_speculation
from optim.cli.options import Timing
from optim.recipes.errors import OptimError
from optim.runtime.engine.session import Session
from optim.runtime.measure import speculation

Captured = pytest.CaptureFixture[str]


def run(name: str, *rates: float) -> dict[str, Any]:
    spread = [{"median": rate, "min": rate, "max": rate} for rate in rates]
    return {
        "source": name,
        "form": "planes",
        "engine": "optim",
        "place": "cpu",
        "weight_bytes": 1e6,
        "load_seconds": 0.5,
        "peak_bytes": 1e6,
        "load_average": 0.0,
        "timings": [
            {
                "prompt_tokens": length,
                "prefill_tokens_per_second": rate,
                "decode_tokens_per_second": rate,
                "ms_per_step": 1.0,
            }
            for length, rate in zip((64, 512), spread, strict=False)
        ],
    }


def test_the_speed_up_stands_beside_the_faster_model(capsys: Captured) -> None:
    bench._show([run("ours", 30.0, 10.0), run("base", 10.0, 20.0)], 1e9)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    speeds = {(words[0], words[1]): words[-1] for words in lines if len(words) > 8}
    assert speeds["ours", "64"] == "3.00x"
    assert speeds["base", "512"] == "2.00x"
    assert not speeds["ours", "512"].endswith("x") and not speeds["base", "64"].endswith("x")


@pytest.mark.parametrize("asked", [{"prompt_tokens": "8,40", "new_tokens": 20}, {"context": 30}])
def test_lengths_are_checked_before_anything_is_measured(
    asked: dict[str, Any], make_letters: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optim.runtime.measure.speed.bandwidth", None)
    given = {"prompt_tokens": "16", "new_tokens": 16, **asked}
    with pytest.raises(OptimError, match=r"--context has 30|letters\d has 48") as caught:
        bench.bench(make_letters(48, None), Timing(**given, quiet=True))
    assert caught.value.code == 2


def test_guesses_are_measured_beside_the_same_model(
    make_model: Callable[..., Any], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(make_model("mistral", torch.bfloat16))
    monkeypatch.setattr(speculation, "PROMPTS", {"chat": ["abcabcabc"]})
    monkeypatch.setattr(Session, "reply", Session.complete)  # it has no chat template
    asked = Timing(speculate="lookup", new_tokens=8, repeat=1)
    bench_speculation.bench(path, replace(asked, json=True))
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["temperature"] for row in rows] == [0.0, 0.7]
    for row in rows:
        assert row["ways"]["look-up, lookup"]["identical"] == row["replies"] == 1
    bench_speculation.bench(path, asked)
    assert "1 of 1" in capsys.readouterr().out


def test_guesses_have_no_peer() -> None:
    asked = Timing(speculate="auto", peer=["llama.cpp"])
    with pytest.raises(OptimError, match="beside the same model") as caught:
        bench_speculation.bench("anything", asked)
    assert caught.value.code == 2
