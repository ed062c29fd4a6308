"""The key/value cache: one pair of buffers a layer, grown in chunks, cut back at will.

Keys and values lie `[B * kv_heads, N, D]` on a CPU, so that a C kernel reads them as one stream,
and `[B, kv_heads, N, D]` on a GPU, as fused attention wants them. Where a CPU has no such kernel,
keys lie transposed (`[B * kv_heads, D, N]`): a query times all keys is one plain matrix product.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError

CHUNK = 128  # positions a buffer grows by, at least
BITS = (4, 8, 16)
HALF_MAX = 65504.0
KINDS = ("full", "stream")


@dataclass(frozen=True, slots=True)
class Policy:
    """What a cache keeps: `bits` a value (16: as computed), and "full" or "stream" positions.

    OptimError (2) for anything else.
    """

    bits: int = 16
    kind: str = "full"

    def __post_init__(self) -> None:
        for name, value, known in (("bits", self.bits, BITS), ("policy", self.kind, KINDS)):
            if value not in known:
                listing = ", ".join(map(str, known))
                raise OptimError(f"no cache has the {name} {value!r}", f"known: {listing}", USAGE)


class Cache(Protocol):
    """What generation knows of a cache: how much it has seen, may see, and how to cut it back."""

    length: int
    limit: int

    def truncate(self, length: int) -> None:
        """Forget from position `length` on; look at `length` for what is left."""

    @property
    def nbytes(self) -> int: ...
    @property
    def summary(self) -> str: ...


class LayeredCache(Cache, Protocol):
    """What a decoder knows of it."""

    layers: Sequence["Layer"]
    padding: Tensor | None
    places: object
    """What a kernel remembers of where the layers lie."""

    @property
    def step(self) -> int:
        """So many tokens may be computed at once."""

    @property
    def span(self) -> int:
        """So many positions it holds at most."""

    def place(self, count: int) -> int:
        """Make room for `count` positions more; where in the layers the first of them goes."""

    def place_run(self, count: int) -> tuple[int, int]:
        """Make room for one position more, and for others of `count` in a row as far as nothing
        that is there has to be forgotten, or rounded anew, for them: where the first goes, and how
        many there is room for. `truncate` takes them back without a trace."""


class Layer(Protocol):
    """One layer of a cache: `rows` (`B * kv_heads`) of at most N positions."""

    @property
    def rows(self) -> int: ...

    def write(self, k: Tensor, v: Tensor, start: int) -> None:
        """Put `k`, `v` `[B, T, kv_heads, D]` at positions start..start+T."""

    def scores(self, rows: Tensor, first: int, end: int, scale: float) -> Tensor:
        """`rows` `[B * kv, R, D]` times the keys of positions first..end: `[B * kv, R, n]`."""

    def mix(self, weights: Tensor, first: int, end: int) -> Tensor:
        """The values of positions first..end, weighted by `[B * kv, R, n]`: `[B * kv, R, D]`."""

    def grow(self, length: int) -> None:
        """Make room for `length` positions, keeping what is there."""

    def free(self, start: int) -> int:
        """So many positions from `start` on can be filled, one at least, as things lie then."""

    def keys_at(self, first: int, end: int) -> Tensor:
        """Keys of positions first..end: fp32 `[B * kv, n, D]`."""

    def put_keys(self, rows: Tensor, start: int) -> None:
        """Put `rows` `[B * kv, n, D]` in place of the keys from `start` on."""

    def drop(self, first: int, count: int, end: int) -> None:
        """Forget `count` positions from `first` on; those after them, up to `end`, move down."""

    def state(self, length: int) -> dict[str, Tensor]:
        """What the first `length` positions are, to be saved."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, into an empty layer."""

    @property
    def nbytes(self) -> int: ...
    @property
    def identity(self) -> str:
        """How it keeps a value: two layers with the same can read each other's `state`."""


def by_rows(x: Tensor) -> Tensor:
    """`[B, T, kv, D]` as `[B * kv, T, D]`."""
    return x.transpose(1, 2).flatten(0, 1)


