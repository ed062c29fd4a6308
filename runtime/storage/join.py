"""Several safetensors files made into one, a piece of a tensor in memory at a time."""

from collections.abc import Sequence
from pathlib import Path

import torch

from optim.runtime.storage.tensors import SafetensorsFiles
from optim.runtime.storage.writer import TensorWriter
from optim.runtime.system.hashes import file_sha256

MOST_BYTES = 5 * 10**9  # of the weights of one file: larger models stay in several
PIECE = 2**24  # elements copied at a time


def join(files: Sequence[Path], target: Path) -> str:
    """Write the tensors of `files` as the one file `target`, whole or not at all; its sha256.

    The bytes depend on the tensors alone, not on which file held which. OSError where the disk is
    full.
    """
    held = SafetensorsFiles(files)
    entries = {name: (info.dtype, info.shape) for name, info in held.infos.items()}
    with TensorWriter(target, entries, {}) as out:
        for name, size in out.sizes.items():
            count = size // held.infos[name].dtype.itemsize
            for first in range(0, count, PIECE):
                piece = held.flat(name, first, min(first + PIECE, count))
                out.append(name, piece.view(torch.uint8).numpy())
    return file_sha256(target)
