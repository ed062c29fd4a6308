"""Blocks in the host's memory, brought to the device one ahead of the one that computes.

For a device that does not hold the model: embedding, head and cache stay on it, and two buffers the
size of the largest block. What a block holds, in whatever form (bf16, packed, quantized), lies in
one piece of pinned memory, so it comes in one copy; block i goes to buffer i mod 2, and its tensors
are views of that buffer from the start. On a GPU the copies run on a stream of their own:

    copy     | 0 | 1 |     | 2 |     | 3 |          copy i waits until block i - 2 has computed
    compute      | block 0 | block 1 | block 2      block i waits until copy i is there
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from operator import setitem
from typing import Any, overload

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes: what a device's own allocations begin at
Slot = tuple[Callable[[Tensor], None], Tensor]
"""How to replace a tensor that an object holds, and the tensor."""


class Offloaded(Sequence[Any]):
    """Blocks that are on the device while their turn in an iteration lasts, and not after.

    An index gives the block alone: its tensors then mean nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._blocks: list[Any] = []
        self._hosts: list[Tensor] = []
        self._slots: list[list[Slot]] = []
        self._buffers: list[Tensor] = []

    def append(self, block: Any) -> None:
        """Take over what `block` holds on the device: there it is freed. Only before `begin`."""
        found = [slot for slot in slots(block, set()) if slot[1].device.type == self.device.type]
        total = sum(_room(tensor) for _, tensor in found)
        host = torch.empty(total, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        for (_, tensor), part in zip(found, _parts(host, found), strict=True):
            part.copy_(tensor)
        # A tensor without bytes keeps its type and shape until there are buffers.
        self._slots.append([(put, tensor.to("meta")) for put, tensor in found])
        for put, tensor in self._slots[-1]:
            put(tensor)
        self._blocks.append(block)
        self._hosts.append(host)

    def begin(self) -> None:
        """All blocks are here: make the buffers and let every tensor be a part of one."""
        largest = max((host.numel() for host in self._hosts), default=0)
        count = min(2, len(self._blocks))
        self._buffers = [
            torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(count)
        ]
        for i, found in enumerate(self._slots):
            for (put, _), part in zip(found, _parts(self._buffers[i % 2], found), strict=True):
                put(part)

    @property
    def host_bytes(self) -> int:
        """Bytes held in the host's memory."""
        return sum(host.numel() for host in self._hosts)

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._blocks[index]

    def __iter__(self) -> Iterator[Any]:
        """The blocks in order; the next is on its way while one is in use."""
        turns = _Turns(self.device)
        for i in range(min(2, len(self))):
            turns.copy(i, self._copy)
        for i, block in enumerate(self._blocks):
            turns.wait(i)
            yield block
            turns.done(i)
            if i + 2 < len(self):
                turns.copy(i + 2, self._copy)

    def _copy(self, i: int) -> None:
        host = self._hosts[i]
        self._buffers[i % 2][: host.numel()].copy_(host, non_blocking=True)


class _Turns:
    """Who waits for whom: events on two streams of a GPU; elsewhere everything is in order."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._copied: dict[int, Any] = {}
        self._computed: dict[int, Any] = {}
        if self._gpu:
            self._main = torch.cuda.current_stream(device)
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._side.wait_stream(self._main)  # the last iteration's blocks may still compute

    def copy(self, i: int, copy: Callable[[int], None]) -> None:
        """Begin to bring block i, once block i - 2 has computed."""
        if not self._gpu:
            return copy(i)
        if i - 2 in self._computed:
            self._side.wait_event(self._computed.pop(i - 2))
        with torch.cuda.stream(self._side):
            copy(i)
            self._copied[i] = self._side.record_event()

    def wait(self, i: int) -> None:
        """What follows computes with block i."""
        if self._gpu:
            self._main.wait_event(self._copied.pop(i))

    def done(self, i: int) -> None:
        """What came before was all that block i had to compute."""
        if self._gpu:
            self._computed[i] = self._main.record_event()


def slots(thing: Any, seen: set[int]) -> Iterator[Slot]:
    """Every tensor that an object of ours holds, at any depth, once each."""
    if id(thing) in seen or not _ours(thing):
        return
    seen.add(id(thing))
    for put, value in _members(thing):
        if isinstance(value, Tensor):
            if id(value) not in seen:
                seen.add(id(value))
                yield put, value.data
        else:
            yield from slots(value, seen)


def _ours(thing: Any) -> bool:
    module = type(thing).__module__
    return isinstance(thing, nn.Module | list | dict) or module.startswith("optim.")


def _members(thing: Any) -> Iterator[tuple[Callable[[Any], None], Any]]:
    """How to replace each thing that an object refers to, and the thing."""
    if isinstance(thing, list | dict):
        places = range(len(thing)) if isinstance(thing, list) else list(thing)
        for key in places:
            yield partial(setitem, thing, key), thing[key]
        return
    if is_dataclass(thing):
        names = [field.name for field in fields(thing)]
    else:
        names = list(getattr(thing, "__dict__", {}))
    for name in names:
        yield partial(object.__setattr__, thing, name), getattr(thing, name)


def _parts(memory: Tensor, found: Sequence[Slot]) -> Iterator[Tensor]:
    """A view into uint8 `memory` for each tensor, one after the other."""
    at = 0
    for _, tensor in found:
        part = memory[at : at + tensor.nbytes].view(tensor.dtype)
        yield part.as_strided(tensor.shape, _strides(tensor))
        at += _room(tensor)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Its own where it fills its memory in some order, else row after row."""
    return torch.empty_like(tensor, device="meta").stride()


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
