"""The ARM kernels (NEON with dot products) under qemu, against their torch references.

They are compiled for aarch64 beside a small driver and fed from here; run where Debian's
`gcc-aarch64-linux-gnu` and `qemu-user` are installed (`make test-neon`).
"""

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from optim.runtime.cache.attention import Rule, attend
from optim.runtime.cache.full import Layer, static_layers
from optim.runtime.cache.quantized import packed_layers
from optim.runtime.formats.schemes import Scheme
from optim.runtime.formats.static_int import accumulate, pack_nibbles
from optim.runtime.kernels import compile as compiler
from optim.runtime.kernels.bf12 import planes_of
from optim.runtime.kernels.cpu import bf16, skip_dense, skip_int4, w4a8
from optim.runtime.kernels.cpu import step as cpu_step
from optim.runtime.kernels.cpu.attention_prompt import CPrompt
from optim.runtime.kernels.door import Struct

GCC, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"  # of Debian's cross compiler
ROWS, FLIP = 4, 0x80  # of simd_int.h for NEON
pytestmark = pytest.mark.skipif(
    not (shutil.which(GCC) and shutil.which(QEMU)), reason=f"no {GCC} and {QEMU} here"
)
F32 = torch.float32


class Neon:
    """A process that runs kernels for ARM."""

    def __init__(self, program: Path) -> None:
        command = [QEMU, "-L", LIBRARIES, str(program)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin and self._process.stdout
        self._to: BinaryIO = self._process.stdin  # type: ignore[assignment]
        self._from: BinaryIO = self._process.stdout  # type: ignore[assignment]

    def close(self) -> None:
        self._to.close()
        self._process.wait(timeout=60)

    def __call__(self, name: str, *arguments: Any, floats: tuple[float, float] = (0, 0)) -> int:
        """Call `name` with tensors, structures, whole numbers; None is a null pointer.

        What it wrote into tensors is there afterwards.
        """
        self._buffers: list[tuple[bytes, Tensor | None]] = []
        self._pointers: list[tuple[int, int, int]] = []
        given = [self._argument(argument) for argument in arguments]
        self._write(len(name), name.encode(), len(self._buffers))
        for content, _ in self._buffers:
            self._write(len(content), content)
        self._write(len(self._pointers), *(n for pointer in self._pointers for n in pointer))
        self._write(len(given), *(n for pair in given for n in pair), struct.pack("<2f", *floats))
        self._to.flush()
        (made,) = struct.unpack("<q", self._from.read(8))
        for content, tensor in self._buffers:
            back = self._from.read(len(content))
            if tensor is not None and tensor.numel():
                raw = np.frombuffer(back, np.uint8).copy()
                tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(raw))
        return int(made)

    def _write(self, *values: int | bytes) -> None:
        for value in values:
            self._to.write(value if isinstance(value, bytes) else struct.pack("<q", value))

    def _argument(self, argument: Any) -> tuple[int, int]:
        if isinstance(argument, Tensor | Struct):
            return 1, self._buffer(argument)
        return 0, 0 if argument is None else int(argument)

    def _buffer(self, what: Any) -> int:
        place = len(self._buffers)
        if isinstance(what, Tensor):
            raw = what.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            self._buffers.append((raw, what))
            return place
        if isinstance(what, np.ndarray):
            self._buffers.append((what.tobytes(), None))
            return place
        self._buffers.append((bytes(what), None))
        self._point(what, place, 0)
        for name, side in getattr(what, "_sides", ()):
            self._point(side, place, getattr(type(what), name).offset)
        if getattr(what, "sides", None) is not None:
            self._pointers.append((place, type(what).packed.offset, self._buffer(what.sides)))
        return place

    def _point(self, what: Struct, place: int, start: int) -> None:
        for field, (held, _) in what.__dict__.get("kept", {}).items():
            if held is not None:
                offset = start + getattr(type(what), field).offset
                self._pointers.append((place, offset, self._buffer(held)))


@pytest.fixture(scope="module")
def neon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neon]:
    program = tmp_path_factory.mktemp("neon") / "kernels"
    folder = Path(compiler.__file__).parent / "cpu"
    sources = [*map(str, sorted(folder.glob("*.c"))), str(Path(__file__).parent / "neon_driver.c")]
    flags = [flag for flag in compiler.FLAGS if flag != "-shared"]
    command = [GCC, *flags, "-march=armv8.2-a+dotprod", *sources, "-o", str(program)]
    subprocess.run([*command, "-rdynamic", "-ldl", "-lm"], check=True)
    made = Neon(program)
    yield made
    made.close()


