"""Tuning: gradients of the scales, KL that falls, the same format out, the same bytes resumed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from optim.quant.tune import run as module
from optim.quant.tune.run import Tuned, tune
from optim.quant.tune.student import Student, TunedLinear
from optim.quant.tune.train import Asked, Trainer
from optim.recipes.errors import OptimError
from optim.recipes.schema import Calibration
from optim.runtime.formats.pack_quantized import Scheme
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.walk.walk import Walk

MakeModel = Callable[..., Path]
Compress = Callable[..., Any]


def _tune(artifact: Path, base: Path, out: Path, text: Path, **keys: Any) -> Tuned:
    calibration = Calibration(dataset=str(text), num_samples=8, seq_len=32)
    asked = Asked(**({"epochs": 2, "lr": 5e-3} | keys))
    where = (str(artifact), str(base), str(out))
    return tune(*where, calibration, asked, lambda at, total, text: None, device="cpu")


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_scales_gradients(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of autograd through a dense weight, whatever part of the rows is done at a time."""
    monkeypatch.setattr("optim.runtime.walk.walk.WIDEN_BYTES", 4 * 32 * 3)
    torch.manual_seed(0)
    scheme = Scheme(4, 16, symmetric)
    q = torch.randint(0, 16, (10, 32), dtype=torch.uint8)
    scale = torch.rand(10, 2) + 0.1
    zero = None if symmetric else torch.randint(0, 16, (10, 2), dtype=torch.uint8)
    linear = TunedLinear(q, scale, zero, scheme, torch.randn(10))
    linear.factor.data.normal_(std=0.1)
    x, g = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 5, 10)
    got = torch.autograd.grad(linear(x), (x, linear.factor), g)
    zeros = torch.full((10, 2), 8.0) if zero is None else zero.float()
    steps = q.float().view(10, 2, 16) - zeros[..., None]
    factor = linear.factor.detach().requires_grad_()
    weight = (steps * (scale * (1 + factor))[..., None]).view(10, 32)
    wanted = torch.autograd.grad(F.linear(x, weight, linear.bias), (x, factor), g)
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [16, 32])
def test_the_loss_and_its_gradients_in_parts(
    tokens: int,
    make_model: MakeModel,
    compress: Compress,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some windows and positions at a time, blocks run twice: as one graph over the whole text."""
    base, out = make_model("llama", torch.float32), tmp_path / "packed"
    compress(base, out, method="rtn")
    ids = torch.randint(3, 264, (2, 16), generator=torch.Generator().manual_seed(1))
    teacher = Walk(open_checkpoint(str(base)))
    with torch.no_grad():
        wanted = module._outputs(teacher, ids, tmp_path / "wanted")
        cpu = torch.device("cpu")
        student = Student(open_checkpoint(str(out)), ids, tmp_path / "embedded", cpu)
    monkeypatch.setattr("optim.quant.tune.student.LOGIT_BYTES", 4 * 264 * 2 * 5)
    monkeypatch.setattr("optim.quant.tune.student.TOKENS_PER_BATCH", tokens)
    got = student.divergence(teacher, wanted, [1, 0], learn=True)
    mine = {n: p.grad for n, p in student.parameters().items()}
    for parameter in student.parameters().values():
        parameter.grad = None
    x: Tensor = student.embedded[slice(0, 2)]
    for i, block in enumerate(student.blocks):
        x = student.walk.run(i, block, x)
    logs = student.walk.logits(ids, x).log_softmax(-1)
    sure = teacher.logits(ids, wanted[slice(0, 2)]).log_softmax(-1)
    loss = (sure.exp() * (sure - logs)).sum(-1).mean()
    loss.backward()
    assert got == pytest.approx(float(loss.detach()), rel=1e-4)
    assert len(mine) == 2 * (7 + 2)
    for name, parameter in student.parameters().items():
        grad, other = mine[name], parameter.grad
        assert grad is not None and other is not None and other.any()
        assert (grad - other).abs().max() <= 1e-3 * other.abs().max()


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {k: v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}


@pytest.mark.parametrize(
    ("kind", "keys"), [("llama", {}), ("gemma3_text", {"sym": True}), ("mixtral", {})]
)
def test_kl_falls_and_the_format_stays(
    kind: str,
    keys: dict[str, Any],
    make_model: MakeModel,
    compress: Compress,
    some_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """KL on the text that is trained on: a random model says too little about other text."""
    monkeypatch.setattr("optim.quant.tune.train.held_back", lambda windows: 0)
    base, before, after = make_model(kind), tmp_path / "before", tmp_path / "after"
    compress(base, before, bits=2, **keys)
    report = _tune(before, base, after, some_text, lr=3e-3, epochs=4)
    assert min(report.kl) < 0.9 * report.kl[0]
    old, new = _tensors(before), _tensors(after)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and all(n.endswith(("weight_scale", "norm.weight")) for n in changed)
    assert all(old[n].dtype == new[n].dtype and old[n].shape == new[n].shape for n in old)
    configs = [json.loads((f / "config.json").read_text()) for f in (before, after)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert open_checkpoint(str(after)).tensors.keys() == open_checkpoint(str(before)).tensors.keys()


class _Killed(BaseException):
    pass


def test_killed_between_and_within_passes(
    make_model: MakeModel,
    compress: Compress,
    some_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("optim.quant.tune.train.held_back", lambda windows: 0)  # it gains each time
    base, packed = make_model("llama"), tmp_path / "packed"
    compress(base, packed, bits=2)
    whole = _tune(packed, base, tmp_path / "whole", some_text, epochs=3)
    assert len(whole.kl) == 4
    step, out = Trainer._step, tmp_path / "out"
    for stop in (1, 3, 1):  # within the first pass, twice in the second
        left = stop

        def once(self: Trainer, *args: Any) -> float:
            nonlocal left
            if left == 0:
                raise _Killed
            left -= 1
            return step(self, *args)

        monkeypatch.setattr(Trainer, "_step", once)
        with pytest.raises(_Killed):
            _tune(packed, base, out, some_text, epochs=3)
    monkeypatch.setattr(Trainer, "_step", step)
    _tune(packed, base, out, some_text, epochs=3)
    names = [p.name for p in (tmp_path / "whole").glob("*.safetensors")]
    assert names
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_nothing_gained_leaves_the_scales_alone(
    make_model: MakeModel, compress: Compress, some_text: Path, tmp_path: Path
) -> None:
    base, packed = make_model("llama"), tmp_path / "packed"
    compress(base, packed, bits=8)
    report = _tune(packed, base, tmp_path / "out", some_text, lr=1.0, epochs=3)
    assert len(report.kl) == 3, "it stops after two passes that were no better"
    assert "gained nothing" in report.notes[0]
    old, new = _tensors(packed), _tensors(tmp_path / "out")
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_what_cannot_be_tuned_is_refused(
    make_model: MakeModel, compress: Compress, some_text: Path, tmp_path: Path
) -> None:
    base, packed = make_model("llama"), tmp_path / "packed"
    compress(base, packed, method="rtn")
    with pytest.raises(OptimError, match="no packed linears") as caught:
        _tune(base, base, tmp_path / "out", some_text)
    assert caught.value.code == 2
    with pytest.raises(OptimError, match="model_type differ") as caught:
        _tune(packed, make_model("qwen2"), tmp_path / "out", some_text)
    assert caught.value.code == 2
    assert not list(tmp_path.glob("out*"))
