"""The walk over all blocks computes what transformers' own forward computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.walk.walk import Experts, HiddenStates, StoredLinear, Walk, linears


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 264, (batch, length), generator=torch.Generator().manual_seed(1))


def _theirs(folder: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=False).logits
    return logits


@torch.inference_mode()
def _walked(walk: Walk, ids: Tensor, path: Path) -> Tensor:
    states = walk.embed(ids, path)
    walk.release()
    for i in range(len(walk)):
        block = walk.block(i)
        for rows in walk.slices(states):
            states[rows] = walk.run(i, block, states[rows])
    return walk.logits(ids, states[slice(0, len(states))])


def test_walk_equals_transformers(
    family: str, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optim.runtime.walk.walk.TOKENS_PER_BATCH", 48)  # more than one batch
    folder, ids = make_model(family, torch.float32), _ids(3, 24)
    ours = _walked(Walk(open_checkpoint(str(folder))), ids, tmp_path / "states")
    theirs = _theirs(folder, ids)
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5


def test_linears_are_named_as_tensors(family: str, make_model: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(make_model(family)))
    walk = Walk(checkpoint)
    names = walk.linear_names()
    assert {f"{name}.weight" for name in names} <= checkpoint.tensors.keys()
    block = walk.block(1)
    spelled = {f"{walk.prefix}.1.{name}" for name in linears(block)}
    assert spelled == {name for name in names if name.startswith(f"{walk.prefix}.1.")}


def test_weights_stay_in_their_stored_dtype(make_model: Callable[..., Path]) -> None:
    block = Walk(open_checkpoint(str(make_model("llama")))).block(0)
    assert {m.weight.dtype for m in linears(block).values()} == {torch.bfloat16}


def test_reads_one_block_at_a_time(make_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_model("llama")))
    seen: list[str] = []

    def read(name: str) -> Tensor:
        seen.append(name)
        return checkpoint.read(name)

    walk = Walk(checkpoint, read=read)
    walk.embed(_ids(2, 16), tmp_path / "states")
    assert not [name for name in seen if ".layers." in name]
    seen.clear()
    walk.block(1)
    assert seen and all(name.startswith("model.layers.1.") for name in seen)


def test_stored_linear_applies_folds_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optim.runtime.walk.walk.WIDEN_BYTES", 4 * 7 * 3)  # three rows at a time
    weight, bias, x = torch.randn(8, 7), torch.randn(8), torch.randn(2, 5, 7)
    linear = StoredLinear(weight, bias)
    assert torch.allclose(linear(x), x @ weight.T + bias, atol=1e-6)
    columns, rows = torch.rand(7) + 0.5, torch.rand(8) + 0.5
    linear.in_scale, linear.out_scale = columns, rows
    wanted = (x @ (weight * columns).T + bias) / rows
    assert torch.allclose(linear(x), wanted, atol=1e-5)


def test_experts_weigh_the_chosen() -> None:
    experts = []
    for _ in range(3):
        expert = torch.nn.Module()
        for part, shape in {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}.items():
            setattr(expert, part, StoredLinear(torch.randn(shape), None))
        experts.append(expert)
    module = Experts(experts, torch.nn.functional.silu)
    x = torch.randn(5, 4)
    chosen = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 1], [1, 0]])  # expert 2 sees nothing
    weights = torch.rand(5, 2)
    wanted = torch.zeros(5, 4)
    for t in range(5):
        for k in range(2):
            e: Any = experts[int(chosen[t, k])]
            y = e.down_proj(torch.nn.functional.silu(e.gate_proj(x[t])) * e.up_proj(x[t]))
            wanted[t] += weights[t, k] * y
    assert torch.allclose(module(x, chosen, weights), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_keep_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    states = HiddenStates(tmp_path / "s", (5, 3, 4), dtype)
    value = torch.randn(5, 3, 4).to(dtype)
    states[slice(0, 2)] = value[:2]
    states[slice(2, 5)] = value[2:]
    again = HiddenStates(tmp_path / "s", (5, 3, 4), dtype)
    assert torch.equal(again[slice(0, 5)], value)
    assert torch.equal(again[slice(4, 9)], value[4:])  # cut at the end, like a list


def test_weights_of_another_shape_are_refused(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    import json
    import shutil

    folder = shutil.copytree(make_model("llama"), tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(OptimError, match=r"bfloat16 \[264, 64\], expected .*\[300, 64\]") as caught:
        Walk(open_checkpoint(str(folder))).embed(_ids(1, 8), tmp_path / "states")
    assert caught.value.code == 2


def test_a_window_longer_than_the_learned_positions_is_refused(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    walk = Walk(open_checkpoint(str(make_model("opt"))))
    with pytest.raises(OptimError, match="has 128 learned positions, a window 140 tokens"):
        walk.embed(_ids(1, 140), tmp_path / "states")
