"""All blocks in one C call against the same blocks one by one, for every family that can."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from optim.runtime.cache import quantized
from optim.runtime.cache.full import Policy
from optim.runtime.decoder.c_decode import one_call
from optim.runtime.decoder.decoder import Decoder
from optim.runtime.decoder.layers import MLP
from optim.runtime.decoder.linears.base import Linear
from optim.runtime.decoder.linears.bf12 import PlaneLinear
from optim.runtime.decoder.linears.dense import DenseLinear
from optim.runtime.decoder.linears.pack_quantized import PackedLinear
from optim.runtime.engine.load import Model, load_model
from optim.runtime.formats.pack_quantized import Scheme, pack
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.cpu import decode

ABLE = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "granite", "smollm3"}
SCHEMES = [Scheme(4, 16, False), Scheme(4, 32, True), Scheme(8, -1, True), Scheme(3, 16, False)]

STREAM = 48  # positions of a cache
MakeModel = Callable[..., Path]


def built() -> bool:
    try:
        return bool(decode.load())
    except NoKernel:
        return False


pytestmark = pytest.mark.skipif(not built(), reason="no C compiler here")


def packed(linear: DenseLinear, scheme: Scheme) -> PackedLinear:
    """`linear` with random codes; what it computes does not matter."""
    out, inputs = linear.weight.shape
    q = torch.randint(0, 1 << scheme.bits, (out, inputs)).to(torch.uint8)
    groups = scheme.groups(inputs)
    scale = (torch.rand(out, groups) * 0.3 / (1 << scheme.bits)).to(torch.bfloat16)
    zero = torch.randint(0, 1 << scheme.bits, (out, groups)).to(torch.uint8)
    tensors = pack(q, scale, None if scheme.symmetric else zero, scheme)
    return PackedLinear(tensors, scheme, linear.bias).prepare()


def with_packed_linears(model: Model, scheme: Scheme) -> Decoder:
    return with_linears(model, partial(packed, scheme=scheme))


def in_planes(linear: DenseLinear) -> PlaneLinear:
    """`linear`, of bf16 weights, with the same weights in planes."""
    return PlaneLinear(linear.weight, linear.bias)


def with_linears(model: Model, change: Callable[[DenseLinear], Linear]) -> Decoder:
    """`model` with other linears in its blocks."""
    decoder = model.decoder
    assert isinstance(decoder, Decoder)
    for block in decoder.blocks:
        parts = [(block.attention, "qkv"), (block.attention, "out")]
        if isinstance(block.mlp, MLP):
            parts += [(block.mlp, "up"), (block.mlp, "down")]
        for part, name in parts:
            setattr(part, name, change(getattr(part, name)))
    decoder.one_call = one_call(decoder.blocks, decoder.shape)
    return decoder


def test_every_family(table_family: str, make_model: MakeModel) -> None:
    model = load_model(str(make_model(table_family)), device="cpu")
    decoder = with_packed_linears(model, SCHEMES[0])
    assert (decoder.one_call is not None) == (table_family in ABLE)
    if decoder.one_call is not None:
        compare(model, decoder, steps=24)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "granite"])
@pytest.mark.parametrize("kind", ["full", "stream"])
def test_prompts(family: str, kind: str, make_model: MakeModel) -> None:
    """A prompt in one call a block, and in two parts, is what it is block by block."""
    model = load_model(str(make_model(family)), device="cpu")
    decoder = with_packed_linears(model, SCHEMES[0])
    assert decoder.one_call is not None
    torch.manual_seed(0)
    ids, policy = torch.randint(0, 200, (1, 60)), Policy(16, kind)
    whole, cut, slow = (model.new_cache(length=64, policy=policy) for _ in range(3))
    assert decoder.one_call.reads(whole.layers)  # type: ignore[attr-defined]
    got = model.forward(ids, whole)
    model.forward(ids[:, :26], cut)
    assert torch.equal(model.forward(ids[:, 26:], cut), got)
    decoder.one_call = None
    wanted = model.forward(ids, slow)
    assert float((got - wanted).norm() / wanted.norm()) < 0.005  # an 8-bit code may be another
    assert model.config["model_type"] not in ("qwen3", "phi3") or torch.equal(got, wanted)


@pytest.mark.parametrize("scheme", SCHEMES[1:], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout(scheme: Scheme, dtype: torch.dtype, make_model: MakeModel) -> None:
    model = load_model(str(make_model("mistral", dtype)), device="cpu")
    compare(model, with_packed_linears(model, scheme), steps=4)


@pytest.mark.parametrize("change", [lambda linear: linear, in_planes], ids=["plain", "planes"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])
def test_bf16_weights(
    family: str, change: Callable[[DenseLinear], Linear], make_model: MakeModel
) -> None:
    """With and without biases; every sum is that of the linear itself."""
    model = load_model(str(make_model(family, torch.bfloat16)), device="cpu")
    assert model.decoder.one_call is not None  # type: ignore[attr-defined]
    decoder = with_linears(model, change)
    assert decoder.one_call is not None
    decoder.cache_dtype = torch.float32  # a key that rounds to the next fp16 is no mistake
    compare(model, decoder, steps=24, within=1e-5)


def test_more_threads_than_work(make_model: MakeModel) -> None:
    before = torch.get_num_threads()
    model = load_model(str(make_model("qwen3")), device="cpu", threads=7)
    try:
        compare(model, with_packed_linears(model, SCHEMES[0]), steps=8)
    finally:
        torch.set_num_threads(before)


def test_batches_go_block_by_block(make_model: MakeModel) -> None:
    model = load_model(str(make_model("llama")), device="cpu")
    decoder = with_packed_linears(model, SCHEMES[0])
    ids = torch.randint(0, 200, (2, 9))
    both, alone = model.new_cache(2), model.new_cache()
    for at in range(9):
        two = model.forward(ids[:, at : at + 1], both)
        one = model.forward(ids[:1, at : at + 1], alone)
    torch.testing.assert_close(two[:1], one, rtol=1e-4, atol=1e-4)
    assert decoder.one_call is not None


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("kind", ["full", "stream"])
def test_every_cache(
    bits: int, kind: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "RECENT", 8)
    model = load_model(str(make_model("mistral")), device="cpu")
    decoder, calls = with_packed_linears(model, SCHEMES[0]), []
    run = decode.Blocks.__call__
    monkeypatch.setattr(decode.Blocks, "__call__", lambda *args: calls.append(1) or run(*args))
    compare(model, decoder, steps=40, policy=Policy(bits, kind))
    assert len(calls) == 42  # both short prompts, too


def compare(
    model: Model, decoder: Decoder, steps: int, policy: Policy | None = None, within: float = 2e-3
) -> None:
    """Logits and caches of both ways, after a prompt."""
    torch.manual_seed(0)
    ids = torch.randint(0, 200, (1, 5 + steps))
    fast, slow = (model.new_cache(length=STREAM, policy=policy) for _ in range(2))
    kept = decoder.one_call
    for cache in (fast, slow):
        model.forward(ids[:, :5], cache)
    for at in range(5, 5 + steps):
        token = ids[:, at : at + 1]
        decoder.one_call = kept
        got = model.forward(token, fast)
        decoder.one_call = None
        wanted = model.forward(token, slow)
        torch.testing.assert_close(got, wanted, rtol=within, atol=within)
        assert fast.length == slow.length
