"""Checkpoints made elsewhere: the same weights to the last bit, run packed; lies are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.engine.load import load_model
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.foreign.awq import pack, unpack
from optim.runtime.storage.foreign.float8 import Float8, Held
from optim.runtime.storage.foreign.gptq import pack_zeros, zero_points
from optim.runtime.storage.open import open_checkpoint
from tests.runtime.storage.foreign import writers

Make = Callable[[str, tuple[int, ...]], Any]


def quantized(bits: int, group: int, write: Callable[..., dict[str, Tensor]], **own: Any) -> Make:
    """Packs every linear of the blocks; the embedding and the head as well where `tables`."""
    tables, symmetric, mlx = (
        own.pop("tables", False),
        own.pop("symmetric", False),
        own.pop("mlx", 0),
    )

    def make(name: str, shape: tuple[int, ...]) -> Any:
        if not tables and ".layers." not in name:
            return None
        q, scale, zero = writers.draw(*shape, bits, group, len(name) + shape[0])
        if symmetric:
            zero = torch.full_like(zero, 1 << (bits - 1))
        values = (q, scale, (-zero * scale + 0.01 * scale).half()) if mlx else (q, scale, zero)
        return values, write(values, bits, **own)

    return make


def awq_config(group: int = 32, **more: Any) -> dict[str, Any]:
    known = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    return {"quantization_config": known | {"version": "gemm"} | more}


def gptq_config(bits: int, group: int = 32, **more: Any) -> dict[str, Any]:
    known = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False}
    return {"quantization_config": known | {"sym": False, "checkpoint_format": "gptq"} | more}


def mlx_config(bits: int, group: int = 32, **more: Any) -> dict[str, Any]:
    known = {"group_size": group, "bits": bits} | more
    return {"quantization": known, "quantization_config": known}


def gptq2(values: writers.Integers, bits: int) -> dict[str, Tensor]:
    return writers.gptq(values, bits, version=2)


V2, SYM = {"checkpoint_format": "gptq_v2"}, {"sym": True}
CASES = {
    "awq": (awq_config(), quantized(4, 32, writers.awq)),
    "awq-channel": (awq_config(-1), quantized(4, -1, writers.awq)),
    "gptq-sym": (gptq_config(4, **SYM), quantized(4, 32, writers.gptq, symmetric=True)),
    "gptq-asym": (gptq_config(4), quantized(4, 32, writers.gptq)),
    "gptq-v2-2": (gptq_config(2, **V2), quantized(2, 32, gptq2)),
    "gptq-v2-3": (gptq_config(3, **V2), quantized(3, 32, gptq2)),
    "gptq-8": (gptq_config(8, 16), quantized(8, 16, writers.gptq)),
    **{
        f"mlx-{bits}": (mlx_config(bits), quantized(bits, 32, writers.mlx, tables=True, mlx=1))
        for bits in (2, 3, 4, 5, 6, 8)
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_the_description(
    case: str, tiny_folder: Path, tmp_path: Path
) -> None:
    config, make = CASES[case]
    stood = writers.rewrite(tiny_folder, tmp_path / "made", make, config)
    view = PlainView(open_checkpoint(str(tmp_path / "made")))
    assert len(stood) >= 14
    for name, weight in stood.items():
        if config["quantization_config"].get("quant_method"):
            assert torch.equal(view.read(name), weight), name
        else:  # q * scale + bias in float32
            torch.testing.assert_close(view.read(name), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["awq", "gptq-sym", "gptq-v2-3", "mlx-4", "mlx-6"])
def test_it_runs_packed_as_its_plain_weights_run(
    case: str, tiny_folder: Path, tmp_path: Path
) -> None:
    config, make = CASES[case]
    stood = writers.rewrite(tiny_folder, tmp_path / "made", make, config)
    plain = load_file(tiny_folder / "model.safetensors") | stood
    save_file(plain, tiny_folder / "model.safetensors", {"format": "pt"})
    made, wide = load_model(str(tmp_path / "made")), load_model(str(tiny_folder))
    ids = torch.arange(2, 40)[None]
    got, wanted = (m.forward(ids, m.new_cache(), all_logits=True) for m in (made, wide))
    assert float((got - wanted).norm() / wanted.norm()) < 0.03
    assert made.weight_bytes < wide.weight_bytes / 2


def reordered(values: writers.Integers, bits: int) -> dict[str, Tensor]:
    made = writers.gptq(values, bits)
    made["g_idx"] = made["g_idx"].flip(0).contiguous()
    return made


def test_activation_order_is_widened(tiny_folder: Path, tmp_path: Path) -> None:
    config = gptq_config(4, desc_act=True)
    made = quantized(4, 32, reordered)
    writers.rewrite(tiny_folder, tmp_path / "made", made, config)
    checkpoint = open_checkpoint(str(tmp_path / "made"))
    name = "model.layers.0.self_attn.k_proj.weight"
    q, scale, zero = writers.draw(32, 64, 4, 32, len(name) + 32)
    wanted = writers.dense(q, scale.flip(1), zero.flip(1))
    assert torch.equal(checkpoint.read(name), wanted.half())
    pieces = 32 * 64 // 2 + 2 * 32 // 2 + 2 * 32 * 2 + 4 * 64  # codes, zeros, scales, g_idx
    assert checkpoint.held(name) == ("GPTQ 4-bit, activation order", pieces)


@pytest.mark.parametrize("shape", [(1, 1), (64, 1), ()])
def test_eight_bit_floats_are_read_as_bf16(
    shape: tuple[int, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(tiny_folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    small = (tensors[name] * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.5
    tensors |= {name: small, f"{name}_scale": scale.float()}
    save_file(tensors, tiny_folder / "model.safetensors")
    block = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    set_config(tiny_folder, {"quantization_config": block})
    got = open_checkpoint(str(tiny_folder)).read(name)
    assert torch.equal(got, (small.float() * scale).bfloat16())


def set_config(folder: Path, more: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_float8_in_blocks() -> None:
    weight = torch.randn(200, 256).to(torch.float8_e4m3fn)
    pieces = {"weight": weight, "weight_scale_inv": torch.rand(2, 2)}
    held = Held(200, 256, torch.bfloat16, None, "fp8")
    got = Float8({}).part("weight", held, pieces.__getitem__)
    wide = pieces["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:200]
    assert torch.equal(got, (weight.float() * wide).bfloat16())


LIES: dict[str, tuple[dict[str, Any], Make, str]] = {
    "bits": (gptq_config(8), quantized(4, 32, writers.gptq), "qzeros"),
    "group": (awq_config(64), quantized(4, 32, writers.awq), "groups of 64"),
    "group that does not divide": (awq_config(48), quantized(4, 32, writers.awq), "48"),
    "mlx bits": (mlx_config(8), quantized(4, 32, writers.mlx, mlx=1), "weight"),
    "mlx group": (mlx_config(4, 64), quantized(4, 32, writers.mlx, mlx=1), "weight"),
    "mlx both": (mlx_config(2, 64), quantized(4, 32, writers.mlx, mlx=1), "expected"),
    "no number": (awq_config(bits="4"), quantized(4, 32, writers.awq), "bits is '4'"),
    "version": (awq_config(version="gemv"), quantized(4, 32, writers.awq), "gemv"),
    "mode": (mlx_config(4, mode="mxfp4"), quantized(4, 32, writers.mlx, mlx=1), "mxfp4"),
    "marlin": (
        gptq_config(4, checkpoint_format="marlin"),
        quantized(4, 32, writers.gptq),
        "marlin",
    ),
    "no name": (
        gptq_config(4, checkpoint_format={"a": 1}),
        quantized(4, 32, writers.gptq),
        "of the format",
    ),
    "own for some": (
        gptq_config(4, dynamic={"+:.*": {"bits": 8}}),
        quantized(4, 32, writers.gptq),
        "dynamic",
    ),
    "no names": (gptq_config(4, dynamic=5), quantized(4, 32, writers.gptq), "dynamic"),
}


@pytest.mark.parametrize("case", LIES)
def test_what_lies_is_refused_when_it_is_opened(
    case: str, tiny_folder: Path, tmp_path: Path
) -> None:
    config, make, said = LIES[case]
    writers.rewrite(tiny_folder, tmp_path / "made", make, config)
    with pytest.raises(OptimError, match=said) as caught:
        open_checkpoint(str(tmp_path / "made"))
    assert caught.value.code == 2
    assert caught.value.fix


@pytest.mark.parametrize("case", ["awq", "gptq-asym", "mlx-4"])
@pytest.mark.parametrize("damage", ["missing", "dtype", "shape", "dims"])
def test_a_damaged_piece_is_named(
    case: str, damage: str, tiny_folder: Path, tmp_path: Path
) -> None:
    config, make = CASES[case]
    made = tmp_path / "made"
    writers.rewrite(tiny_folder, made, make, config)
    tensors = load_file(made / "model.safetensors")
    name = next(n for n in sorted(tensors) if n.endswith((".qzeros", ".biases")))
    broken = {"dtype": lambda t: t.to(torch.int16), "shape": lambda t: t[1:].clone(),
              "dims": lambda t: t[None]}  # fmt: skip
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = broken[damage](tensors[name])
    save_file(tensors, made / "model.safetensors")
    with pytest.raises(OptimError, match=name) as caught:
        open_checkpoint(str(made))
    assert caught.value.code == 2


def test_zero_points_that_are_not_symmetric_are_found(tiny_folder: Path, tmp_path: Path) -> None:
    make = quantized(4, 32, writers.gptq)
    writers.rewrite(tiny_folder, tmp_path / "made", make, gptq_config(4, sym=True))
    with pytest.raises(OptimError, match="symmetric"):
        load_model(str(tmp_path / "made"))


@given(outputs=st.integers(1, 9), count=st.integers(1, 20), data=st.data())
@settings(max_examples=60, deadline=None)
def test_awq_words_go_there_and_back(outputs: int, count: int, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 1000))
    made = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (8 * outputs, count), generator=made).to(torch.uint8)
    assert torch.equal(unpack(pack(q)), q)
    assert torch.equal(pack(q), writers.awq((q.long(), q.half(), q.long()), 4)["qweight"])


@given(bits=st.sampled_from((2, 3, 4, 8)), version=st.sampled_from((1, 2)), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_gptq_zeros_go_there_and_back(bits: int, version: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    zero = torch.randint(0, 1 << bits, (64, 3), generator=made).to(torch.uint8)
    assert torch.equal(zero_points(pack_zeros(zero, bits, version), bits, version), zero)
