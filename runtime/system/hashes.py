"""sha256 of files, tensors and tokens: the one place that hashes.

Files are read at the speed of the disk. A large file's hash is remembered in the cache folder
beside what the system says of the file (size, times, inode), and is taken from there as long as
that holds: a model of 100 GB is hashed once.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.system.paths import cache_folder

WORTH_KEEPING = 16 << 20  # bytes; smaller files are hashed again
SETTLED = 2 * 10**9  # nanoseconds: a younger file may change without a change of its time


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """`file_sha256`, remembered for large files that have not changed since.

    Raises OptimError (2) for a file that cannot be read or changes while it is.
    """
    try:
        before = _state(path)
        if before[0] < WORTH_KEEPING:
            return file_sha256(path)
        place = cache_folder() / "hashes" / bytes_sha256([os.fsencode(path.resolve())])
        if (kept := _kept(place, before)) is not None:
            return kept
        found, after = file_sha256(path), _state(path)
    except OSError as error:
        raise OptimError(f"cannot read {path}: {error.strerror}", code=USAGE) from None
    if after != before:
        raise OptimError(f"{path} changes while it is read", "wait until it is whole", USAGE)
    if time.time_ns() - max(before[1], before[2]) > SETTLED:
        _keep(place, before, found)
    return found


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _kept(place: Path, state: list[int]) -> str | None:
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        return str(found["sha256"]) if found["state"] == state else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(place: Path, state: list[int], digest: str) -> None:
    new = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps({"sha256": digest, "state": state}), encoding="utf-8")
        os.replace(new, place)
    except OSError:
        new.unlink(missing_ok=True)  # it is hashed again the next time


def bytes_sha256(pieces: Iterable[Any]) -> str:
    """sha256 (hex) over buffers, one after the other."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(memoryview(piece).cast("B"))
    return digest.hexdigest()


def text_sha256(text: str) -> str:
    """sha256 (hex) of a text as UTF-8; halves of characters, which have none, as they are."""
    return bytes_sha256([text.encode("utf-8", "surrogatepass")])


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 (hex) of a tensor's bytes, row-major, as safetensors stores them."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def tensors_sha256(tensors: Iterable[Tensor]) -> str:
    """sha256 (hex) of the bytes of tensors one after the other; hashes one, makes the next."""
    digest, waiting = hashlib.sha256(), None
    with ThreadPoolExecutor(1) as pool:
        for tensor in tensors:
            data = tensor_bytes(tensor)
            if waiting is not None:
                waiting.result()
            waiting = pool.submit(digest.update, data)
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """A tensor's bytes, row-major, as a buffer; not copied where they lie so."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def tokens_sha256(ids: Tensor) -> str:
    """sha256 (hex) of token ids [n, length]: shape and values, whatever the integer type."""
    digest = hashlib.sha256(f"{list(ids.shape)}".encode())
    digest.update(ids.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
