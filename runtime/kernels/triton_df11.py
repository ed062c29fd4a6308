"""DFloat11's exponent stream decoded on a GPU: a lane takes 64 weights, and knows where they begin.

The format's own index counts bits, so its decoder must first find out how many weights a lane has.
Here an index by weights is made once, at load, in place of gaps and positions: every code is
decoded once, and where a weight goes is known before. Tables are dfloat11.walk_of's.

The runtime decodes on the CPU at load; this kernel is for cards that do it better. Its speed is not
measured yet.
"""

from functools import cache

import numpy as np
import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from optim.runtime.formats.dfloat11 import Unit
from optim.runtime.kernels.cpu_df11 import Array
from optim.runtime.kernels.native import NoKernel

EACH = 64  # weights a lane decodes
GROUP = 32  # lanes that share a base: their offsets from it fit 16 bits
CHILD = tl.constexpr(0x8000)
LANES = 128


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    words, base, offset, walk, rest, out, n,
    EACH: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out int16 [n]: bf16 patterns. words: the stream as int32, highest bit first."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = lane * EACH < n
    at = tl.load(base + lane // GROUP, live, other=0)
    at += tl.load(offset + lane, live, other=0).to(tl.int64) & 0xFFFF
    for i in range(EACH):
        element = lane * EACH + i
        ok = element < n
        high = tl.load(words + (at >> 5), ok, other=0).to(tl.int64) & 0xFFFFFFFF
        low = tl.load(words + (at >> 5) + 1, ok, other=0).to(tl.int64) & 0xFFFFFFFF
        bits = (high << 32 | low) >> (32 - (at & 31))
        entry = tl.load(walk + (bits >> 24 & 0xFF), ok, other=0).to(tl.int32)
        for depth in tl.static_range(1, 4):
            deeper = ok & ((entry & CHILD) != 0)
            byte = bits >> (24 - 8 * depth) & 0xFF
            found = tl.load(walk + (entry & 0x7FFF) * 256 + byte, deeper, other=0).to(tl.int32)
            entry = tl.where(deeper, found, entry)
        r = tl.load(rest + element, ok, other=0).to(tl.int32)
        w = (r & 0x80) << 8 | (entry & 0xFF) << 7 | r & 0x7F
        tl.store(out + element, w.to(tl.int16), ok)
        at += entry >> 8


def index_of(unit: Unit) -> tuple[Array, Array]:
    """Where each EACH weights begin in the stream: int64 base of a GROUP, int16 bits from it.

    Decodes the unit on the CPU once; every code is valid after that.
    """
    exponents = unit.decode(0, unit.size).view(torch.int16).numpy().view(np.uint16) >> 7 & 0xFF
    lengths = unit.lengths[exponents]
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])[::EACH]
    base = begins[::GROUP].astype(np.int64)
    offset = begins - np.repeat(base, GROUP)[: len(begins)]
    return base, offset.astype(np.uint16).view(np.int16)


class Decoder:
    """A unit on a GPU: call it for all of its weights, bf16 `[n]`."""

    def __init__(self, unit: Unit, device: torch.device) -> None:
        stream = np.zeros(-(-unit.bytes // 4) * 4 + 8, np.uint8)
        stream[: unit.bytes] = unit.bytes_of("encoded_exponent", 0, unit.bytes)
        rest = unit.bytes_of("sign_mantissa", 0, unit.size)
        base, offset = index_of(unit)
        held = (stream.view(">i4").astype(np.int32), base, offset, unit.walk.view(np.int16), rest)
        self.size = unit.size
        self._held = [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in held]

    def __call__(self) -> Tensor:
        words, base, offset, walk, rest = self._held
        out = torch.empty(self.size, dtype=torch.int16, device=words.device)
        grid = (triton.cdiv(self.size, EACH * LANES),)
        sizes = {"EACH": EACH, "GROUP": GROUP, "LANES": LANES}
        _decode[grid](words, base, offset, walk, rest, out, self.size, **sizes)
        return out.view(torch.bfloat16)


@cache
def check() -> str:
    """Needs a GPU. Raises NoKernel."""
    if not torch.cuda.is_available():
        raise NoKernel("no GPU")
    return torch.cuda.get_device_name()
