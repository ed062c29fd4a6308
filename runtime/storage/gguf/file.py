"""The GGUF container: metadata and tensor table, and tensors de-quantized on demand.

Layout (spec: ggml-org/ggml docs/gguf.md): magic, version, counts, key/value pairs, tensor table,
then aligned data. Read here and not with `gguf.GGUFReader`, which maps the file and makes an array
per token string (3 s for a 49k vocabulary). The quantized types are left to the `gguf` package.

A head may claim anything, so what is kept of it is bounded: long arrays (vocabulary, merges) are
stepped over, not kept, and no count is believed before the bytes for it were seen.
"""

import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.kernels.door import Array
from optim.runtime.system.files import AGAIN, damaged

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
FLOAT32, STRING, ARRAY = 6, 8, 9
LENGTH = struct.Struct("<Q")
BLOCK = 1 << 24  # elements de-quantized at once: bounds the float32 copy of a large embedding
SHORT = 4096  # entries of an array that is kept: a value for each layer, a few names
LONGEST = 1 << 22  # entries of any array: sixteen times the largest vocabulary of today
TEXT = 1 << 24  # bytes of a string
HEAD = 1 << 26  # what the whole head may cost, in bytes


@dataclass(frozen=True, slots=True)
class LongArray:
    """An array that was stepped over."""

    count: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor is and how it is stored; `shape` is torch's order, [out, in]."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    begin: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (of the last dimension)."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size

    @property
    def rows(self) -> int:
        """Rows of all leading dimensions together."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.rows * self.row_bytes


class _Reader:
    """A bounds-checked cursor over the head of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.left = file, size, HEAD

    def spend(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise ValueError(f"its head is larger than {HEAD >> 20} MB")

    def _fits(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError("a length reaches beyond the end of the file")

    def take(self, count: int) -> bytes:
        self._fits(count)
        return self.file.read(count)

    def step_over(self, count: int) -> None:
        self._fits(count)
        self.file.seek(count, 1)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        length = self.number("Q")
        if length > TEXT:
            raise ValueError(f"it has a string of {length} bytes")
        self.spend(length + 64)
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            self.spend(64)
            number = self.number(SCALARS[kind])
            return float(str(np.float32(number))) if kind == FLOAT32 else number  # 1e-05, as typed
        if kind != ARRAY:
            raise ValueError(f"unknown metadata type {kind}")
        return self._array(self.number("I"), self.number("Q"))

    def _array(self, inner: int, count: int) -> list[Any] | LongArray:
        if inner not in SCALARS and inner != STRING:
            raise ValueError(f"an array of metadata type {inner}")
        if count > LONGEST:
            raise ValueError(f"an array of {count} entries")
        self.spend(16 * count)
        if count <= SHORT:
            return [self.value(inner) for _ in range(count)]
        if inner in SCALARS:
            self.step_over(count * struct.calcsize("<" + SCALARS[inner]))
        else:
            self._step_over_strings(count)
        return LongArray(count)

    def _step_over_strings(self, count: int) -> None:
        """Only their lengths are looked at, a buffer at a time: a vocabulary has 10^5 of them."""
        at, base, last = 0, self.file.tell(), -1
        length_at = LENGTH.unpack_from
        for _ in range(count):
            if at > last:
                base += at
                self.file.seek(min(base, self.size))
                data, at = self.file.read(1 << 16), 0
                last = len(data) - 8
                if last < 0:
                    raise ValueError("a length reaches beyond the end of the file")
            at += 8 + length_at(data, at)[0]
        self.file.seek(0)
        self._fits(base + at)
        self.file.seek(base + at)

    def tensor(self) -> tuple[str, GgufTensor]:
        name = self.text()
        self.spend(256)
        dims = [self.number("Q") for _ in range(min(self.number("I"), 9))]
        kind = gguf.GGMLQuantizationType(self.number("I"))
        if not 0 < len(dims) < 5 or 0 in dims or dims[0] % gguf.GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"{name} has dimensions {dims}")
        return name, GgufTensor(tuple(reversed(dims)), kind, self.number("Q"))


def _parse(file: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, GgufTensor], int]:
    reader = _Reader(file, size)
    if reader.take(4) != b"GGUF" or reader.number("I") not in (2, 3):
        raise ValueError("it is not GGUF version 2 or 3, little-endian")
    tensors, pairs = reader.number("Q"), reader.number("Q")
    if tensors + pairs > size:
        raise ValueError("it counts more entries than it has bytes")
    metadata = [(reader.text(), reader.value(reader.number("I"))) for _ in range(pairs)]
    table = [reader.tensor() for _ in range(tensors)]
    for kind, found in (("key", metadata), ("tensor", table)):
        if twice := [name for name, times in Counter(n for n, _ in found).items() if times > 1]:
            raise ValueError(f"the {kind} {twice[0]} is given twice")
    alignment = dict(metadata).get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r}")
    _check_places(table, alignment)
    return dict(metadata), dict(table), -(-file.tell() // alignment) * alignment


def _check_places(table: list[tuple[str, GgufTensor]], alignment: int) -> None:
    """Tensors follow each other without gaps, as the format wants it: none lies over another."""
    place = 0
    for name, tensor in table:
        if tensor.begin != place:
            raise ValueError(f"{name} begins at {tensor.begin}, where {place} is its place")
        place += -(-tensor.nbytes // alignment) * alignment


def _check_kinds(path: Path, table: dict[str, GgufTensor]) -> None:
    for kind in sorted({tensor.kind for tensor in table.values()}):
        try:
            empty = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
            gguf.quants.dequantize(empty, kind)
        except NotImplementedError:
            fix = "use a GGUF file of another type, or a newer gguf package"
            raise OptimError(f"{path} has {kind.name} tensors, unknown here", fix, USAGE) from None


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor], int]:
    """Metadata, tensor table and the offset of the data.

    Raises OptimError (2) for a damaged or truncated file and for types that cannot be de-quantized.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            metadata, table, data = _parse(file, size)
    except OSError as error:
        raise OptimError(f"cannot read {path}: {error.strerror}", code=USAGE) from None
    except (ValueError, struct.error, MemoryError, OverflowError) as error:
        damaged(path, str(error))
    if metadata.get("split.count", 1) not in (0, 1):
        fix = "join its parts with `llama-gguf-split --merge`"
        raise OptimError(f"{path} is one part of a split GGUF file", fix, USAGE)
    for name, tensor in table.items():
        if data + tensor.begin + tensor.nbytes > size:
            damaged(path, f"{name} reaches beyond the end of the file: it is truncated")
    _check_kinds(path, table)
    return metadata, table, data


def read_rows(
    path: Path,
    data: int,
    tensor: GgufTensor,
    first: int,
    count: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`count` rows from row `first`, de-quantized: [count, in] in `dtype`.

    Raises OptimError (2) if the file got shorter meanwhile.
    """
    out = torch.empty(count, tensor.shape[-1], dtype=dtype)
    step = max(1, BLOCK // tensor.shape[-1])
    with path.open("rb") as file:
        for start in range(0, count, step):
            rows = min(step, count - start)
            file.seek(data + tensor.begin + (first + start) * tensor.row_bytes)
            raw = np.frombuffer(file.read(rows * tensor.row_bytes), dtype=np.uint8)
            if raw.size != rows * tensor.row_bytes:
                raise OptimError(f"{path} was cut off while it was read", AGAIN, USAGE)
            values = gguf.quants.dequantize(raw.reshape(rows, -1), tensor.kind)
            out[start : start + rows] = torch.from_numpy(
                np.array(values)
            )  # a copy: F32 is a read-only view
    return out


def read_bytes(path: Path, data: int, tensor: GgufTensor) -> Array:
    """A tensor as it is stored, uint8 `[rows, bytes of a row]`. OptimError (2) as `read_rows`."""
    with path.open("rb") as file:
        file.seek(data + tensor.begin)
        raw = np.frombuffer(file.read(tensor.nbytes), dtype=np.uint8)
    if raw.size != tensor.nbytes:
        raise OptimError(f"{path} was cut off while it was read", AGAIN, USAGE)
    return raw.reshape(tensor.rows, tensor.row_bytes)
