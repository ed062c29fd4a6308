"""GGUF's blocks of quantized weights: codes and scales <-> bytes.

A block holds 32 or 256 weights; a group of 16 or 32 of them shares a scale and, in some types, adds
an offset. Blocks of 32 have these in fp16. In blocks of 256 (the K types) a group's scale is a
small integer `s` times the block's fp16 `d`, its offset an integer `k` times -`dmin`:

    q4_0 q5_0 q8_0 iq4_nl    w = value(q) d                 q4_1 q5_1         w = q d + m
    q3_k q6_k                w = value(q) (d s)             q2_k q4_k q5_k    w = q (d s) - dmin k

value(q) is q less the middle code, or of iq4_nl a codebook. A table says in which order the fields
of a block stand, and how the bits of its codes are spread. Layouts: ggml's ggml-common.h.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class Plane:
    """`bits` of each code from bit `shift` up. A byte holds 8 / bits codes, `run` apart."""

    shift: int
    bits: int
    run: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """A type of blocks; `fields` in the order in which a block has them.

    "d", "m" (fp16), "steps" (the small integers of a K type), and planes of the codes.
    """

    name: str
    bits: int
    fields: tuple[str | Plane, ...]
    size: int = 32
    """Weights of a block."""
    group: int = 32
    """Weights that share a scale."""
    steps: str = ""
    """How the integers of a K type are stored: see `_STEPS`."""
    most: int = 0
    """The largest of them."""
    least: int = 0

    @property
    def offset(self) -> bool:
        """Whether groups add an offset."""
        return "m" in self.fields

    @property
    def nested(self) -> bool:
        """Whether scales are integers times a block's own: a K type."""
        return bool(self.steps)

    @property
    def nbytes(self) -> int:
        """Of a block."""
        return sum(self._width(field) for field in self.fields)

    def _width(self, field: str | Plane) -> int:
        if isinstance(field, Plane):
            return self.size * field.bits // 8
        return 2 if field in ("d", "m") else _STEPS[self.steps][0]

    @property
    def codebook(self) -> Tensor | None:
        """What each code stands for in steps of its scale, float32; None: itself less `middle`."""
        return torch.tensor(CODEBOOK, dtype=torch.float32) if self.name == "iq4_nl" else None

    @property
    def middle(self) -> int:
        """The code of 0 in groups without an offset."""
        return 0 if self.offset or self.name == "iq4_nl" else 1 << (self.bits - 1)

    @property
    def ends(self) -> tuple[float, float]:
        """What the first and the last code stand for."""
        found = self.codebook
        if found is not None:
            return float(found[0]), float(found[-1])
        return float(-self.middle), float((1 << self.bits) - 1 - self.middle)


NIBBLES, K_NIBBLES, Q6_LOW = Plane(0, 4, 16), Plane(0, 4, 32), Plane(0, 4, 64)
BLOCKS = {
    kind.name: kind
    for kind in (
        Blocks("q4_0", 4, ("d", NIBBLES)),
        Blocks("q4_1", 4, ("d", "m", NIBBLES)),
        Blocks("q5_0", 5, ("d", Plane(4, 1, 1), NIBBLES)),
        Blocks("q5_1", 5, ("d", "m", Plane(4, 1, 1), NIBBLES)),
        Blocks("q8_0", 8, ("d", Plane(0, 8, 1))),
        Blocks("iq4_nl", 4, ("d", NIBBLES)),
        Blocks("q2_k", 2, ("steps", Plane(0, 2, 32), "d", "m"), 256, 16, "4+4", 15),
        Blocks("q3_k", 3, (Plane(2, 1, 32), Plane(0, 2, 32), "steps", "d"), 256, 16, "6", 31, -32),
        Blocks("q4_k", 4, ("d", "m", "steps", K_NIBBLES), 256, 32, "6+6", 63),
        Blocks("q5_k", 5, ("d", "m", "steps", Plane(4, 1, 32), K_NIBBLES), 256, 32, "6+6", 63),
        Blocks("q6_k", 6, (Q6_LOW, Plane(4, 2, 32), "steps", "d"), 256, 16, "8", 127, -128),
    )
}
# Of inputs that 256 does not divide, as in llama-quantize.
INSTEAD = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


@dataclass(frozen=True, slots=True)
class Opened:
    """Rows of weights out of their blocks."""

    codes: Array
    """uint8 `[rows, in]`."""
    d: Array
    """fp16 `[rows, blocks]`."""
    m: Array | None
    """fp16 `[rows, blocks]`: m, or dmin."""
    s: Array | None
    """int16 `[rows, groups]` of a K type."""
    k: Array | None

    @property
    def scale(self) -> Tensor:
        """`[rows, groups]`: fp16, or of a K type float32, which holds d s exactly."""
        return _times(self.d, self.s)

    @property
    def offset(self) -> Tensor | None:
        """What groups add, like `scale`."""
        if self.m is None:
            return None
        return _times(self.m, self.k) if self.k is None else -_times(self.m, self.k)


def open_blocks(raw: Array, kind: Blocks, codes: bool = True) -> Opened:
    """uint8 `[rows, bytes of a row]` -> what it holds; without `codes` these are zeros."""
    rows = len(raw)
    blocks = np.ascontiguousarray(raw).reshape(rows, -1, kind.nbytes)
    each = np.zeros((rows, blocks.shape[1], kind.size), np.uint8)
    found: dict[str, Array] = {}
    at = 0
    for field in kind.fields:
        part = blocks[:, :, at : at + kind._width(field)]
        at += kind._width(field)
        if not isinstance(field, Plane):
            found[field] = np.ascontiguousarray(part)
        elif codes:
            each |= _spread(part, field)
    if kind.bits == 8:
        each ^= np.uint8(0x80)
    heads = {key: found[key].view(np.float16)[..., 0] for key in ("d", "m") if key in found}
    s, k = _STEPS[kind.steps][1](found["steps"]) if kind.nested else (None, None)
    flat = (None if x is None else x.reshape(rows, -1).astype(np.int16) for x in (s, k))
    return Opened(each.reshape(rows, -1), heads["d"], heads.get("m"), *flat)