@dataclass(slots=True)
class LayerCache:
    """Keys and values as they are: fp16 or fp32 on a CPU, the model's dtype on a GPU.

    A CPU multiplies fp16 slowly, so it is widened there first.
    """

    transposed: bool
    keys: Tensor
    values: Tensor

    @property
    def rows(self) -> int:
        return self._values().shape[0]

    def write(self, k: Tensor, v: Tensor, start: int) -> None:
        self.put_keys(by_rows(k), start)
        rows = by_rows(v)
        self._values()[:, start : start + rows.shape[1]] = self._fitting(rows)

    def scores(self, rows: Tensor, first: int, end: int, scale: float) -> Tensor:
        keys = self._wide(self._keys()[:, first:end].transpose(1, 2))
        zero = keys.new_zeros(1)
        return torch.baddbmm(zero, rows.to(keys.dtype), keys, beta=0, alpha=scale).float()

    def mix(self, weights: Tensor, first: int, end: int) -> Tensor:
        values = self._wide(self._values()[:, first:end])
        return torch.bmm(weights.to(values.dtype), values)

    def grow(self, length: int) -> None:
        self.keys = longer(self.keys, -1 if self.transposed else -2, length)
        self.values = longer(self.values, -2, length)

    def free(self, start: int) -> int:
        return self._values().shape[1] - start

    def keys_at(self, first: int, end: int) -> Tensor:
        return self._keys()[:, first:end].float()

    def put_keys(self, rows: Tensor, start: int) -> None:
        self._keys()[:, start : start + rows.shape[1]] = self._fitting(rows)

    def drop(self, first: int, count: int, end: int) -> None:
        for x in (self._keys(), self._values()):
            x[:, first : end - count] = x[:, first + count : end].clone()

    def state(self, length: int) -> dict[str, Tensor]:
        keys, values = self._keys()[:, :length], self._values()[:, :length]
        return {"keys": keys.contiguous(), "values": values.contiguous()}

    def restore(self, state: dict[str, Tensor]) -> None:
        length = state["keys"].shape[1]
        self.grow(length)
        self._keys()[:, :length] = state["keys"]
        self._values()[:, :length] = state["values"]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def identity(self) -> str:
        return str(self.keys.dtype).removeprefix("torch.")

    def _wide(self, x: Tensor) -> Tensor:
        return x.float() if x.device.type == "cpu" else x

    def _fitting(self, x: Tensor) -> Tensor:
        return x.clamp(-HALF_MAX, HALF_MAX) if self.keys.dtype == torch.float16 else x

    def _keys(self) -> Tensor:
        """A view `[B * kv, N, D]`."""
        return self.keys.transpose(1, 2) if self.transposed else _rows(self.keys)

    def _values(self) -> Tensor:
        return _rows(self.values)


def _rows(x: Tensor) -> Tensor:
    """A view `[B * kv, N, D]`."""
    return x if x.dim() == 3 else x.flatten(0, 1)


def longer(old: Tensor, axis: int, length: int) -> Tensor:
    """`old` with room for `length` positions along `axis`."""
    size = list(old.shape)
    kept = size[axis]
    if kept >= length:
        return old  # a growth that was interrupted
    size[axis] = length
    new = old.new_zeros(size)
    new.narrow(axis, 0, kept).copy_(old)
    return new


def states(layers: Sequence[Layer], length: int) -> dict[str, Tensor]:
    """The tensors of all layers, `0.keys` and so on."""
    parts = enumerate(layer.state(length) for layer in layers)
    return {f"{i}.{name}": tensor.cpu() for i, part in parts for name, tensor in part.items()}


