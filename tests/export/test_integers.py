"""`optim export` to AWQ, GPTQ, MLX and compressed-tensors: the same integers, as described."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optim.export.integers import integer_zeros
from optim.export.run import export, plan
from optim.recipes.errors import OptimError
from optim.recipes.schema import Export
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.open import open_checkpoint
from tests.runtime.storage.foreign import writers

NAME = "model.layers.0.self_attn.q_proj.weight"
SIZE = {"quant_method": "gptq", "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose sizes 32 divides."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    folder = tmp_path_factory.mktemp("export") / "plain"
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


def source(plain: Path, to: Path, bits: int, symmetric: bool = False, size: int = 32) -> Path:
    """The model in GPTQ's version 2, of known integers, written by the test itself."""

    def make(name: str, shape: tuple[int, ...]) -> Any:
        if ".layers." not in name:
            return None
        values = drawn(shape, bits, symmetric, size)
        return values, writers.gptq(values, bits, version=2)

    writers.rewrite(
        plain, to, make, {"quantization_config": SIZE | {"bits": bits, "group_size": size}}
    )
    return to


def drawn(shape: tuple[int, ...], bits: int, symmetric: bool, size: int = 32) -> writers.Integers:
    q, scale, zero = writers.draw(*shape, bits, size, seed=shape[0])
    return q, scale, torch.full_like(zero, 1 << (bits - 1)) if symmetric else zero


def exported(source: Path, out: Path, form: str) -> Path:
    made = plan(str(source), Export.model_validate({"format": form}), str(out))
    export(made, lambda *_: None)
    return out


def pieces(folder: Path) -> dict[str, Tensor]:
    stem, found = NAME.removesuffix("weight"), load_file(folder / "model.safetensors")
    return {k.removeprefix(stem): v for k, v in found.items() if k.startswith(stem)}


