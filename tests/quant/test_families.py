"""The whole path on a tiny model of each family: quantize, evaluate, run, load elsewhere."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optim.quant import fold
from optim.quant.observe import observe
from optim.quant.run import Report
from optim.runtime.architecture.table import FAMILIES, Family
from optim.runtime.decoder.linears import pack_quantized
from optim.runtime.engine.load import load_model
from optim.runtime.measure.quality import evaluate_windows
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.walk.walk import Walk

Compress = Callable[..., Report]
MIXTURES = ("mixtral", "qwen3_moe")
FORMS: dict[str, dict[str, Any]] = {
    "sym, no feedback": {"sym": True, "compensate": False},
    "3 bit, one form of scale": {"bits": 3, "duo": True},
    "8 bit per channel": {"bits": 8, "group_size": -1, "clip": False},
    "2 bit g16": {"bits": 2, "group_size": 16},
    "gptq": {"method": "gptq"},
    "rtn": {"method": "rtn"},
    "head too": {"lm_head_bits": 8},
    "mixed": {"sym": True, "overrides": [{"targets": ["re:.*down_proj"], "bits": 8}]},
    "attention 8 bit": {"sym": True, "overrides": [{"targets": ["re:.*self_attn.*"], "bits": 8}]},
}


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 259, (batch, length), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def _walked(folder: Path, ids: Tensor, path: Path) -> Tensor:
    """The logits of what is stored, by the walk in float32."""
    walk = Walk(PlainView(open_checkpoint(str(folder))))
    states = walk.embed(ids, path)
    for i in range(len(walk)):
        states[slice(0, len(ids))] = walk.run(i, walk.block(i), states[slice(0, len(ids))])
    return walk.logits(ids, states[slice(0, len(ids))])


def _close(ours: Tensor, theirs: Tensor, bound: float) -> None:
    assert theirs.isfinite().all()
    assert (ours - theirs).abs().max() / theirs.abs().max() < bound


def _runs_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our engine, on its reference kernel, computes what the walk over the stored weights does."""
    monkeypatch.setattr(pack_quantized, "_candidates", lambda _: [])
    ids = _ids(2, 20)
    model = load_model(str(folder), device="cpu")
    got = model.forward(ids, model.new_cache(batch=2), all_logits=True)
    # Keys and values are cached in 16 bits.
    _close(got, _walked(folder, ids, tmp_path / "states"), 3e-3)


def _loads_in_transformers(folder: Path, tmp_path: Path) -> None:
    """transformers, through compressed-tensors, computes the same up to bf16 weights."""
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    ids = _ids(2, 20)
    with torch.no_grad():
        got = factory.from_pretrained(folder, dtype=torch.float32)(ids, use_cache=False).logits
    _close(got, _walked(folder, ids, tmp_path / "theirs"), 3e-2)


def _divergences(folders: list[Path], base: Path) -> list[float]:
    artifacts = [open_checkpoint(str(folder)) for folder in folders]
    found = evaluate_windows(artifacts, open_checkpoint(str(base)), _ids(3, 32), "cpu")
    return [f.kl for f in found if f.kl is not None]


def _diverges_little(folder: Path, base: Path, most: float) -> None:
    (kl,) = _divergences([folder], base)
    assert 0 <= kl < most


