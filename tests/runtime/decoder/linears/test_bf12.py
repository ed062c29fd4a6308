"""Linears over planes: the same numbers as over bf16, bit for bit, for few tokens and many."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optim.export.lossless.pack import pack
from optim.export.lossless.plan import plan
from optim.recipes.schema import Pack
from optim.runtime.decoder.linears.bf12 import PlaneLinear
from optim.runtime.decoder.linears.dense import DenseLinear
from optim.runtime.engine.load import load_model
from optim.runtime.kernels.cpu import bf12

pytestmark = pytest.mark.skipif(not bf12.usable(), reason="no C compiler")

SHAPES = [(5, 64), (70, 133), (129, 576), (64, 31), (3, 1), (2, 200)]


def weight_of(rows: int, cols: int) -> torch.Tensor:
    """Normal numbers with zeros and escapes of every kind among them."""
    generator = torch.Generator().manual_seed(rows * cols)
    weight = torch.randn(rows, cols, generator=generator).mul(0.05).to(torch.bfloat16)
    odd = torch.tensor([0.0, -0.0, 1e4, -1e5, 1e-20, 1e-39, 3.0, 1e20], dtype=torch.bfloat16)
    flat = weight.view(-1)
    places = torch.arange(0, flat.numel(), 11)
    flat[places] = odd.repeat(-(-len(places) // len(odd)))[: len(places)]
    return weight


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 16, 17, 40])
def test_bit_for_bit_the_plain_linear(rows: int, cols: int, tokens: int) -> None:
    weight = weight_of(rows, cols)
    bias = torch.randn(rows)
    x = torch.randn(2, tokens, cols)[:1]
    plain, planes = DenseLinear(weight, bias), PlaneLinear(weight, bias)
    assert torch.equal(planes(x), plain(x))


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_the_weight_and_its_rows_can_be_had(rows: int, cols: int) -> None:
    weight = weight_of(rows, cols)
    planes = PlaneLinear(weight)
    assert torch.equal(planes.weight.view(torch.int16), weight.view(torch.int16))
    ids = torch.randint(0, rows, (2, 3))
    assert torch.equal(planes[ids].view(torch.int16), weight[ids].view(torch.int16))


def test_two_threads_give_the_same() -> None:
    weight, x = weight_of(300, 192), torch.randn(3, 192)
    alone = PlaneLinear(weight)(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(PlaneLinear(weight)(x), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["llama", "phi3", "mixtral", "gemma2", "opt"])
@pytest.mark.parametrize("layout", ["df11", "bf12"])
def test_logits_are_the_plain_models(
    make_model: Callable[..., Path], tmp_path: Path, kind: str, layout: str
) -> None:
    folder = make_model(kind)
    pack(plan(str(folder), Pack(layout=layout), str(tmp_path / "out")), lambda *step: None)
    ids = torch.arange(3, 40)[None]
    logits = []
    for source in (folder, tmp_path / "out"):
        model = load_model(str(source))
        cache = model.new_cache(1, 64)
        first = model.forward(ids, cache, all_logits=True)
        logits.append((first, model.forward(ids[:, :1], cache), model))
    assert torch.equal(logits[0][0], logits[1][0]) and torch.equal(logits[0][1], logits[1][1])
    assert any(isinstance(m, PlaneLinear) for m in (logits[1][2].decoder.head,))
