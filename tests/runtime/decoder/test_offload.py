"""Blocks that come to the device one ahead: here the CPU stands for it, and all is in order."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optim.recipes.errors import OptimError
from optim.runtime.decoder.offload import Offloaded, slots
from optim.runtime.engine.build import build
from optim.runtime.engine.load import load_model
from optim.runtime.storage.open import open_checkpoint

CPU = torch.device("cpu")
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    pass


def tensors(block: object) -> list[torch.Tensor]:
    return [tensor for _, tensor in slots(block, set())]


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2", "opt"])
def test_logits_are_those_of_the_resident_model(make_model: Make, family: str) -> None:
    """Over the prompt, then token by token: every iteration brings all blocks anew."""
    checkpoint = open_checkpoint(str(make_model(family)))
    plain = load_model(checkpoint, device="cpu")
    moved = load_model(checkpoint, device="cpu")
    moved.decoder, _ = build(checkpoint, CPU, torch.float32, offload=True)
    assert isinstance(moved.decoder.blocks, Offloaded)
    caches = [model.new_cache() for model in (plain, moved)]
    for ids in (torch.arange(3, 12)[None], torch.tensor([[5]]), torch.tensor([[40]])):
        logits = [m.forward(ids, c) for m, c in zip((plain, moved), caches, strict=True)]
        assert torch.equal(*logits)


def test_two_buffers_serve_all_blocks(make_model: Make) -> None:
    blocks = Offloaded(CPU)
    held = [[torch.full((7,), float(i)), torch.arange(6.0).view(2, 3).T + i] for i in range(5)]
    wanted = [[tensor.clone() for tensor in block] for block in held]
    for block in held:
        blocks.append(block)
    assert all(tensor.device.type == "meta" for tensor in tensors(held))
    blocks.begin()
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors(held)}
    assert len(places) == 2 and blocks.host_bytes == 5 * 2 * 256
    for _ in range(2):
        for block, there in zip(blocks, wanted, strict=True):
            for tensor, original in zip(block, there, strict=True):
                assert torch.equal(tensor, original) and tensor.stride() == original.stride()


def test_a_block_that_is_left_early_harms_nothing() -> None:
    blocks = Offloaded(CPU)
    for i in range(3):
        blocks.append([torch.tensor([float(i)])])
    blocks.begin()
    for block in blocks:
        assert block[0] == 0
        break
    assert [float(block[0]) for block in blocks] == [0, 1, 2]


def test_what_a_gpu_kernel_holds_is_found() -> None:
    """Not modules and not buffers, but plain attributes of the kernels' own objects."""
    kernel = pytest.importorskip("optim.runtime.kernels.triton.bf12", exc_type=ImportError)
    weight = kernel.Weight(torch.randn(9, 40).to(torch.bfloat16))
    names = ("codes", "rest", "escapes", "at", "values")
    wanted = {name: getattr(weight, name).clone() for name in names}
    blocks = Offloaded(CPU)
    blocks.append({"linear": weight})
    blocks.begin()
    for block in blocks:
        for name, original in wanted.items():
            assert torch.equal(getattr(block["linear"], name), original)
    assert len(tensors(weight)) == len(names)


def test_empty_and_single() -> None:
    blocks = Offloaded(CPU)
    blocks.begin()
    assert list(blocks) == [] and len(blocks) == 0
    blocks = Offloaded(CPU)
    blocks.append([torch.tensor([4])])
    blocks.begin()
    assert [int(block[0]) for block in blocks] == [4]


def test_a_cpu_has_nothing_to_offload(make_model: Make) -> None:
    with pytest.raises(OptimError, match="nothing to offload"):
        load_model(str(make_model("llama")), device="cpu", offload=True)


@pytest.mark.gpu
def test_on_a_card(make_model: Make) -> None:
    folder = str(make_model("llama"))
    ids = torch.arange(3, 12)[None]
    models = [load_model(folder, device="cuda", offload=offload) for offload in (False, True)]
    logits = [m.forward(ids, m.new_cache()) for m in models]
    assert torch.equal(*logits)
