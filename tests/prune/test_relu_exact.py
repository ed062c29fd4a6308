"""ReLU models: zeros are skipped and nothing changes; other models are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optim.prune.run import Report
from optim.recipes.errors import OptimError
from optim.runtime.engine.load import Model, load_model
from optim.runtime.sparsity.gated_ffn import GatedFeedForward

Prune = Callable[..., Report]
MakeModel = Callable[..., Path]
Decoded = Callable[[Model, int], torch.Tensor]
Evaluated = Callable[[str, int], torch.Tensor]


@pytest.fixture
def relu_llama(make_model: MakeModel, tmp_path: Path) -> Path:
    """A llama with ReLU in place of SiLU, in fp32."""
    folder = tmp_path / "relu"
    shutil.copytree(make_model("llama", torch.float32), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    return folder


def test_a_gated_relu_model_is_exact(
    relu_llama: Path, pruned: Prune, tmp_path: Path, decoded: Decoded
) -> None:
    report = pruned(relu_llama, tmp_path / "out", "relu-exact")
    model = load_model(str(tmp_path / "out"))
    dense = decoded(load_model(str(relu_llama)), 20)
    torch.testing.assert_close(decoded(model, 20), dense, rtol=1e-4, atol=1e-4)
    feed = model.decoder.blocks[0].mlp  # type: ignore[attr-defined]
    assert isinstance(feed, GatedFeedForward)
    assert 0.2 < feed.used / (feed.calls * feed.down.inputs) < 0.8
    assert 0.2 < report.blocks[0]["zeros"] < 0.8


def test_a_model_without_a_gate_is_exact(
    make_model: MakeModel, pruned: Prune, tmp_path: Path, decoded: Decoded
) -> None:
    source = make_model("opt", torch.float32)
    pruned(source, tmp_path / "out", "relu-exact")
    dense = decoded(load_model(str(source)), 20)
    sparse = decoded(load_model(str(tmp_path / "out")), 20)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_threshold_above_0_zeroes_more_and_stays_exact(
    family: str,
    make_model: MakeModel,
    pruned: Prune,
    tmp_path: Path,
    decoded: Decoded,
    evaluated: Evaluated,
) -> None:
    """FATReLU (arXiv 2402.13516): the threshold is the model's; skipping adds nothing."""
    source, act = tmp_path / "fat", {"hidden_act": "relu"} if family == "llama" else {}
    shutil.copytree(make_model(family, torch.float32), source)
    plain = json.loads((source / "config.json").read_text()) | act
    (source / "config.json").write_text(json.dumps(plain))
    before = pruned(source, tmp_path / "relu", "relu-exact").blocks[0]["zeros"]
    relu = decoded(load_model(str(source)), 20)
    config = plain | {"hidden_act_param": 0.3}
    (source / "config.json").write_text(json.dumps(config))
    report = pruned(source, tmp_path / "out", "relu-exact")
    assert report.blocks[0]["zeros"] > before + 0.03
    dense, out = decoded(load_model(str(source)), 20), str(tmp_path / "out")
    torch.testing.assert_close(decoded(load_model(out), 20), dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(evaluated(out, 20), dense, rtol=1e-3, atol=1e-3)
    assert (dense - relu).abs().max() > 1e-3


@pytest.mark.parametrize("value", [-0.1, "much", True, float("nan")])
def test_a_threshold_that_is_none_is_refused(relu_llama: Path, value: object) -> None:
    config = json.loads((relu_llama / "config.json").read_text()) | {"hidden_act_param": value}
    (relu_llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(OptimError, match="hidden_act_param") as caught:
        load_model(str(relu_llama))
    assert caught.value.code == 2


def test_another_activation_is_refused(
    make_model: MakeModel, pruned: Prune, tmp_path: Path
) -> None:
    with pytest.raises(OptimError, match="no ReLU model") as caught:
        pruned(make_model("llama"), tmp_path / "out", "relu-exact")
    assert caught.value.code == 2
