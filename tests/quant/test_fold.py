"""Folds keep what a block computes, and one that does not is taken back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim.quant.fold import Probe, discover, family_groups, fold_checked, query_repeats
from optim.runtime.architecture.table import FAMILIES, Group
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.walk.walk import Walk, linear_at, linears

Block = tuple[nn.Module, Probe]


@pytest.fixture
def load(make_model: Callable[..., Path], tmp_path: Path) -> Callable[[str], Block]:
    """load(family) -> its first block and what it makes of a little text."""

    def first_block(family: str) -> Block:
        walk = Walk(open_checkpoint(str(make_model(family))))
        ids = torch.randint(3, 259, (2, 16), generator=torch.Generator().manual_seed(0))
        hidden = walk.embed(ids, tmp_path / "states")[slice(0, 2)]
        block = walk.block(0)
        expected = walk.run(0, block, hidden)
        return block, Probe(hidden, expected, lambda: walk.run(0, block, hidden))

    return first_block


def _scale(block: nn.Module, group: Group) -> Tensor:
    """A random scale that the group's source can take."""
    size = linear_at(block, group.readers[0]).in_features
    repeats = query_repeats(block, group)
    scale = torch.rand(size, generator=torch.Generator().manual_seed(1)) * 4 + 0.3
    if repeats is not None:
        heads = scale.view(-1, *repeats)
        scale = heads[:, :1].expand_as(heads).reshape(-1)
    return scale


def test_every_row_of_the_table_holds(table_family: str, load: Callable[[str], Block]) -> None:
    block, probe = load(table_family)
    groups, offset = family_groups(block, table_family)
    sources = {g.source for g in groups}
    assert len({s.replace("*", "0") for s in sources}) >= len(FAMILIES[table_family].groups) - 1
    folds = [(group, _scale(block, group)) for group in groups]
    assert fold_checked(block, folds, offset, torch.bfloat16, probe) == []
    read = {name for group in groups for name in group.readers}
    assert all(linear_at(block, name).in_scale is not None for name in read)
    assert probe.change() < 1e-4


def test_values_fold_only_where_they_are_the_output(load: Callable[[str], Block]) -> None:
    """Grouped queries: the scale must be the same for the heads that share a KV head."""
    block, probe = load("llama")
    group = Group("self_attn.v_proj", ("self_attn.o_proj",))
    assert query_repeats(block, group) == (2, 16)
    each_its_own = torch.rand(64) + 0.5
    ((wrong, change),) = fold_checked(block, [(group, each_its_own)], 0, torch.bfloat16, probe)
    assert wrong == group and change > 0.01
    assert linear_at(block, "self_attn.v_proj").out_scale is None


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_norms_rounding_is_made_up_for(stored: torch.dtype, load: Callable[[str], Block]) -> None:
    block, probe = load("llama")
    group = Group("input_layernorm", tuple(f"self_attn.{k}_proj" for k in "qkv"))
    before = block.get_parameter("input_layernorm.weight").clone()
    assert fold_checked(block, [(group, _scale(block, group))], 0, stored, probe) == []
    after = block.get_parameter("input_layernorm.weight")
    assert torch.equal(after, after.to(stored).float()) and not torch.equal(after, before)
    exact = linear_at(block, "self_attn.q_proj").in_scale
    assert exact is not None and torch.allclose(after * exact, before, rtol=1e-6)
    assert probe.change() < 1e-5


def test_one_plus_weight(load: Callable[[str], Block]) -> None:
    block, probe = load("gemma2")
    groups, offset = family_groups(block, "gemma2")
    folds = [(groups[0], _scale(block, groups[0]))]
    ((wrong, _),) = fold_checked(block, folds, 0, torch.bfloat16, probe)
    assert wrong == groups[0] and probe.change() < 1e-6  # taken back
    assert offset == 1 and fold_checked(block, folds, offset, torch.bfloat16, probe) == []


def test_only_the_wrong_fold_is_taken_back(load: Callable[[str], Block]) -> None:
    block, probe = load("mixtral")
    groups, offset = family_groups(block, "mixtral")
    folds = [(group, _scale(block, group)) for group in groups]
    norm = next(g for g in groups if g.unquantized)
    forgotten = replace(norm, unquantized=())
    folds = [(forgotten if g == norm else g, scale) for g, scale in folds]
    router = block.get_parameter("mlp.gate.weight").clone()
    ((wrong, change),) = fold_checked(block, folds, offset, torch.bfloat16, probe)
    assert wrong == forgotten and change > 1e-3
    assert torch.equal(block.get_parameter("mlp.gate.weight"), router)
    assert linear_at(block, "mlp.experts.0.gate_proj").in_scale is None
    assert linear_at(block, "mlp.experts.0.down_proj").in_scale is not None
    assert probe.change() < 1e-4


def test_dead_norm_channels_stay_dead(load: Callable[[str], Block]) -> None:
    block, probe = load("llama")
    with torch.no_grad():
        block.get_parameter("input_layernorm.weight")[5] = 0
    probe = Probe(probe.hidden, probe.run(), probe.run)
    group = Group("input_layernorm", tuple(f"self_attn.{k}_proj" for k in "qkv"))
    assert fold_checked(block, [(group, _scale(block, group))], 0, torch.bfloat16, probe) == []
    scale = linear_at(block, "self_attn.q_proj").in_scale
    assert scale is not None and scale[5] == 1 and bool(scale.isfinite().all())


def test_experts_are_spelled_out(load: Callable[[str], Block]) -> None:
    block, _ = load("qwen3_moe")
    groups, _ = family_groups(block, "qwen3_moe")
    norm = next(g for g in groups if g.source == "post_attention_layernorm")
    assert len(norm.readers) == 8 and norm.unquantized == ("mlp.gate",)
    pairs = [g for g in groups if g.source.endswith("up_proj")]
    assert [(g.source, *g.readers) for g in pairs][3] == (
        "mlp.experts.3.up_proj",
        "mlp.experts.3.down_proj",
    )


@pytest.mark.parametrize("family_", ["llama", "qwen2", "gpt_neox", "opt", "starcoder2", "stablelm"])
def test_groups_are_found_from_the_graph(family_: str, load: Callable[[str], Block]) -> None:
    block, probe = load(family_)
    found = discover(block, probe.run)
    if family_ in FAMILIES:
        wanted = [g for g in FAMILIES[family_].groups if g.source not in linears(block)]
        assert found == wanted
    else:
        assert {"self_attn.q_proj", "self_attn.k_proj"} <= {r for g in found for r in g.readers}
    folds: list[Any] = [(group, _scale(block, group)) for group in found]
    assert fold_checked(block, folds, 0, torch.bfloat16, probe) == []