def nibble_words(raw: Array, kind: Blocks) -> Tensor | None:
    """The codes of `open_blocks` as bits.pack_rows packs them, int32 `[rows, in / 8]`, not spread
    into bytes on the way; None of types that have more than one plane of 4 bits."""
    planes = [field for field in kind.fields if isinstance(field, Plane)]
    if kind.bits != 4 or len(planes) != 1:
        return None
    at = sum(kind._width(field) for field in kind.fields[: kind.fields.index(planes[0])])
    stored = raw.reshape(len(raw), -1, kind.nbytes)[:, :, at : at + kind.size // 2]
    bytes_ = torch.from_numpy(stored.copy()).view(-1, planes[0].run)
    made = torch.empty(len(bytes_), 2, planes[0].run // 2, dtype=torch.uint8)
    for half, nibbles in enumerate((bytes_ & 0x0F, bytes_ >> 4)):
        pairs = nibbles.view(torch.int16)
        made[:, half] = pairs | pairs >> 4
    return made.view(len(raw), -1).view(torch.int32)


def close_blocks(held: Opened, kind: Blocks) -> Array:
    """The inverse of `open_blocks`."""
    rows = len(held.codes)
    codes = held.codes.reshape(rows, -1, kind.size)
    codes = codes ^ np.uint8(0x80) if kind.bits == 8 else codes
    heads = {"d": held.d, "m": held.m}
    found = {k: x[..., None].view(np.uint8) for k, x in heads.items() if x is not None}
    if held.s is not None:
        s, k = (None if x is None else x.reshape(*held.d.shape, -1) for x in (held.s, held.k))
        found["steps"] = _STEPS[kind.steps][2](s, k)
    parts = [_gather(codes, f) if isinstance(f, Plane) else found[f] for f in kind.fields]
    return np.concatenate(parts, -1).reshape(rows, -1)


def _times(head: Array, steps: Array | None) -> Tensor:
    if steps is None:
        return torch.from_numpy(head.copy())
    each = np.repeat(head.astype(np.float32), steps.shape[1] // head.shape[1], axis=1)
    return torch.from_numpy(each * steps)


def _spread(part: Array, plane: Plane) -> Array:
    """Bytes of a plane `[.., n]` -> its bits of each code, in their place."""
    shifts = np.arange(0, 8, plane.bits, dtype=np.uint8)[:, None]
    each = part.reshape(*part.shape[:2], -1, 1, plane.run) >> shifts
    each = (each & np.uint8((1 << plane.bits) - 1)) << np.uint8(plane.shift)
    return each.reshape(*part.shape[:2], -1)


def _gather(codes: Array, plane: Plane) -> Array:
    shifts = np.arange(0, 8, plane.bits, dtype=np.uint8)[:, None]
    each = (codes >> np.uint8(plane.shift)) & np.uint8((1 << plane.bits) - 1)
    each = each.reshape(*codes.shape[:2], -1, 8 // plane.bits, plane.run) << shifts
    joined: Array = np.bitwise_or.reduce(each, axis=-2)
    return joined.reshape(*codes.shape[:2], -1)


def _open_6_6(b: Array) -> tuple[Array, Array]:
    """Eight s and eight k of 6 bits: low ones whole, the upper two bits of high ones above them."""
    low, last = b[..., :8] & 63, b[..., 8:]
    top = b[..., :8] >> 6 << 4
    s = np.concatenate((low[..., :4], (last & 15) | top[..., :4]), -1)
    return s, np.concatenate((low[..., 4:], (last >> 4) | top[..., 4:]), -1)


def _close_6_6(s: Array, k: Array) -> Array:
    s, k = s.astype(np.uint8), k.astype(np.uint8)
    first = s[..., :4] | s[..., 4:] >> 4 << 6, k[..., :4] | k[..., 4:] >> 4 << 6
    return np.concatenate((*first, (s[..., 4:] & 15) | k[..., 4:] << 4), -1)


def _open_6(b: Array) -> tuple[Array, None]:
    """Sixteen s of 6 bits, 32 more than they are: low nibbles, then the upper two bits."""
    low = np.concatenate((b[..., :8] & 15, b[..., :8] >> 4), -1)
    top = np.concatenate([b[..., 8:] >> (2 * i) & 3 for i in range(4)], -1)
    return (low | top << 4).astype(np.int16) - 32, None


def _close_6(s: Array, _k: None) -> Array:
    s = (s + 32).astype(np.uint8)
    top = [(s[..., 4 * i : 4 * i + 4] >> 4) << (2 * i) for i in range(4)]
    return np.concatenate((s[..., :8] & 15 | (s[..., 8:] & 15) << 4, np.bitwise_or.reduce(top)), -1)


_STEPS: dict[str, tuple[int, Any, Any]] = {
    # bytes of a block, bytes -> (s, k), (s, k) -> bytes
    "6+6": (12, _open_6_6, _close_6_6),
    "6": (12, _open_6, _close_6),
    "8": (16, lambda b: (b.view(np.int8), None), lambda s, _k: s.astype(np.int8).view(np.uint8)),
    "4+4": (
        16,
        lambda b: (b & 15, b >> 4),
        lambda s, k: s.astype(np.uint8) | k.astype(np.uint8) << 4,
    ),
}
