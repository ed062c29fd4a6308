"""The Triton kernel: in the interpreter on odd shapes, on a card (`-m gpu`) the same, and compiled
for cards that are not here."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from optim.runtime.formats.pack_quantized import Scheme, dequantize

k = pytest.importorskip("optim.runtime.kernels.triton.w4a16", exc_type=ImportError)

DEVICES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [  # scheme, inputs, outputs, tokens: none is a multiple of a block
    (Scheme(4, 32, False), 160, 37, 1),
    (Scheme(4, 16, True), 112, 70, 3),
    (Scheme(4, 64, False), 192, 45, 4),
    (Scheme(4, 128, True), 256, 33, 5),
    (Scheme(4, 256, False), 256, 20, 17),
    (Scheme(4, 96, True), 192, 33, 2),
    (Scheme(4, -1, False), 75, 18, 6),
    (Scheme(8, 64, True), 192, 33, 1),
    (Scheme(8, -1, True), 77, 20, 5),
    (Scheme(8, 32, False), 96, 31, 33),
    (Scheme(3, 48, False), 96, 33, 2),
    (Scheme(2, 64, False), 320, 35, 18),
]
BOUND = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 6e-3}


def layer(scheme: Scheme, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(inputs)
    top, shape = 1 << scheme.bits, (outputs, scheme.groups(inputs))
    q = torch.randint(0, top, (outputs, inputs), generator=generator).to(torch.uint8)
    scale = (torch.rand(shape, generator=generator) + 0.1).to(torch.bfloat16)
    zero = torch.randint(0, top, shape, generator=generator).to(torch.uint8)
    return q, scale, None if scheme.symmetric else zero


def to(device: str, *tensors: Tensor | None) -> Iterator[Tensor | None]:
    return (None if tensor is None else tensor.to(device) for tensor in tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(BOUND), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}, {c[1]}x{c[2]}, {c[3]} tokens")
def test_kernel_equals_the_formula(
    device: str, dtype: torch.dtype, case: tuple[Scheme, int, int, int]
) -> None:
    scheme, inputs, outputs, tokens = case
    few, split = tokens <= k.FEW_TOKENS, 3 if outputs % 2 else 1
    torch.manual_seed(tokens)
    if device == "cpu" and dtype == torch.bfloat16 and not few:
        dtype = torch.float16  # the interpreter's tl.dot does not know bf16
    q, scale, zero = layer(scheme, outputs, inputs)
    bias, x = torch.randn(outputs), torch.randn(tokens, inputs).to(dtype)
    wanted = x.double() @ dequantize(q, scale, zero, scheme).double().T + bias
    weight = k.Weight(*to(device, q, scale, zero), scheme, bias.to(device))
    block = k.triton.next_power_of_2(tokens)
    config = k.Config(block if few else max(16, block), 32, split, 4, 2)
    got = weight(x.to(device), config)
    assert got.dtype == dtype
    assert torch.equal(weight(x.to(device), config), got)
    assert (got.cpu() - wanted).norm() <= BOUND[dtype] * wanted.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", [case[0] for case in CASES], ids=str)
def test_many_tokens_take_the_unpacked_weight(device: str, scheme: Scheme) -> None:
    inputs = 384 if scheme.group_size > 0 and 384 % scheme.group_size == 0 else 256
    inputs = inputs if scheme.group_size > 0 else 75
    q, scale, zero = layer(scheme, 33, inputs)
    weight = k.Weight(*to(device, q, scale, zero), scheme, None)
    dense = dequantize(q, scale, zero, scheme)
    torch.testing.assert_close(weight.rows(0, 33, torch.float32).cpu(), dense)
    torch.testing.assert_close(weight.rows(5, 21, torch.float32).cpu(), dense[5:21])
    x = torch.randn(k.MANY_TOKENS, inputs)
    torch.testing.assert_close(weight(x.to(device)).cpu(), x @ dense.T, rtol=1e-3, atol=1e-2)


def test_configurations_fill_the_card_and_never_pass_the_tiles() -> None:
    for tokens in (1, 2, 3, 4, 5, 16, 17, 64, 255):
        for outputs in (64, 4096, 28672):
            for tiles in (1, 5, 32, 112):
                config = k.configure(tokens, outputs, tiles, 132)
                assert 1 <= config.split <= min(16, tiles)
                assert config.block_m >= (16 if tokens > k.FEW_TOKENS else 1)
    assert k.configure(1, 4096, 32, 132).split > 1
    assert k.configure(64, 28672, 64, 132).split == 1


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optim.runtime.kernels.triton import w4a16 as k
for target in GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64):
    for dot, rows in ((False, 1), (True, 16))[target.backend == "hip" :]:
        constants = dict(BITS=4, MIDDLE=8, SHIFT=128, RUN=4, HAS_ZERO=True, HAS_BIAS=True, DOT=dot,
                         BLOCK_M=rows, BLOCK_N=64, SLICE=16)
        types = dict(x="*bf16", words="*i32", scale="*bf16", zero="*u8", bias="*bf16", out="*fp32")
        signature = {name: types.get(name, "i32") for name in k._matmul.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(k._matmul, signature, constexprs=constants)
        binary = list(triton.compile(source, target=target).asm)[-1]
        print(target.arch, dot, binary)
"""


def test_it_compiles_for_hopper_and_mi300_without_one(tmp_path) -> None:  # type: ignore[no-untyped-def]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["90 False cubin", "90 True cubin", "gfx942 True hsaco"]
