"""A tiny random model of every family as a GGUF file: for our reader and llama.cpp the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optim.export.gguf.families import FAMILIES
from optim.export.run import export, plan
from optim.recipes.schema import Export
from optim.runtime.cache.full import Policy
from optim.runtime.engine.build import build
from optim.runtime.storage.open import open_checkpoint

Make = Callable[..., Path]
# What GGUF cannot say, so that a tiny model must have it as the large ones do.
CONFIG: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": ["sliding_attention"] * 2},
    "qwen3_moe": {"norm_topk_prob": True},
    "smollm3": {"no_rope_layers": [1, 1], "no_rope_layer_interval": 4},
}
IDS = [1, 40, 41, 99, 7, 200, 150, 33, 61, 12, 250]  # fewer than the windows are long


@pytest.fixture(params=FAMILIES)
def source(request: pytest.FixtureRequest, make_model: Make, tmp_path: Path) -> Path:
    """A model in float32 whose tokens are numbers."""
    folder = tmp_path / "source"
    shutil.copytree(make_model(request.param, torch.float32), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= CONFIG.get(request.param, {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(source: Path) -> torch.Tensor:
    """Ours, in float32: [tokens, vocabulary]."""
    cpu = torch.device("cpu")
    decoder, _ = build(open_checkpoint(str(source)), cpu, torch.float32)
    cache = decoder.new_cache(1, len(IDS), cpu, None, Policy())
    with torch.inference_mode():
        return decoder(torch.tensor([IDS]), cache, True)[0].clone()


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL in nats a token, in float64."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def in_llama_cpp(file: Path) -> torch.Tensor:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(
        str(file), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False
    )
    model.eval(IDS)
    return torch.from_numpy(np.array(model.scores[: len(IDS)]))


def written(source: Path, out: Path, **keys: Any) -> Path:
    export(plan(str(source), Export(format="gguf", **keys), str(out)), lambda *_: None)
    return out


def test_the_same_logits(source: Path, tmp_path: Path) -> None:
    ours = logits(source)
    without = tmp_path / "without"
    shutil.copytree(source, without, ignore=shutil.ignore_patterns("tokenizer*"))
    file = written(without, tmp_path / "numbers" / "out.gguf")
    assert divergence(ours, in_llama_cpp(file)) < 1e-6
    shutil.copy(source / "tokenizer.json", file.parent)
    assert torch.equal(ours, logits(file))
