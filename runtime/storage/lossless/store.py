"""A folder packed without loss, read as the plain model it was: decoded when asked for.

Units of a layout (storage/lossless/layouts.py) stand for bf16 tensors; what else the files hold is
as it was. The shapes are in our manifest, or follow from the configuration.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optim.runtime.architecture.config import text_part
from optim.runtime.kernels.door import Array
from optim.runtime.storage.lossless.layout import Coded, Layout, ShapeOf, damaged
from optim.runtime.storage.lossless.layouts import LAYOUTS, layout_of
from optim.runtime.storage.tensors import SIDE, Part, SafetensorsFiles, Store, TensorInfo
from optim.runtime.system.hashes import tensors_sha256

if TYPE_CHECKING:
    from optim.runtime.storage.manifest import Manifest

PIECE = 1 << 22  # weights of a tensor in memory at a time


class LosslessStore:
    """The tensors of a packed folder under their own names, in bf16; see tensor_files.Store.

    Raises OptimError (2) at open where the index is not true, from `read` where the codes are not.
    """

    def __init__(
        self, files: Iterable[Path], config: Mapping[str, Any], manifest: "Manifest"
    ) -> None:
        """`manifest` may know the packed tensors' shapes, and the hashes of the originals."""
        self._stored = SafetensorsFiles(files)
        self.files = self._stored.files
        self.layout = layout_of(config)
        self.infos: dict[str, TensorInfo] = {}
        self.units: dict[str, tuple[str, ...]] = {}
        """Unit -> the tensors it stands for, in order."""
        self._open: dict[str, Coded] = {}
        self._where: dict[str, tuple[str, int]] = {}
        shapes, self._hashes = manifest.shapes, manifest.original_sha256
        packed: set[str] = set()
        if self.layout is not None:
            layout = LAYOUTS[self.layout]
            shape_of = partial(_shape, shapes=shapes, config=config)
            for unit, tensors in layout.units(self._stored.infos, config, shapes):
                packed |= self._enter(layout, unit, tensors, shape_of)
        for name, info in self._stored.infos.items():
            if name not in packed:
                self.infos[name] = info

    def _enter(
        self, layout: Layout, unit: str, tensors: tuple[str, ...], shape_of: ShapeOf
    ) -> set[str]:
        """Open a unit, give each of its tensors an info and a place; the names of its pieces."""
        names = self._pieces(layout, unit)
        infos = {piece: self._stored.infos[name] for piece, name in names.items()}
        read = partial(self._bytes, names)
        self._open[unit], places = layout.open(unit, tensors, infos, read, shape_of)
        self.units[unit] = tensors
        for name, (first, shape) in zip(tensors, places, strict=True):
            self.infos[name] = TensorInfo(shape, torch.bfloat16, 2 * math.prod(shape))
            self._where[name] = unit, first
        return set(names.values())

    def _pieces(self, layout: Layout, unit: str) -> dict[str, str]:
        """What a unit is stored in: piece -> name."""
        names = {piece: f"{unit}.{layout.prefix}{piece}" for piece in layout.pieces}
        return {piece: name for piece, name in names.items() if name in self._stored.infos}

    def _bytes(self, names: Mapping[str, str], piece: str, start: int, stop: int) -> Array:
        """Bytes start..stop of a stored piece."""
        name = names[piece]
        info = self._stored.infos[name]
        item = info.dtype.itemsize
        count = math.prod(info.shape)
        flat = self._stored.flat(name, start // item, min(stop // item, count))
        return flat.view(torch.uint8).numpy()

    def read(self, part: Part) -> Tensor:
        """The tensor or part of one, on the CPU, bit for bit what was packed.

        A whole tensor whose hash is known is compared with it: OptimError (2) if it differs.
        """
        tensor = self._decoded(part)
        known = self._hashes.get(part.stored)
        if known and part == Part(part.stored) and tensors_sha256([tensor]) != known:
            raise damaged(part.stored, "it is not what was packed, its sha256 differs")
        return tensor

    def _decoded(self, part: Part) -> Tensor:
        if part.stored not in self._where:
            return self._stored.read(part)
        unit, begin = self._where[part.stored]
        shape = self.infos[part.stored].shape
        first, count = part.span(shape)
        return self._open[unit].decode(begin + first, count).view(part.shape(shape))

    def held(self, name: str) -> tuple[str, float] | None:
        """How a packed tensor is stored, and its share of the bytes; None for one that is plain."""
        if name not in self._where:
            return None
        unit, layout = self._where[name][0], str(self.layout)
        names = self._pieces(LAYOUTS[layout], unit).values()
        total = sum(self._stored.infos[stored].nbytes for stored in names)
        whole = sum(self.infos[tensor].nbytes for tensor in self.units[unit])
        return layout, total * self.infos[name].nbytes / whole


def open_lossless(folder: Path, config: Mapping[str, Any]) -> LosslessStore:
    """All weight files of a packed folder: their names and order mean nothing."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != SIDE)
    return LosslessStore(files, config, _manifest(folder))


def _manifest(folder: Path) -> "Manifest":
    from optim.runtime.storage.manifest import Manifest, read_manifest

    return read_manifest(folder) or Manifest()


def pieces(store: Store, name: str) -> Iterator[Tensor]:
    """A tensor some rows at a time, about PIECE numbers: no more of it is ever in memory."""
    shape = store.infos[name].shape
    if not math.prod(shape) or not shape:
        yield store.read(Part(name))
        return
    step = max(1, PIECE // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield store.read(Part(name, rows=(start, min(start + step, shape[0]))))


def disproved(
    store: Store, folder: Path, progress: Callable[[int, int, str], None]
) -> tuple[list[str], int]:
    """Decode every tensor again: what is not what was packed, in words, and how many are.

    Needs no original: the manifest has its hashes. Tensors without one are not counted.
    """
    hashes = _manifest(folder).original_sha256
    problems = [f"{name} is missing" for name in sorted(hashes.keys() - store.infos.keys())]
    proven = 0
    for at, name in enumerate(store.infos, 1):
        progress(at, len(store.infos), name)
        if name in hashes and tensors_sha256(pieces(store, name)) != hashes[name]:
            problems.append(f"{name} does not decode to what was packed")
        elif name in hashes:
            proven += 1
    return problems, proven


def _shape(
    name: str, size: int, shapes: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[int, ...]:
    """A packed tensor's shape: the manifest's, or rows of the width the configuration says."""
    known = shapes.get(name)
    if isinstance(known, list) and all(type(n) is int and n > 0 for n in known):
        shape = tuple(known)
    else:
        width = _width(name, text_part(dict(config)))
        shape = (size // width, width) if width else (size,)
    if math.prod(shape) != size:
        raise damaged(name, f"{size} weights do not fit the shape {list(shape)}")
    return shape


def _width(name: str, config: Mapping[str, Any]) -> int:
    """Inputs of a linear or embedding of the published releases; 0 where they are not known."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    inner = config.get("head_dim") or (hidden or 0) // (heads or 1)
    widths = {"down_proj": config.get("intermediate_size"), "o_proj": inner * (heads or 0)}
    width = widths.get(module, hidden)
    return width if type(width) is int and width > 0 else 0
