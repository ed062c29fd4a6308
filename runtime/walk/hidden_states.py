"""Hidden states on disk, between one block and the next."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class HiddenStates:
    """Hidden states `[n, length, hidden]` float32 or bf16 in a file: memory never has them all."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self._row = shape[1] * shape[2] * dtype.itemsize
        path.touch()
        with path.open("r+b") as file:
            file.truncate(shape[0] * self._row)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return self.shape[1]

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(len(self))
        data = bytearray((stop - start) * self._row)
        with self.path.open("rb") as file:
            file.seek(start * self._row)
            file.readinto(data)
        return torch.frombuffer(data, dtype=self.dtype).view(stop - start, *self.shape[1:])

    def take(self, rows: Sequence[int]) -> Tensor:
        """These windows, in this order."""
        return torch.cat([self[row : row + 1] for row in rows])

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        start = rows.indices(len(self))[0]
        data = value.to("cpu", self.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        with self.path.open("r+b") as file:
            file.seek(start * self._row)
            file.write(data.data)
