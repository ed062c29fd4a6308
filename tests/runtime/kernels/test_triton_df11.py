"""The Huffman decoder on a GPU: in the interpreter, on a card (`-m gpu`) the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optim.export.lossless.dfloat11 import encode
from optim.runtime.formats.dfloat11 import Unit
from optim.runtime.tensor_files import TensorInfo

k = pytest.importorskip("optim.runtime.kernels.triton_df11", exc_type=ImportError)

DEVICES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]


def unit_of(weights: torch.Tensor) -> Unit:
    tensors = encode([weights])
    infos = {key: TensorInfo(tuple(t.shape), t.dtype, t.nbytes) for key, t in tensors.items()}
    flat = {key: t.numpy().reshape(-1).view("uint8") for key, t in tensors.items()}
    return Unit("unit", infos, lambda piece, start, stop: flat[piece][start:stop])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 63, 64, 65, 2048, 5000])
def test_it_decodes_what_the_cpu_does(device: str, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    weights = torch.randn(size, generator=generator).mul(0.02).to(torch.bfloat16)
    unit = unit_of(weights)
    made = k.Decoder(unit, torch.device(device))()
    assert torch.equal(made.cpu().view(torch.int16), weights.view(torch.int16))


@pytest.mark.parametrize("device", DEVICES)
def test_long_codes_walk_all_tables(device: str) -> None:
    """Exponents as rare as in Fibonacci's numbers: codes of 1 to 18 bits."""
    counts = [1, 1]
    while len(counts) < 18:
        counts.append(counts[-1] + counts[-2])
    weights = torch.cat([torch.full((n,), 2.0**i) for i, n in enumerate(counts)])
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(0))
    weights = weights[order].to(torch.bfloat16)
    unit = unit_of(weights)
    assert unit.lengths.max() > 16
    made = k.Decoder(unit, torch.device(device))()
    assert torch.equal(made.cpu(), weights)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optim.runtime.kernels import triton_df11 as k
types = {"words": "*i32", "base": "*i64", "offset": "*i16", "walk": "*i16", "rest": "*u8",
         "out": "*i16", "n": "i32"}
constants = {"EACH": 64, "GROUP": 32, "LANES": 128}
for target in GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64):
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(k._decode, signature, constexprs=constants)
    print(target.arch, list(triton.compile(source, target=target).asm)[-1])
"""


def test_it_compiles_for_hopper_and_mi300_without_one(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["90 cubin", "gfx942 hsaco"]
