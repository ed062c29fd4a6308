"""Layout DFloat11 (formats/dfloat11.py): its units, decoded in parts as they are asked for.

`config.json` names the linears of each unit by a regular expression, as the published releases do;
shapes are not stored.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.recipes.patterns import bounded, expression
from optim.runtime.formats.dfloat11 import (
    BLOCK_BITS,
    BLOCK_BYTES,
    CHILD,
    GAP_BYTES,
    MOST_ROWS,
    PIECES,
    POINTER,
    SPLITS,
    SUFFIXES,
)
from optim.runtime.kernels.df11 import codec
from optim.runtime.kernels.door import Array
from optim.runtime.storage.lossless.dfloat11_encoder import VERSION, Counts, Encoder
from optim.runtime.storage.lossless.layout import BLOCK, Places, Read, ShapeOf, damaged
from optim.runtime.storage.tensors import TensorInfo

KEY = "dfloat11_config"
KNOWN = ("0.2.", "0.3.", "0.4.", "0.5.")  # versions whose units are stored alike
MOST_PATTERNS = 4096


class Dfloat11:
    """See layout.Layout. A unit is what DFloat11's releases make one: the linears of a block."""

    key, title, expected_bits = KEY, "DFloat11", 10.9
    prefix, pieces, joins = "", SUFFIXES, True

    def units(
        self, names: Mapping[str, TensorInfo], config: Mapping[str, Any], shapes: Mapping[str, Any]
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Every unit, and the tensors that a pattern of config.json names."""
        known = _patterns(config)
        for name in names:
            unit, _, suffix = name.rpartition(".")
            if suffix != PIECES[0]:
                continue
            parts = next(
                (parts for pattern, parts in known if pattern.fullmatch(bounded(unit))), None
            )
            if parts is None:
                raise damaged(unit, f"no pattern of {KEY} names it")
            if parts:
                yield unit, tuple(f"{unit}.{part}.weight" for part in parts)
            else:
                yield unit, (unit if unit in shapes else f"{unit}.weight",)

    def open(
        self,
        unit: str,
        tensors: Sequence[str],
        infos: Mapping[str, TensorInfo],
        read: Read,
        shape_of: ShapeOf,
    ) -> tuple["Unit", Places]:
        """The unit, split where its index says."""
        coded = Unit(unit, infos, read)
        sizes = [b - a for a, b in pairwise(coded.splits)]
        if len(sizes) != len(tensors):
            raise damaged(unit, f"{len(sizes)} tensors where config.json names {tensors}")
        shapes = map(shape_of, tensors, sizes)
        return coded, list(zip(coded.splits, shapes, strict=False))

    def config(self, units: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """As the published releases have it."""
        facts = {"version": VERSION, "threads_per_block": [512], "bytes_per_thread": 8}
        return facts | {"pattern_dict": patterns(units)}

    def tally(self) -> Counts:
        """Exponents are what is coded."""
        return Counts()

    def encoder(self, tallies: Sequence[Counts], shapes: Sequence[tuple[int, ...]]) -> Encoder:
        """The code of all the tensors' exponents together."""
        counts = np.stack([tally.exponents for tally in tallies])
        return Encoder(counts.sum(0), counts.sum(1).cumsum()[:-1].tolist())


class Unit:
    """One unit, decoded in parts as they are asked for; every fact is checked before it is used.

    Raises OptimError (2) with the tensor's name at once for sizes that cannot be true, from
    `decode` for a stream that is not what its index says.
    """

    def __init__(self, name: str, infos: Mapping[str, TensorInfo], read: Read) -> None:
        self.name, self._read = name, read
        for piece in PIECES:
            if piece not in infos or infos[piece].dtype != torch.uint8:
                raise _damaged(name, piece, "it is missing, or not uint8")
        self.size = math.prod(infos["sign_mantissa"].shape)
        self.bytes = math.prod(infos["encoded_exponent"].shape)
        shape = infos["luts"].shape
        if len(shape) != 2 or shape[1] != 256 or not 2 <= shape[0] <= MOST_ROWS + 2:
            raise _damaged(name, "luts", f"its shape is {list(shape)}")
        self.blocks = -(-self.bytes // BLOCK_BYTES)
        if math.prod(infos["gaps"].shape) < GAP_BYTES * self.blocks:
            raise _damaged(name, "gaps", "it is too short for the stream")
        self.elements = self._elements(math.prod(infos["output_positions"].shape))
        luts = read("luts", 0, math.prod(shape)).reshape(shape)
        self.walk = walk_of(luts, name)
        self.splits = self._splits(infos.get(SPLITS))

    def _elements(self, size: int) -> Array:
        """Where each block begins; a last block in which nothing begins may be left out."""
        if size not in (4 * (self.blocks + 1), 4 * self.blocks) or not self.blocks:
            raise _damaged(self.name, "output_positions", f"{size} bytes for {self.blocks} blocks")
        found = self._read("output_positions", 0, size).view("<u4").astype(np.int64)
        steps = np.diff(found)
        if found[0] or found[-1] != self.size or (steps < 0).any() or (steps > BLOCK_BITS).any():
            raise _damaged(self.name, "output_positions", "they do not lead from 0 to the last")
        return found

    def _splits(self, info: TensorInfo | None) -> list[int]:
        """Where each tensor begins, then where the last ends."""
        if info is None or not info.nbytes:
            return [0, self.size]
        if info.dtype != torch.int64 or len(info.shape) != 1:
            raise _damaged(self.name, SPLITS, "it is not a list of int64")
        inner = self._read(SPLITS, 0, info.nbytes).view("<i8").tolist()
        found = [0, *inner, self.size]
        if any(a >= b for a, b in pairwise(found)):
            raise _damaged(self.name, SPLITS, "they do not rise")
        return found

    def decode(self, first: int, count: int) -> Tensor:
        """`count` weights from element `first` on: bf16 `[count]`."""
        if count == 0:
            return torch.empty(0, dtype=torch.bfloat16)
        begin = int(np.searchsorted(self.elements, first, "right")) - 1
        end = int(np.searchsorted(self.elements, first + count, "left"))
        elements = self.elements[begin : end + 1]
        stop = min(self.bytes, (end + 1) * BLOCK_BYTES)
        stream = self._read("encoded_exponent", begin * BLOCK_BYTES, stop)
        rest = self._read("sign_mantissa", int(elements[0]), int(elements[-1]))
        bounds = self._bounds(begin, end)
        weights, bad = codec().decode(stream, bounds, elements - elements[0], rest, self.walk)
        if bad >= 0:
            raise _damaged(self.name, "encoded_exponent", f"block {begin + bad} does not decode")
        inside = weights[first - elements[0] :][:count]
        return torch.from_numpy(inside.view(np.int16)).view(torch.bfloat16)

    def _bounds(self, begin: int, end: int) -> tuple[Array, Array, Array]:
        """Of the blocks begin..end, from the first of them: see cpu_df11.decode."""
        until = min(end + 1, self.blocks)
        gaps = self._read("gaps", begin * GAP_BYTES, until * GAP_BYTES)[::GAP_BYTES] >> 3
        edges = np.arange(until - begin, dtype=np.int64) * BLOCK_BITS + gaps
        start, low = edges[: end - begin], edges[1:][: end - begin]
        high = low
        if low.size < start.size:  # the stream's last bits fill a byte
            last = 8 * (self.bytes - begin * BLOCK_BYTES)
            low, high = np.append(low, last - 7), np.append(high, last)
        return (
            np.ascontiguousarray(start),
            np.ascontiguousarray(low),
            np.ascontiguousarray(high),
        )


def walk_of(luts: Array, name: str) -> Array:
    """The tables uint8 `[rows + 1, 256]` as nodes uint16 `[nodes, 256]`, node 0 the root.

    An entry is `length << 8 | exponent`, or CHILD | node, or 0 where no code leads. Slots that no
    code uses may hold anything: writers leave them as they are. Raises OptimError (2) for a row
    that is not there.
    """
    rows, lengths = luts[:-1], luts[-1].astype(np.int64)
    nodes, known, made = [(0, 0)], {(0, 0): 0}, []
    for row, depth in nodes:
        entry = np.zeros(256, np.uint16)
        for value in np.unique(rows[row]).tolist():
            slots = rows[row] == value
            if value < POINTER:
                _codes(entry, slots, value, int(lengths[value]), depth)
                continue
            child = (256 - value, depth + 1)
            if child[0] >= len(rows):
                raise _damaged(name, "luts", f"row {row} leads to row {child[0]} of {len(rows)}")
            if child[0] > row and depth < 3:
                if child not in known:
                    known[child] = len(nodes)
                    nodes.append(child)
                entry[slots] = CHILD | known[child]
        made.append(entry)
    return np.stack(made)


def _codes(entry: Array, slots: Array, value: int, length: int, depth: int) -> None:
    """Enter an exponent where its whole code leads to it: 2^(bits left) slots, aligned."""
    bits = length - 8 * depth
    if 1 <= bits <= 8:
        whole = slots.reshape(-1, 1 << 8 - bits).all(1)
        entry[np.repeat(whole, 1 << 8 - bits)] = length << 8 | value


def _damaged(unit: str, piece: str, why: str) -> OptimError:
    return damaged(f"{unit}.{piece}", why)


def _patterns(config: Mapping[str, Any]) -> list[tuple[re.Pattern[str], list[str]]]:
    """The patterns of a configuration that may come from a stranger: only harmless ones pass."""
    facts = config.get(KEY)
    if not isinstance(facts, dict):
        return []
    found = facts.get("pattern_dict")
    version = str(facts.get("version", ""))
    if not version.startswith(KNOWN):
        fix = "pack the original model with `optim pack`"
        raise OptimError(f"{KEY}: version {version!r} is not known", fix, USAGE)
    if not isinstance(found, dict) or len(found) > MOST_PATTERNS:
        raise OptimError(f"{KEY}: pattern_dict is not a usable mapping", None, USAGE)
    made = []
    for text, parts in found.items():
        try:
            pattern = expression(text)
        except ValueError as error:
            raise OptimError(f"{KEY}: {error}", None, USAGE) from None
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise OptimError(f"{KEY}: {text!r} must name a list of modules", None, USAGE)
        made.append((pattern, parts))
    return made


def patterns(units: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Regular expression of unit names -> the modules in it, in order; none if it is one itself.

    Blocks that hold the same share one expression, as in the published releases; where some block
    of a stack differs, each of them has its own.
    """
    inside = {unit: _inside(unit, names) for unit, names in units.items()}
    kinds: dict[str, set[tuple[str, ...]]] = {}
    for unit, parts in inside.items():
        kinds.setdefault(_numbered(unit), set()).add(parts)
    return {
        _numbered(unit) if len(kinds[_numbered(unit)]) == 1 else re.escape(unit): list(parts)
        for unit, parts in inside.items()
    }


def _inside(unit: str, names: Sequence[str]) -> tuple[str, ...]:
    if list(names) in ([unit], [f"{unit}.weight"]):
        return ()
    return tuple(name.removeprefix(f"{unit}.").removesuffix(".weight") for name in names)


def _numbered(unit: str) -> str:
    """The expression for a block and its like; of anything else its own name."""
    if not BLOCK.fullmatch(f"{unit}.weight") or not unit.rpartition(".")[2].isdigit():
        return re.escape(unit)
    return re.escape(unit.rpartition(".")[0]) + r"\.\d+"