def test_awq_on_every_family(
    family: str,
    make_model: Callable[..., Path],
    compress: Compress,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, out = make_model(family), tmp_path / "out"
    report = compress(base, out)
    assert len(report.blocks) == 2
    assert all(b["error"] <= b["rounding_error"] for b in report.blocks)
    if family in FAMILIES:
        assert not [note for note in report.notes if "not folded" in note]
    else:
        assert any("groups are found from the graph" in note for note in report.notes)
    _diverges_little(out, base, most=2.0)
    _runs_the_same(out, tmp_path, monkeypatch)
    if family not in MIXTURES:
        _loads_in_transformers(out, tmp_path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family_", ["llama", "mixtral"])
def test_every_form(
    form: str,
    family_: str,
    make_model: Callable[..., Path],
    compress: Compress,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, out = make_model(family_), tmp_path / "out"
    report = compress(base, out, **FORMS[form])
    _runs_the_same(out, tmp_path, monkeypatch)
    refused = any("transformers will not load" in note for note in report.notes)
    if not refused:
        _loads_in_transformers(out, tmp_path)
    else:
        with pytest.raises((OSError, RuntimeError, ValueError, KeyError)):  # never other logits
            _loads_in_transformers(out, tmp_path)


def test_more_bits_diverge_less(
    make_model: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    base, folders = make_model("llama"), [tmp_path / bits for bits in "8432"]
    for folder in folders:
        compress(base, folder, bits=int(folder.name))
    kl = _divergences(folders, base)
    assert len(kl) == 4 and kl[0] > 0 and kl == sorted(kl)


def test_manifest_tells_what_was_done(
    make_model: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    base, out = make_model("qwen2"), tmp_path / "out"
    report = compress(base, out)
    manifest = json.loads((out / "optim.json").read_text())
    assert manifest["bits_per_weight"] == report.bits_per_weight
    assert manifest["calibration"]["samples"] == 4
    assert len(manifest["modules"]) == 14 and set(manifest["modules"].values()) == {
        "4-bit g32 asym"
    }
    assert manifest["original_sha256"].keys() == open_checkpoint(str(base)).tensors.keys()
    size = sum(
        open_checkpoint(str(out)).tensors[n].nbytes for n in open_checkpoint(str(out)).tensors
    )
    assert manifest["bytes"] == size == report.output_bytes


@pytest.mark.parametrize("tokens", [0.7, 100])
def test_starved_experts_are_rounded_plainly(
    tokens: float,
    make_model: Callable[..., Path],
    compress: Compress,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some of them, or all; the folds around them still hold."""
    monkeypatch.setattr("optim.quant.block_solver.STARVED", tokens)
    base = make_model("mixtral")
    report = compress(base, tmp_path / "out", bits=8)
    starved = [note for note in report.notes if "too few tokens seen" in note]
    assert starved and (tokens < 100 or starved[0].startswith("blocks 0, 1: "))
    assert all(".experts." in note and "self_attn" not in note for note in starved)
    assert not [n for n in report.notes if "not folded" in n or "was no better" in n]
    _diverges_little(tmp_path / "out", base, most=0.01)


@pytest.mark.parametrize("family_", MIXTURES)
def test_experts_in_turns_are_solved_as_well(
    family_: str,
    make_model: Callable[..., Path],
    compress: Compress,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mixture of any size takes the memory of a few Gram matrices."""
    seen: list[int] = []

    def counted(*args: Any) -> Any:
        found = observe(*args)
        seen.append(len(found))
        return found

    monkeypatch.setattr("optim.quant.block_solver.observe", counted)
    base, whole, turns = make_model(family_), tmp_path / "whole", tmp_path / "turns"
    wanted = compress(base, whole).blocks
    at_once, seen[:] = list(seen), []
    monkeypatch.setattr("optim.quant.block_solver.GRAM_BYTES", 1)
    got = compress(base, turns).blocks
    assert len(at_once) == 2, "a block is observed once"
    assert len(seen) == 2 * (4 + 1), "four experts, then the rest"
    assert sum(seen) == sum(at_once)
    # Searched in another order, rows of `up` weigh differently: nearly the same, not to the bit.
    for one, other in zip(wanted, got, strict=True):
        assert other["error"] == pytest.approx(one["error"], rel=0.1)
        assert other["error"] < 0.9 * other["rounding_error"]


def _without_router(row: Family) -> Family:
    return replace(row, groups=tuple(replace(g, unquantized=()) for g in row.groups))


WRONG: Mapping[str, Callable[[Family], Family]] = {
    "mixtral": _without_router,
    "gemma2": lambda row: replace(row, norm_offset=0),
    "llama": lambda row: replace(
        row, groups=tuple(replace(g, readers=g.readers[:1]) for g in row.groups)
    ),
}


@pytest.mark.parametrize("family_", WRONG)
def test_a_wrong_row_is_caught(
    family_: str,
    make_model: Callable[..., Path],
    compress: Compress,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It costs the group its scales and a note, never the model its meaning."""
    rows = FAMILIES | {family_: WRONG[family_](FAMILIES[family_])}
    monkeypatch.setattr(fold, "FAMILIES", rows)
    base = make_model(family_)
    report = compress(base, tmp_path / "out", bits=8)
    assert [note for note in report.notes if "not folded" in note]
    assert not [note for note in report.notes if "not folded: self_attn.v_proj" in note]
    _diverges_little(tmp_path / "out", base, most=0.01)