def restored(layers: Sequence[Layer], state: dict[str, Tensor], most: int) -> int:
    """Fill empty `layers` with what `states` gave; how many positions they hold now.

    ValueError, before anything is copied, if the form is another or there are more than `most`.
    """
    parts: list[dict[str, Tensor]] = [{} for _ in layers]
    for name, tensor in state.items():
        index, _, leaf = name.partition(".")
        if not index.isdecimal() or int(index) >= len(parts):
            raise ValueError(f"{name} belongs to no layer")
        parts[int(index)][leaf] = tensor
    held = _positions(parts[0])
    if held > most:
        raise ValueError(f"{held} positions, at most {most} fit")
    for layer, part in zip(layers, parts, strict=True):
        _check(part, layer.state(0), held)
    for layer, part in zip(layers, parts, strict=True):
        layer.restore(part)
    return held


def _positions(part: dict[str, Tensor]) -> int:
    """How many positions a layer's state has; those in `old...` tensors come first."""
    if any(x.dim() != 3 for x in part.values()):
        raise ValueError("a tensor has not three axes")
    old = {x.shape[1] for name, x in part.items() if name.startswith("old")} or {0}
    new = {x.shape[1] for name, x in part.items() if not name.startswith("old")}
    if len(old) != 1 or len(new) != 1:
        raise ValueError("the tensors of a layer differ in length")
    return old.pop() + new.pop()


def _check(part: dict[str, Tensor], empty: dict[str, Tensor], held: int) -> None:
    if part.keys() != empty.keys() or _positions(part) != held:
        raise ValueError("the layers differ")
    for name, x in part.items():
        like = empty[name]
        if (x.dtype, x.shape[0], x.shape[2]) != (like.dtype, like.shape[0], like.shape[2]):
            raise ValueError(f"{name} has another type or shape")


@dataclass(slots=True)
class StaticCache:
    """All layers' keys and values for `batch` rows, at most `limit` positions.

    `length` positions are filled. `padding` `[B]` counts the pad tokens on the left of each row.
    Before them lie `prefix` positions of the model's own, which nobody else counts.
    """

    layers: Sequence[Layer]
    limit: int
    length: int = 0
    padding: Tensor | None = None
    capacity: int = field(default=0)
    prefix: int = 0
    seen: Tensor | None = None
    """The tokens held `[B, length]`, where a longer text may have to be read again."""
    long: bool = False
    """Whether the keys held have the angles of a text that is longer than a crossing."""
    places: object = field(default=None, repr=False)

    @property
    def step(self) -> int:
        return self.limit

    @property
    def span(self) -> int:
        return self.limit

    def place(self, count: int) -> int:
        """Make room for `count` positions more; where the first of them goes."""
        self.reserve(self.prefix + self.length + count)
        return self.prefix + self.length

    def place_run(self, count: int) -> tuple[int, int]:
        start = self.place(count)
        return start, min(count, self.layers[0].free(start))

    def reserve(self, length: int) -> None:
        """Grow every layer so that `length` positions fit."""
        if length <= self.capacity:
            return
        wanted = max(length, self.capacity + self.capacity // 2)
        capacity = min(self.prefix + self.limit, -(-wanted // CHUNK) * CHUNK)
        for layer in self.layers:
            layer.grow(capacity)
        self.capacity = capacity

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self.length = min(self.length, length)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def summary(self) -> str:
        return f"{self.length} of {self.limit} tokens"

    @property
    def identity(self) -> str:
        return f"full, {self.layers[0].identity}"

    def state(self) -> dict[str, Tensor]:
        """All tensors, to be saved."""
        return states(self.layers, self.prefix + self.length)

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`; ValueError, and an empty cache, if it is not of this form."""
        self.capacity = restored(self.layers, state, self.prefix + self.limit)
        self.length = self.capacity - self.prefix


def static_layers(
    count: int,
    batch: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    transposed: bool = False,
) -> list[Layer]:
    """Empty layers; memory is taken as the text grows. `transposed`: the keys on a CPU."""
    rows = (batch * kv_heads,) if device.type == "cpu" else (batch, kv_heads)

    def empty() -> LayerCache:
        values = torch.zeros(*rows, 0, head_dim, dtype=dtype, device=device)
        keys = values.clone()
        return LayerCache(transposed, keys.transpose(1, 2) if transposed else keys, values)

    return [empty() for _ in range(count)]
