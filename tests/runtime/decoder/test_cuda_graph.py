"""The one-token step whose place lies on the device against the plain one; its recording."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optim.runtime.cache.full import Layer, LayerCache, LayeredCache, Policy
from optim.runtime.decoder import decoder as decoders
from optim.runtime.decoder.cuda_graph import WARM, GraphDecoder, cuda_graph, recordable
from optim.runtime.decoder.decoder import Decoder
from optim.runtime.engine.load import load_model

MakeModel = Callable[..., Path]
HOST_ONLY = {"_local_scalar_dense", "nonzero", "unique", "_unique2", "masked_select", "item"}

# Packed: a sum in another order may round to another code, which stays in the cache.
BOUND = {16: 1e-5, 8: 1e-2, 4: 5e-2}


class Forbidding(TorchDispatchMode):
    """Fails on what makes the host wait for the device, which no graph can hold."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.overloadpacket.__name__ in HOST_ONLY:
            raise AssertionError(f"{func} within a step")
        return func(*args, **(kwargs or {}))


class Recorder:
    """Stands in for CUDA graphs: does the step again, and counts how often it was recorded."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.count += 1

        def replay() -> Tensor:
            with Forbidding():
                return step()

        return replay


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches lie as a GPU has them, in fp32."""

    def layers(
        count: int, batch: int, kv: int, dim: int, *_device_and_dtype: object, transposed: bool
    ) -> list[Layer]:
        return [
            LayerCache(False, torch.zeros(batch, kv, 0, dim), torch.zeros(batch, kv, 0, dim))
            for _ in range(count)
        ]

    monkeypatch.setattr(decoders, "static_layers", layers)


def load(folder: Path) -> Decoder:
    decoder = load_model(str(folder), device="cpu").decoder
    assert isinstance(decoder, Decoder)
    decoder.one_call = None
    for block in decoder.blocks:
        block.attention.one_token = None
    return decoder


@contextmanager
def caches(
    decoder: Decoder, policy: Policy, padding: list[int] | None, limit: int = 128
) -> Iterator[tuple[LayeredCache, LayeredCache]]:
    pads = None if padding is None else torch.tensor(padding)
    rows = 1 if padding is None else len(padding)
    with torch.inference_mode():
        sizes = rows, limit, torch.device("cpu"), pads, policy
        yield decoder.new_cache(*sizes), decoder.new_cache(*sizes)


def compare(decoder: Decoder, policy: Policy, padding: list[int] | None, steps: int) -> Recorder:
    torch.manual_seed(0)
    recorder, rows = Recorder(), 1 if padding is None else len(padding)
    graph = GraphDecoder(decoder, recorder)
    limit = 32 if policy.kind == "stream" else 128
    with caches(decoder, policy, padding, limit) as (fast, slow):
        ids = torch.randint(3, 200, (rows, 6 + steps))
        for cache, run in ((fast, graph), (slow, decoder)):
            run(ids[:, :6], cache, False)
        for at in range(6, 6 + steps):
            got, wanted = (
                run(ids[:, at : at + 1], cache, False)
                for cache, run in ((fast, graph), (slow, decoder))
            )
            assert (got - wanted).norm() <= BOUND[policy.bits] * wanted.norm()
        assert fast.length == slow.length
        assert graph.failure == ""
    return recorder


def test_every_family(table_family: str, make_model: MakeModel, as_on_a_gpu: None) -> None:
    decoder = load(make_model(table_family, torch.float32))
    assert recordable(decoder) == (table_family not in ("mixtral", "qwen3_moe"))
    if recordable(decoder):
        assert compare(decoder, Policy(), None, 24).count == 1


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("padding", [None, [0, 3, 5]])
@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_every_cache(
    bits: int, padding: list[int] | None, family: str, make_model: MakeModel, as_on_a_gpu: None
) -> None:
    compare(load(make_model(family, torch.float32)), Policy(bits), padding, 20)


@pytest.mark.parametrize("padding", [None, [0, 3, 5]])
def test_texts_behind_a_prefix(
    padding: list[int] | None, make_model: MakeModel, as_on_a_gpu: None
) -> None:
    decoder = load(make_model("llama", torch.float32))
    shape = decoder.shape
    decoder.prefix = [
        (torch.randn(1, 3, shape.kv_heads, shape.head_dim), torch.randn(1, 3, shape.kv_heads, 16))
        for _ in decoder.blocks
    ]
    compare(decoder, Policy(), padding, 20)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_stream_that_forgets(bits: int, make_model: MakeModel, as_on_a_gpu: None) -> None:
    recorder = compare(load(make_model("llama", torch.float32)), Policy(bits, "stream"), None, 60)
    assert recorder.count <= 2, "forgetting moves no buffer"


@pytest.mark.parametrize("bits", [16, 4])
def test_buffers_that_grew_are_recorded_again(
    bits: int, make_model: MakeModel, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optim.runtime.cache.full.CHUNK", 32)
    monkeypatch.setattr("optim.runtime.cache.quantized.RECENT", 16)
    recorder = compare(load(make_model("llama", torch.float32)), Policy(bits), None, 110)
    assert 2 <= recorder.count <= 5


def test_it_is_recorded_after_a_few_steps_and_anew_for_another_cache(
    make_model: MakeModel, as_on_a_gpu: None
) -> None:
    decoder, recorder = load(make_model("llama", torch.float32)), Recorder()
    graph, token = GraphDecoder(decoder, recorder), torch.tensor([[7]])
    with caches(decoder, Policy(), None) as (first, second):
        for step in range(WARM + 3):
            assert recorder.count == (step > WARM)
            assert graph(token, first, True).shape == (1, 1, 264)
        assert graph.state == "steps recorded"
        for _ in range(WARM + 1):
            graph(token, second, False)
    assert recorder.count == 2


def test_what_cannot_be_recorded_runs_as_before(make_model: MakeModel, as_on_a_gpu: None) -> None:
    def refuse(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("not permitted when stream is capturing\nmore")

    decoder = load(make_model("llama", torch.float32))
    graph, token = GraphDecoder(decoder, refuse), torch.tensor([[7]])
    with caches(decoder, Policy(), None) as (fast, slow):
        for _ in range(WARM + 3):
            torch.testing.assert_close(graph(token, fast, False), decoder(token, slow, False))
        assert fast.length == slow.length
    assert graph.state == "steps not recorded: not permitted when stream is capturing"


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("padding", [None, [0, 3]])
def test_on_a_card(bits: int, padding: list[int] | None, make_model: MakeModel) -> None:
    model = load_model(str(make_model("mistral")), device="cuda")
    graph = model.decoder
    assert isinstance(graph, GraphDecoder)
    assert graph.record is cuda_graph
    rows = 1 if padding is None else 2
    ids = torch.randint(3, 200, (rows, 100))
    fast, slow = (model.new_cache(rows, 128, padding, Policy(bits)) for _ in range(2))
    with torch.inference_mode():
        for run, cache in ((graph, fast), (graph.inner, slow)):
            run(ids[:, :6].cuda(), cache, False)
        for at in range(6, 100):
            token = ids[:, at : at + 1].cuda()
            got, wanted = graph(token, fast, False), graph.inner(token, slow, False)
            assert (got - wanted).norm() <= 3e-2 * wanted.norm()
    assert graph.state == "steps recorded"
