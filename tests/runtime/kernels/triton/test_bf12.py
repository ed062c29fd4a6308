"""The Triton kernels over 12-bit planes: in the interpreter, on a card (`-m gpu`) the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

k = pytest.importorskip("optim.runtime.kernels.triton.bf12", exc_type=ImportError)

DEVICES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(5, 64), (19, 133), (16, 520), (3, 1)]


def weight_of(rows: int, cols: int) -> torch.Tensor:
    """Normal numbers, with both zeros and moderate escapes among them."""
    generator = torch.Generator().manual_seed(rows * cols)
    weight = torch.randn(rows, cols, generator=generator).mul(0.05).to(torch.bfloat16)
    odd = torch.tensor([0.0, -0.0, 30.0, -3e-7, 1e-9, 5.0, 0.0], dtype=torch.bfloat16)
    flat = weight.view(-1)
    places = torch.arange(0, flat.numel(), 13)
    flat[places] = odd.repeat(-(-len(places) // len(odd)))[: len(places)]
    return weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_it_expands_to_the_weight(device: str, rows: int, cols: int) -> None:
    weight = weight_of(rows, cols).to(device)
    weight[0, 0] = float("nan")
    planes = k.Weight(weight)
    assert torch.equal(planes[:].view(torch.int16), weight.view(torch.int16))
    ids = torch.randint(0, rows, (2, 3), device=device)
    assert torch.equal(planes.take(ids).view(torch.int16), weight[ids].view(torch.int16))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 5, 17])
def test_the_product(device: str, rows: int, cols: int, tokens: int) -> None:
    weight = weight_of(rows, cols).to(device)
    planes = k.Weight(weight)
    x = torch.randn(tokens, cols, device=device, generator=torch.Generator(device).manual_seed(1))
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 1e-2)):
        if device == "cpu" and dtype == torch.bfloat16 and tokens > k.FEW_TOKENS:
            continue  # the interpreter's dot takes bf16 for the integers it is held in
        wanted = x.to(dtype).double() @ weight.double().T
        y = planes(x.to(dtype))
        assert y.dtype == dtype
        assert float((y - wanted).norm()) <= tolerance * float(wanted.norm())


def test_every_pattern_is_held() -> None:
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(8, 8192)
    planes = k.Weight(patterns.view(torch.bfloat16))
    assert torch.equal(planes[:].view(torch.int16), patterns)


def test_twelve_bits() -> None:
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).mul(0.02)
    planes = k.Weight(weight.to(torch.bfloat16))
    assert 12 < 8 * planes.nbytes / weight.numel() < 12.05


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optim.runtime.kernels.triton import bf12 as k

def build(kernel, types, constants, target):
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants)
    print(target.arch, list(triton.compile(source, target=target).asm)[-1])

for target in GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64):
    for dot in (False, True):
        x = dict(x="*bf16", turned="*bf16" if dot else "*fp32", y="*bf16", values="*bf16")
        types = dict.fromkeys(("codes", "rest", "escapes", "at"), "*i32") | x | {"factor": "fp32"}
        sizes = dict(BLOCK_M=16, BLOCK_N=64, BLOCK_G=32) if dot else dict(
            BLOCK_M=1, BLOCK_N=16, BLOCK_G=64)
        build(k._product, types, dict(DOT=dot, **sizes), target)
    types = {"codes": "*i32", "rest": "*i32", "out": "*i16"}
    build(k._expand, types, dict(BLOCK=256), target)
"""


def test_it_compiles_for_hopper_and_mi300_without_one(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["90 cubin"] * 3 + ["gfx942 hsaco"] * 3