def blocks(q: Tensor, bits: int, columns: int, flip: int) -> Tensor:
    """What `w4a8._blocks` makes of bytes, with NEON's rows."""
    padding = (0, columns - q.shape[1], 0, -q.shape[0] % ROWS)
    words = torch.nn.functional.pad(q ^ flip, padding).view(torch.int32)
    if bits == 4:
        words = words[:, 0::2] | words[:, 1::2] << 4
    return words.view(-1, ROWS, words.shape[1]).transpose(1, 2).contiguous()


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights laid out for NEON."""
    facts = SimpleNamespace(
        optim_rows=lambda: ROWS,
        optim_flip=lambda: FLIP,
        optim_half_scales=lambda: 1,
        optim_linear=None,
        optim_columns_run=None,
    )
    monkeypatch.setattr(w4a8, "load", lambda: facts)
    monkeypatch.setattr(w4a8, "_blocks", blocks)
    monkeypatch.setattr(skip_int4, "load", lambda: facts)
    monkeypatch.setattr(skip_dense, "load", lambda: SimpleNamespace(optim_sparse=None))


def close(got: Tensor, wanted: Tensor, bound: float = 1e-5) -> None:
    assert float((got - wanted).abs().max()) <= bound * max(float(wanted.abs().max()), 1.0)


def integers(outputs: int, inputs: int, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(outputs)
    q = torch.randint(0, 1 << scheme.bits, (outputs, inputs), generator=generator).to(torch.uint8)
    scale = torch.rand(outputs, scheme.groups(inputs), generator=generator) + 0.1
    zero = torch.randint(0, 1 << scheme.bits, scale.shape, generator=generator).to(torch.uint8)
    return q, scale.bfloat16(), None if scheme.symmetric else zero


def test_the_driver_knows_its_kernels(neon: Neon) -> None:
    assert (neon("optim_rows") & 0xFF, neon("optim_flip") & 0xFF) == (ROWS, FLIP)
    assert neon("optim_sizeof_Linear") == ctypes.sizeof(w4a8.CLinear)
    assert neon("optim_sizeof_Step") == ctypes.sizeof(cpu_step.CStep)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [16, 32, 64, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_linear(neon: Neon, arm: None, bits: int, group: int, symmetric: bool) -> None:
    scheme, tokens = Scheme(bits, group, symmetric), 13  # a tile, four, and one
    parts, bias = integers(21, 192, scheme), torch.randn(21)
    weight = w4a8.Weight(*parts, scheme, bias)
    x, y = torch.randn(tokens, 192), torch.empty(tokens, 21)
    assert neon("optim_linear", weight.layer, x, y, tokens, 1, None) & 0xFFFFFFFF == 0
    close(y, w4a8.reference(x, *parts, scheme) + bias)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_linear_with_float_offsets(neon: Neon, arm: None, bits: int) -> None:
    scheme = Scheme(bits, 32, False, offset=True)
    q, scale, _ = integers(21, 192, scheme)
    parts = q, scale.half(), torch.randn(scale.shape).half()
    weight = w4a8.Weight(*parts, scheme, None)
    x, y = torch.randn(5, 192), torch.empty(5, 21)
    assert neon("optim_linear", weight.layer, x, y, 5, 1, None) & 0xFFFFFFFF == 0
    close(y, w4a8.reference(x, *parts, scheme))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("lines", [1, 64])
def test_skipped_int4(neon: Neon, arm: None, symmetric: bool, lines: int) -> None:
    scheme = Scheme(4, 64, symmetric)
    parts = integers(211, 192, scheme)
    columns = skip_int4.packed(*parts, scheme, None, lines)
    x, y = torch.randn(1, 192), torch.empty(1, 211)
    neon("optim_columns_run", columns._columns, x, y, 1, 1, None, floats=(0.5, 0))
    close(y, w4a8.reference(torch.where(x.abs() > 0.5, x, 0), *parts, scheme))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skipped_dense(neon: Neon, arm: None, dtype: torch.dtype) -> None:
    up, down = torch.randn(71, 133).to(dtype), torch.randn(90, 71).to(dtype)
    x, y = torch.randn(133), torch.empty(71)
    neon("optim_sparse", skip_dense.linear(up, None)._sparse, x, y, 1, None, floats=(0.5, 0))
    close(y, up.double() @ torch.where(x.abs() > 0.5, x, 0).double())
    rows, columns = skip_dense.Rows(up, None), skip_dense.linear(down, None)
    gate, made = torch.relu(torch.randn(71)), torch.empty(90)
    neon("optim_gated", rows._sparse, columns._sparse, x, gate, made, 1, None)
    close(made, down.double() @ (gate.double() * (up.double() @ x.double())), 1e-4)


@pytest.mark.parametrize("tokens", [1, 3, 6])
def test_static_integers(neon: Neon, tokens: int) -> None:
    codes = torch.randint(-128, 128, (tokens, 130)).to(torch.int8)
    u = torch.randint(0, 16, (70, 130), dtype=torch.uint8)
    sums, out = codes.sum(1, dtype=torch.int32), torch.empty(tokens, 70)
    neon("optim_static", pack_nibbles(u), codes, sums, out, tokens, 70, 65, 1, None)
    assert torch.equal(out, accumulate(codes, u).float())


def test_bf16_and_its_twelve_bits_are_one_product(neon: Neon) -> None:
    weight, x = torch.randn(71, 133).to(torch.bfloat16), torch.randn(3, 133)
    weight[3, 5:25] = 2.0 ** -torch.arange(10, 50, 2)  # more exponents than have a name
    y, z = torch.empty(3, 71), torch.empty(3, 71)
    neon("optim_bf16", weight, x, y, 71, 133, 3, 1, None)
    close(y, bf16.reference(x, weight))
    planes = planes_of(weight)
    assert len(planes.at)
    neon("optim_bf12", planes.c, 1, x, z, 71, 3, 1, None)
    assert torch.equal(y, z)


def test_norm_and_gate(neon: Neon) -> None:
    x, weight, y = torch.randn(3, 71), torch.rand(71), torch.empty(3, 71)
    neon("optim_rms_norm", x, weight, y, 3, 71, floats=(1e-5, 0))
    close(y, F.rms_norm(x, (71,), weight, 1e-5))
    h, made = torch.randn(3, 2 * 71) * 20, torch.empty(3, 71)
    neon("optim_swiglu", h, made, 3, 71)
    close(made, F.silu(h[:, :71]) * h[:, 71:])


def layer_of(kind: int | torch.dtype) -> Layer:
    if isinstance(kind, int):
        return packed_layers(1, 1, 2, 48, torch.device("cpu"), kind)[0]
    return static_layers(1, 1, 2, 48, torch.device("cpu"), kind)[0]


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, 8, 4])
def test_attention_of_one_token(neon: Neon, kind: int | torch.dtype) -> None:
    layer, past = layer_of(kind), torch.randn(2, 1, 150, 2, 48)
    layer.grow(160)
    for start in (0, 140):  # the second piece makes the first old
        layer.write(past[0, :, start : start + 140], past[1, :, start : start + 140], start)
    step = cpu_step.CStep(batch=1, heads=6, kv_heads=2, dim=48, position=150, scale=0.3)
    step.half = cpu_step.is_half(layer)
    qkv, out = torch.randn(1, 10, 48), torch.empty(1, 6 * 48)
    q, k, v = qkv[0, :6].reshape(2, 3, 48).clone(), qkv[:, None, 6:8], qkv[:, None, 8:]
    k, v = k.clone(), v.clone()
    cpu_step.point(step, layer, 150, 2, 48)
    step.point("qkv", qkv, F32, qkv.numel())
    step.point("out", out, F32, out.numel())
    assert neon("optim_attend", step, 1, None) & 0xFFFFFFFF == 0
    layer.write(k, v, 150)
    wanted = layer.mix(torch.softmax(layer.scores(q, 0, 151, 0.3), -1), 0, 151).view(1, -1)
    close(out, wanted, 2e-2 if isinstance(kind, int) else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_of_a_prompt(neon: Neon, dtype: torch.dtype) -> None:
    ours, theirs = layer_of(dtype), layer_of(dtype)
    past = torch.randn(2, 1, 30, 2, 48)
    for layer in (ours, theirs):
        layer.grow(110)
        layer.write(past[0], past[1], 0)
    prompt = CPrompt(batch=1, tokens=75, heads=6, kv_heads=2, dim=48, start=30, scale=0.3)
    prompt.window = 50
    qkv, out = torch.randn(1, 75, 10, 48), torch.empty(1, 75, 6 * 48)
    theirs.write(qkv[:, :, 6:8], qkv[:, :, 8:], 30)
    wanted = attend(qkv[:, :, :6], theirs, 30, Rule(0.3, 50), None)
    cpu_step.point_dense(prompt, ours, 30, 2, 48, 75)
    prompt.point("qkv", qkv, F32, qkv.numel())
    prompt.point("out", out, F32, out.numel())
    assert neon("optim_attend_prompt", prompt, 1, None) & 0xFFFFFFFF == 0
    close(out, wanted, 1e-4)
