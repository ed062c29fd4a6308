"""Several processes at one work (`torchrun`): each takes its share of the text and of what is
computed from it.

Sums are taken over all processes; everything else is the same on each, so that two processes do
what one does on the whole text, up to the order of a sum.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.system.torchrun import processes

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Team:
    """This process among `size`; alone it talks to nobody."""

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    @property
    def ending(self) -> str:
        """Of the names of files that each process has for itself."""
        return f".{self.rank}" if self.rank else ""

    def part(self, count: int) -> slice:
        """This process's share of `count` things that lie one behind the other."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        for tensor in tensors:
            self.add([tensor])
            tensor /= self.size

    def share(self, value: Any) -> Any:
        """The leader's `value` (anything that pickles), on every process and its own device."""
        if self.size == 1:
            return value
        box = [_packed(value) if self.leads else None]
        dist.broadcast_object_list(box, src=0)
        return value if self.leads else self._unpacked(box[0])

    def gather(self, value: Result) -> list[Result]:
        """Every process's `value` (anything that pickles), by rank, on every process."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, _packed(value))
        return [self._unpacked(each) for each in box]

    def divide(self, items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
        """`work` on each of `items`, done by one process each; the results, on every process."""
        mine = {k: work(items[k]) for k in range(self.rank, len(items), self.size)}
        found = {k: result for part in self.gather(mine) for k, result in part.items()}
        return [found[k] for k in range(len(items))]

    def _unpacked(self, data: Any) -> Any:
        return torch.load(BytesIO(data), map_location=self.device, weights_only=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """End the talks."""
        if self.size > 1:
            dist.destroy_process_group()


ALONE = Team()


def join(device: torch.device) -> Team:
    """The team torchrun has started this process in, or a team of one."""
    size = processes()
    if size == 1:
        return ALONE
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Team(dist.get_rank(), size, device)


def _packed(value: Any) -> bytes:
    data = BytesIO()
    torch.save(value, data)
    return data.getvalue()


def need_share(team: Team, windows: int) -> None:
    """OptimError (2) if there is not a window of text for every process."""
    if windows < team.size:
        what = f"{windows} windows of text cannot be shared among {team.size} processes"
        raise OptimError(what, "more --num-samples, or fewer processes", USAGE)
