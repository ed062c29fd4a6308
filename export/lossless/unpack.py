"""`optim unpack`: the tensors that were packed, byte for byte, as an ordinary model folder.

Every tensor is compared with the sha256 that the packer left in the manifest, if there is one.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.export.lossless.finish import KEPT, write_manifest
from optim.recipes.errors import CHECK_FAILED, USAGE, OptimError
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.lossless.store import LosslessStore, pieces
from optim.runtime.storage.manifest import Manifest, made_here, read_manifest
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.tensors import INDEX
from optim.runtime.storage.workspace import (
    Workspace,
    disk_error,
    index_of,
    shards_in,
    shards_of,
    source_of,
)
from optim.runtime.storage.writer import TensorWriter
from optim.runtime.system.hashes import bytes_sha256
from optim.runtime.system.output import check_output

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What was written; `proven` tensors were compared with the packer's hashes."""

    output: str
    bytes: int
    tensors: int
    proven: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def unpack(source: str, output: str, progress: Progress, *, force: bool = False) -> Unpacked:
    """Write the model that `source` was packed from; resumes. Raises OptimError.

    2: it is not packed, or damaged; 3: a tensor is not what was packed; 4: the disk is full.
    """
    start = time.monotonic()
    checkpoint = open_checkpoint(source)
    if not isinstance(checkpoint.store, LosslessStore):
        raise OptimError(f"{source} is not packed", "it can be used as it is", USAGE)
    manifest = read_manifest(checkpoint.folder) or Manifest()
    hashes = manifest.original_sha256
    place, infos = Path(output), checkpoint.store.infos
    total = sum(info.nbytes for info in infos.values())
    check_output(place, force, total, checkpoint.inputs())
    what = {"unpack": checkpoint.fingerprint(), "files": checkpoint.file_hashes()}
    workspace = Workspace(place, what, force, checkpoint)
    with workspace:
        shards = list(shards_of(checkpoint.store.infos))
        for i in range(len(workspace.done), len(shards)):
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            workspace.commit(_write(checkpoint, workspace.files / name, shards[i], hashes))
            progress(i + 1, len(shards), name)
        config = json.dumps(checkpoint.config, indent=2)
        workspace.write_text("config.json", config + "\n")
        workspace.write_text(INDEX, index_of(workspace.done) + "\n")
        write_manifest(checkpoint, workspace, _manifest(checkpoint, manifest, workspace.done))
        checkpoint.write_sidecars(workspace.files)
        workspace.publish()
    return Unpacked(
        output=output,
        bytes=total,
        tensors=len(infos),
        proven=len(hashes.keys() & infos.keys()),
        seconds=time.monotonic() - start,
    )


def _manifest(checkpoint: Checkpoint, packed: Manifest, records: list[dict[str, Any]]) -> Manifest:
    """What the packed model's manifest says of the model itself, and the files' hashes."""
    recipe = packed.recipe or {"version": 1, "model": checkpoint.source}
    stated = packed.model_fields_set - {"source_sha256"}
    return Manifest(
        **{key: getattr(packed, key) for key in KEPT if key in stated},
        made=made_here(),
        source=packed.source or source_of(checkpoint),
        recipe={key: value for key, value in recipe.items() if key != "pack"},
        notes=[],
        shards=shards_in(records),
        original_sha256=packed.original_sha256,
    )


def _write(
    checkpoint: Checkpoint, path: Path, names: list[str], hashes: dict[str, Any]
) -> dict[str, Any]:
    store = checkpoint.store
    sizes = {name: (store.infos[name].dtype, store.infos[name].shape) for name in names}
    try:
        with TensorWriter(path, sizes, {}) as out:
            for name in names:
                found = bytes_sha256(_appended(out, name, pieces(store, name)))
                if hashes.get(name, found) != found:
                    fix = "fetch or pack the model again"
                    message = f"{name} is not what was packed: its sha256 differs"
                    raise OptimError(message, fix, CHECK_FAILED)
    except OSError as error:
        raise disk_error(path, error) from error
    return out.facts()


def _appended(out: TensorWriter, name: str, tensors: Iterable[Tensor]) -> Iterator[Any]:
    """The bytes of a tensor's pieces, each after it was written."""
    for tensor in tensors:
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        out.append(name, data)
        yield data.data
