"""Write a safetensors file whose tensors come in pieces: sizes first, then bytes, in any order.

Nothing but the piece at hand is in memory. The file has its name only when it is whole.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from optim.runtime.storage.tensors import DTYPES
from optim.runtime.system.hashes import file_sha256

NAMES = {dtype: name for name, dtype in DTYPES.items()}
Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class TensorWriter:
    """`append` to the tensors of `entries` until each is full; a context, which finishes the file.

    `metadata` goes into the header. OSError where the disk is full.
    """

    def __init__(self, path: Path, entries: Entries, metadata: Mapping[str, str]) -> None:
        self.path, self.entries = path, entries
        self.sizes = {n: math.prod(s) * d.itemsize for n, (d, s) in entries.items()}
        self._at: dict[str, int] = {}
        header, end = _header(entries, self.sizes, metadata), 0
        for name in _order(entries):
            self._at[name] = len(header) + end
            end += self.sizes[name]
        self._left = dict(self.sizes)
        self._unfinished = path.with_name(path.name + ".unfinished")
        self._file = self._unfinished.open("w+b")
        self._file.write(header)

    def append(self, name: str, data: Any) -> None:
        """The next bytes of a tensor: anything with a buffer."""
        view = memoryview(data).cast("B")
        assert view.nbytes <= self._left[name], name
        self._file.seek(self._at[name])
        self._file.write(view)
        self._at[name] += view.nbytes
        self._left[name] -= view.nbytes

    def facts(self) -> dict[str, Any]:
        """What the journal says of the finished file."""
        return {"file": self.path.name, "sha256": file_sha256(self.path), "tensors": self.sizes}

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            assert not any(self._left.values()), [n for n, left in self._left.items() if left]
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            os.replace(self._unfinished, self.path)
        else:
            self._unfinished.unlink(missing_ok=True)


def _order(entries: Entries) -> list[str]:
    """Wide types first, so that every tensor lies at a multiple of its item's size."""
    return sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))


def _header(entries: Entries, sizes: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in _order(entries):
        dtype, shape = entries[name]
        offsets = [end, end + sizes[name]]
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