def the_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_awq_is_as_described(plain: Path, tmp_path: Path) -> None:
    out = exported(source(plain, tmp_path / "in", 4), tmp_path / "out", "awq")
    the_same(pieces(out), writers.awq(drawn((64, 64), 4, False), 4))
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (block["quant_method"], block["bits"], block["group_size"]) == ("awq", 4, 32)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, True), (4, False), (3, False)])
def test_gptq_is_as_described(bits: int, symmetric: bool, plain: Path, tmp_path: Path) -> None:
    out = exported(source(plain, tmp_path / "in", bits, symmetric), tmp_path / "out", "gptq")
    wanted = writers.gptq(drawn((64, 64), bits, symmetric), bits, version=1 if symmetric else 2)
    the_same(pieces(out), wanted)
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    assert block["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert block["sym"] is symmetric


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mlx_is_as_described(bits: int, plain: Path, tmp_path: Path) -> None:
    out = exported(source(plain, tmp_path / "in", bits), tmp_path / "out", "mlx")
    q, scale, zero = drawn((64, 64), bits, False)
    the_same(pieces(out), writers.mlx((q, scale, (-zero * scale.float()).half()), bits))
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": bits}
    assert "rope_theta" in config


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_stay_through_every_format(
    bits: int, symmetric: bool, plain: Path, tmp_path: Path
) -> None:
    folder = source(plain, tmp_path / "in", bits, symmetric)
    q, scale, zero = drawn((64, 64), bits, symmetric)
    chain = ["mlx", "compressed-tensors", "gptq", *(["awq"] if bits <= 4 else []), "mlx", "gptq"]
    for at, form in enumerate(chain if bits != 8 else chain[:-1]):
        folder = exported(folder, tmp_path / f"{at}-{form}", form)
        view = PlainView(open_checkpoint(str(folder)))
        got, steps, other, scheme = view.integers(NAME)
        assert torch.equal(got.long(), q), form
        assert torch.equal(steps, scale), form
        if other is not None and not scheme.offset:
            assert torch.equal(other.long(), zero), form
        if form != "mlx":
            assert torch.equal(view.read(NAME), writers.dense(q, scale, zero)), form


def test_a_larger_group_is_repeated(plain: Path, tmp_path: Path) -> None:
    """Whole channels of 64 and of 128 inputs: AWQ has one group for all, of 64."""

    def make(name: str, shape: tuple[int, ...]) -> Any:
        values = writers.draw(*shape, 4, -1)
        return (values, writers.gptq(values, 4, version=2)) if ".layers." in name else None

    config = {"quantization_config": SIZE | {"bits": 4, "group_size": -1}}
    stood = writers.rewrite(plain, tmp_path / "in", make, config)
    out = PlainView(open_checkpoint(str(exported(tmp_path / "in", tmp_path / "out", "awq"))))
    assert {str(out.scheme(name)) for name in stood} == {"4-bit g64 asym"}
    for name, weight in stood.items():
        assert torch.equal(out.read(name), weight), name


@given(bits=st.sampled_from((2, 3, 4, 6, 8)), seed=st.integers(0, 500))
@settings(max_examples=80, deadline=None)
def test_zero_points_are_found_behind_offsets(bits: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    scale = (torch.rand(7, 3, generator=made) + 0.01).half()
    zero = torch.randint(0, 1 << bits, (7, 3), generator=made)
    offset = (-zero * scale.float()).half()
    found = integer_zeros(scale, offset, bits)
    assert found is not None and torch.equal(found.long(), zero)
    offset[3, 1] += 0.3 * scale[3, 1]
    assert integer_zeros(scale, offset, bits) is None


def test_what_a_format_lacks_is_refused_before_any_work(plain: Path, tmp_path: Path) -> None:
    def refused(source: Path, form: str) -> str:
        with pytest.raises(OptimError) as caught:
            exported(source, tmp_path / "no", form)
        assert caught.value.code == 2 and caught.value.fix
        assert not (tmp_path / "no").exists()
        return caught.value.message

    assert "8 bits, AWQ 4" in refused(source(plain, tmp_path / "8", 8), "awq")
    for form in ("awq", "gptq", "mlx", "compressed-tensors"):
        assert "no integers" in refused(plain, form)
    assert "groups of 16" in refused(source(plain, tmp_path / "16", 4, size=16), "awq")

    def make(name: str, shape: tuple[int, ...]) -> Any:
        if ".layers." not in name:
            return None
        q, scale, _ = drawn(shape, 4, False)
        return (q, scale, 0.3 * scale), writers.mlx((q, scale, 0.3 * scale), 4)

    config = {"quantization": {"group_size": 32, "bits": 4}}
    writers.rewrite(plain, tmp_path / "mlx", make, config)
    for form in ("awq", "gptq", "compressed-tensors"):
        assert "adds floats" in refused(tmp_path / "mlx", form)


def test_the_plan_says_what_moves(plain: Path, tmp_path: Path) -> None:
    folder = source(plain, tmp_path / "in", 4)
    for form, moved in (("awq", ""), ("gptq", ""), ("compressed-tensors", ""), ("mlx", "offsets")):
        made = plan(str(folder), Export.model_validate({"format": form}), str(tmp_path / "out"))
        rows = [row for row in made.as_dict()["weights"] if "4-bit" in row["from"]]
        assert len(rows) >= 1 and sum(row["tensors"] for row in rows) == 7
        assert all(moved in row["change"] and bool(row["change"]) == bool(moved) for row in rows)


def test_transformers_reads_compressed_tensors(plain: Path, tmp_path: Path) -> None:
    folder = source(plain, tmp_path / "in", 4)
    out = exported(folder, tmp_path / "out", "compressed-tensors")
    wide = exported(folder, tmp_path / "wide", "safetensors")
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (out, wide)]
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        got, wanted = (model(ids).logits for model in models)
    assert float((got - wanted).norm() / wanted.norm()) < 0.01  # wide is rounded to bf16


@pytest.mark.skipif(not importlib.util.find_spec("mlx_lm"), reason="mlx-lm is not installed")
def test_mlx_reads_the_same_weights(plain: Path, tmp_path: Path) -> None:
    import mlx.core as mx
    import numpy as np

    out = exported(source(plain, tmp_path / "in", 4), tmp_path / "out", "mlx")
    stored = mx.load(str(out / "model.safetensors"))
    stem = NAME.removesuffix(".weight")
    w, s, b = (stored[f"{stem}.{piece}"] for piece in ("weight", "scales", "biases"))
    float32 = mx.float32
    got = mx.dequantize(w, s.astype(float32), b.astype(float32), group_size=32, bits=4)
    wanted = PlainView(open_checkpoint(str(out))).read(NAME)
    torch.testing.assert_close(torch.from_numpy(np.array(got)), wanted, rtol=1e-5, atol=1e-6)
