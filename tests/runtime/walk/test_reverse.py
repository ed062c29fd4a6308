"""The reverse walk finds what autograd finds with the whole model in memory, and resumes."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optim.runtime.storage.open import open_checkpoint
from optim.runtime.walk import reverse
from optim.runtime.walk.reverse import OUTPUT, ReverseWalk
from optim.runtime.walk.walk import Walk, linears

MakeModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    pass


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 264, (batch, length), generator=torch.Generator().manual_seed(1))


def _watch(name: str, module: nn.Module, found: dict[str, Tensor]) -> None:
    def hook(_module: nn.Module, _args: Any, out: Tensor) -> None:
        out.register_hook(lambda g: found.update({name: g.flatten(0, -2)}))

    module.register_forward_hook(hook)


def _by_autograd(folder: Path, ids: Tensor) -> dict[str, Tensor]:
    """transformers' own model, whole: the gradient at each linear's output `[tokens, out]`."""
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            _watch(name, module, found)
    logits = model(ids, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    return found


def _close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "granite", "opt", "mixtral"])
def test_equals_plain_autograd(
    kind: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optim.runtime.walk.walk.TOKENS_PER_BATCH", 48)  # more than one batch
    monkeypatch.setattr(reverse, "LOGIT_BYTES", 4 * 264 * 7)  # seven positions at a time
    folder, ids = make_model(kind, torch.float32), _ids(3, 24)
    walk = ReverseWalk(open_checkpoint(str(folder)), ids, tmp_path / "walk", groups=2, kept=1)
    walk.run()
    theirs, prefix = _by_autograd(folder, ids), Walk(walk.checkpoint).prefix
    compared = 0
    for i in range(2):
        found = walk.block(i)
        assert found[OUTPUT].shape == (1, 24, 64) and found[OUTPUT].any()
        for name, g in theirs.items():
            if name.startswith(f"{prefix}.{i}."):
                wanted = [part.square().mean(-1) for part in g.chunk(2, -1)]
                _close(found[name.removeprefix(f"{prefix}.{i}.")], torch.stack(wanted, -1))
                compared += 1
    assert compared >= 8


def test_experts_feel_what_was_routed_to_them(make_model: MakeModel, tmp_path: Path) -> None:
    """All blocks in memory and one graph, instead of transformers' fused experts."""
    folder, ids = make_model("qwen3_moe", torch.float32), _ids(2, 16)
    checkpoint = open_checkpoint(str(folder))
    reversed_ = ReverseWalk(checkpoint, ids, tmp_path / "walk")
    reversed_.run()
    whole = Walk(checkpoint)
    with torch.no_grad():
        hidden = whole.embed(ids, tmp_path / "states")[slice(0, 2)]
    hidden.requires_grad_()
    found: list[dict[str, Tensor]] = [{}, {}]
    routes: list[Tensor] = []
    for i, place in enumerate(found):
        block = whole.block(i)
        for name, linear in linears(block).items():
            _watch(name, linear, place)
        hidden = whole.run(i, block, hidden)
        routes.append(block.get_submodule("mlp.experts").chosen)
    logits = whole.logits(ids, hidden)[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    experts = 0
    for i, (wanted, chosen) in enumerate(zip(found, routes, strict=True)):
        got = reversed_.block(i)
        assert got.keys() == wanted.keys()
        for name, g in wanted.items():
            means = g.square().mean(-1, keepdim=True)
            if ".experts." in name:
                routed = (chosen == int(name.split(".")[2])).any(-1)
                assert torch.equal(~got[name].isnan().any(-1), routed)
                _close(got[name][routed], means)
                experts += 1
            else:
                _close(got[name], means)
    assert experts >= 6


class _Killed(Exception):
    pass


def _hashes(folder: Path) -> dict[str, str]:
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors")
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}


def test_goes_on_where_it_was_stopped(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each of its steps in turn, and after a step whose journal line was cut."""
    checkpoint, ids = open_checkpoint(str(make_model("llama"))), _ids(3, 24)
    ReverseWalk(checkpoint, ids, tmp_path / "whole").run()
    finish = reverse._Steps.finish
    stops = 0

    broken = ReverseWalk(checkpoint, ids, tmp_path / "broken")
    for _ in range(20):
        left = 2

        def once(self: reverse._Steps, name: str) -> None:
            nonlocal left
            if left == 0:
                raise _Killed
            left -= 1
            finish(self, name)

        monkeypatch.setattr(reverse._Steps, "finish", once)
        try:
            broken.run()
        except _Killed:
            stops += 1
            with (tmp_path / "broken" / "journal.jsonl").open("a") as file:
                file.write('{"file": "inputs-1", "sha')
        else:
            break
    assert stops == 3  # 3 inputs, the end, 2 blocks of two files each: two of them a run
    assert _hashes(tmp_path / "broken") == _hashes(tmp_path / "whole")
    assert len(_hashes(tmp_path / "whole")) == 2


def test_a_damaged_file_begins_it_anew(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, ids = open_checkpoint(str(make_model("llama"))), _ids(2, 16)
    walk = ReverseWalk(checkpoint, ids, tmp_path / "walk")
    walk.run()
    before = _hashes(tmp_path / "walk")
    (tmp_path / "walk" / "block-1.safetensors").write_bytes(b"nothing")
    walk.run()
    assert _hashes(tmp_path / "walk") == before
    (tmp_path / "walk" / "block-1.safetensors").unlink()
    walk.run()
    assert _hashes(tmp_path / "walk") == before


def test_a_walk_of_something_else_begins_anew(make_model: MakeModel, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_model("llama")))
    ReverseWalk(checkpoint, _ids(2, 16), tmp_path / "walk").run()
    before = _hashes(tmp_path / "walk")
    ReverseWalk(checkpoint, _ids(2, 16).flip(0), tmp_path / "walk").run()
    assert _hashes(tmp_path / "walk").keys() == before.keys()
    assert _hashes(tmp_path / "walk") != before
