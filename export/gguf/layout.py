"""The tensors of a GGUF file: from which weights each is made, in which blocks, what changes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from optim.export.exporter import Held, Moved, refuse
from optim.export.floats import described, float_change
from optim.export.gguf.blocks import (
    BLOCK,
    KINDS,
    carried,
    carrier,
    moved,
    rounded,
    row_bytes,
)
from optim.export.gguf.families import PLAIN_MODEL, Row, gguf_name
from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.shape import Shape
from optim.runtime.formats.blocks import INSTEAD
from optim.runtime.formats.schemes import Scheme
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.gguf.store import INTERLEAVED, NORM_PLUS_ONE, TURNED

EMBED, HEAD, ROUTER = "model.embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"
HALF = torch.finfo(torch.float16).max
FLOAT_KINDS = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
STORED = {dtype: kind for kind, dtype in FLOAT_KINDS.items()}
FINE = (*FLOAT_KINDS, Kind.Q8_0, Kind.Q6_K)  # others are too coarse for embeddings and the head
ANEW = "rounded anew"


@dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor of the file; `parts` are the canonical weights in it, a stack's one by one."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Kind
    changes: tuple[str, ...] = ()
    """How each part changes, where its integers are not carried; empty for one that does not."""
    moved: tuple[Moved, ...] = ()
    """How far each part moves, where its integers are carried."""
    turned: int = 0
    """Heads whose rows go from halves to pairs."""
    plus_one: bool = False

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], row_bytes(self.kind, self.shape[-1]))

    @property
    def nbytes(self) -> int:
        return math.prod(self.byte_shape)


def tensors(model: PlainView, shape: Shape, row: Row, wanted: str | None) -> list[FileTensor]:
    """What the file holds, in order; only headers and grids are read.

    Raises OptimError (2) for a tensor that has no name in the format.
    """
    stacks: dict[str, list[str]] = {}
    for name in model.tensors:
        if name == HEAD and shape.tied:
            continue
        theirs = gguf_name(name, row.arch)
        if theirs is None:
            raise refuse(model, f"{name} has no place in {row.arch} files", PLAIN_MODEL)
        stacks.setdefault(theirs, []).append(name)
    if row.own_head and shape.tied:
        stacks["output.weight"] = [EMBED]
    heads = dict(zip(TURNED, (shape.heads, shape.kv_heads), strict=True))
    return [
        _tensor(model, name, sorted(parts, key=_expert), row, wanted, heads)
        for name, parts in stacks.items()
    ]


def held(model: PlainView, tensor: FileTensor) -> Iterator[Held]:
    """What becomes of each part."""
    for at, part in enumerate(tensor.parts):
        info = model.info(part)
        source = described(model, part)
        nbytes = tensor.nbytes // len(tensor.parts)
        change = tensor.changes[at] if tensor.changes else ""
        moved = tensor.moved[at] if tensor.moved else None
        yield Held(part, info.shape, source, tensor.kind.name, nbytes, change, moved)


def content(model: PlainView, tensor: FileTensor) -> np.ndarray:
    """The tensor's bytes, uint8 of `byte_shape`."""
    made = [_part(model, tensor, part) for part in tensor.parts]
    whole = made[0] if len(made) == 1 else np.concatenate(made)
    return np.ascontiguousarray(whole).reshape(tensor.byte_shape)


def turn(w: Tensor, heads: int) -> Tensor:
    """Rows `[heads * dim, ...]` from Hugging Face's rotary order (halves) to pairs."""
    dim = w.shape[0] // heads
    return w.view(heads, 2, dim // 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def _part(model: PlainView, tensor: FileTensor, name: str) -> np.ndarray:
    if tensor.moved and model.blocks(name):
        raw = model.raw(name)
        return turn(torch.tensor(raw), tensor.turned).numpy() if tensor.turned else raw
    if tensor.moved:
        q, scale, zero, scheme = model.integers(name)
        if tensor.turned:
            q, scale = turn(q, tensor.turned), turn(scale, tensor.turned)
            zero = None if zero is None else turn(zero, tensor.turned)
        return carried(q, scale, zero, scheme)
    w = model.read(name)
    w = turn(w, tensor.turned) if tensor.turned else w
    w = w.float() + 1 if tensor.plus_one else w
    if tensor.kind not in (Kind.F32, Kind.BF16) and (most := w.abs().max()) > HALF:
        what = (
            f"{name} has a weight of {float(most):.3g}, and {tensor.kind.name} holds 16-bit floats"
        )
        raise OptimError(what, "optim export --type bf16", USAGE)
    return rounded(w.view(-1, w.shape[-1]), tensor.kind)


def _expert(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[-1] if numbers else 0


def _tensor(
    model: PlainView,
    name: str,
    parts: list[str],
    row: Row,
    wanted: str | None,
    heads: dict[str, int],
) -> FileTensor:
    first = model.info(parts[0])
    stack = "_exps." in name
    shape = (len(parts), *first.shape) if stack else first.shape
    turned = next((n for key, n in heads.items() if key in parts[0]), 0)
    turned = turned if row.arch in INTERLEAVED else 0
    schemes = [model.scheme(part) for part in parts]
    kinds = {_carrier(model, part, first.shape[-1]) for part in parts}
    found = [] if None in kinds or len(kinds) > 1 else [_moved(model, part) for part in parts]
    moves = tuple(move for move in found if move is not None)
    if len(moves) == len(parts):
        kind = next(kind for kind in kinds if kind is not None)
        return FileTensor(name, tuple(parts), shape, kind, moved=moves, turned=turned)
    kind = _kind(parts[0], first.shape, first.dtype, schemes[0], wanted)
    changes = tuple(_change(model, part, kind) for part in parts)
    plus_one = row.arch in NORM_PLUS_ONE and parts[0].endswith("norm.weight")
    return FileTensor(name, tuple(parts), shape, kind, changes, (), turned, plus_one)


def _carrier(model: PlainView, name: str, inputs: int) -> Kind | None:
    """The blocks that hold a weight's integers: its own, or such as fit."""
    own = model.blocks(name)
    return Kind[own.name.upper()] if own else carrier(model.scheme(name), inputs)


def _moved(model: PlainView, name: str) -> Moved | None:
    if model.blocks(name):
        return Moved(0, 0)
    scheme = model.scheme(name)
    assert scheme is not None
    return moved(*model.grid(name), scheme)


def _kind(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    scheme: Scheme | None,
    wanted: str | None,
) -> Kind:
    """What a weight that is not carried becomes."""
    if len(shape) == 1 or name.endswith(ROUTER):
        return Kind.F32  # the runtimes take norms, biases and routers as nothing else
    if wanted is None:
        return Kind.F16 if scheme is not None else STORED.get(dtype, Kind.F32)
    kind = KINDS[wanted]
    if kind not in FINE and name in (EMBED, HEAD):
        kind = Kind.Q8_0
    if wanted in INSTEAD and shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = KINDS[INSTEAD[wanted]]
    return kind if kind in FLOAT_KINDS or shape[-1] % BLOCK == 0 else Kind.F16


def _change(model: PlainView, name: str, kind: Kind) -> str:
    info, scheme = model.info(name), model.scheme(name)
    floats = FLOAT_KINDS.get(kind)
    change = ANEW if floats is None else float_change(info.dtype, scheme, floats)
    if scheme is None or not change:
        return change
    return f"{change}: no block holds {scheme} of {info.shape[-1]} inputs"
