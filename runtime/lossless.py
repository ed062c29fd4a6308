"""A folder packed without loss, read as the plain model it was: decoded when asked for.

DFloat11 units (`….luts` and the others) and bf12 matrices (`….weight.bf12_low` and the others)
stand for bf16 tensors; what else the files hold is as it was. `config.json` names the linears of
each unit by a regular expression; the shapes are in our manifest, or follow from the configuration.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.recipes.patterns import check_pattern
from optim.runtime.formats import bf12, dfloat11
from optim.runtime.kernels.cpu_df11 import Array
from optim.runtime.names import text_config
from optim.runtime.tensor_files import Part, SafetensorsFiles, Store, TensorInfo
from optim.runtime.verify import read_manifest

DF11_KEY, BF12_KEY = "dfloat11_config", "bf12_config"
KEYS = {DF11_KEY: "df11", BF12_KEY: "bf12"}
MOST_PATTERNS = 4096
PIECE = 1 << 22  # weights of a tensor in memory at a time
SHAPES, HASHES = "shapes", "original_sha256"  # of our manifest: tensor -> the fact

Packed = dfloat11.Unit | bf12.Matrix


def layout_of(config: Mapping[str, Any]) -> str | None:
    """`df11` or `bf12` where config.json says that weights are packed so, else None."""
    return next((layout for key, layout in KEYS.items() if isinstance(config.get(key), dict)), None)


class LosslessStore:
    """The tensors of a packed folder under their own names, in bf16; see tensor_files.Store.

    Raises OptimError (2) at open where the index is not true, from `read` where the codes are not.
    """

    def __init__(
        self, files: Iterable[Path], config: Mapping[str, Any], manifest: Mapping[str, Any]
    ) -> None:
        """`manifest` may know the packed tensors' shapes and hashes; see SHAPES and HASHES."""
        self._stored = SafetensorsFiles(files)
        self.files = self._stored.files
        self.layout = layout_of(config)
        self.infos: dict[str, TensorInfo] = {}
        self.units: dict[str, tuple[str, ...]] = {}
        """Unit -> the tensors it stands for, in order; a bf12 matrix is a unit of one."""
        self._open: dict[str, Packed] = {}
        self._where: dict[str, tuple[str, int]] = {}
        shapes, self._hashes = (_mapping(manifest, key) for key in (SHAPES, HASHES))
        for unit, tensors in _units(self._stored.infos, config, shapes):
            self._enter(unit, tensors, config, shapes)
        packed = {key for unit in self.units for key, _ in self._pieces(unit).values()}
        for name, info in self._stored.infos.items():
            if name not in packed:
                self.infos[name] = info

    def _pieces(self, unit: str) -> dict[str, tuple[str, TensorInfo]]:
        """What a unit is stored in: suffix -> name, info."""
        suffixes = bf12.SUFFIXES if f"{unit}.bf12_low" in self._stored.infos else dfloat11.SUFFIXES
        names = {s.removeprefix("bf12_"): f"{unit}.{s}" for s in suffixes}
        found = self._stored.infos
        return {suffix: (name, found[name]) for suffix, name in names.items() if name in found}

    def _enter(
        self, unit: str, tensors: tuple[str, ...], config: Mapping[str, Any], shapes: Any
    ) -> None:
        """Open a unit and give each of its tensors an info and a place."""
        pieces = self._pieces(unit)
        infos = {suffix: info for suffix, (_, info) in pieces.items()}

        def read(suffix: str, start: int, stop: int) -> Array:
            return self._bytes(pieces[suffix][0], start, stop)

        if "low" in infos:
            matrix = bf12.Matrix(unit, infos, read)
            self._open[unit], splits, known = matrix, [0, matrix.size], [matrix.shape]
        else:
            coded = dfloat11.Unit(unit, infos, read)
            self._open[unit], splits = coded, coded.splits
            if len(splits) != len(tensors) + 1:
                raise _broken(unit, f"{len(splits) - 1} tensors where config.json names {tensors}")
            sizes = [b - a for a, b in pairwise(splits)]
            known = [
                _shape(name, size, shapes, config)
                for name, size in zip(tensors, sizes, strict=True)
            ]
        self.units[unit] = tensors
        for name, first, shape in zip(tensors, splits, known, strict=False):
            self.infos[name] = TensorInfo(shape, torch.bfloat16, 2 * math.prod(shape))
            self._where[name] = unit, first

    def _bytes(self, name: str, start: int, stop: int) -> Array:
        """Bytes start..stop of a stored tensor."""
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
        if known and part == Part(part.stored) and tensor_hash([tensor]) != known:
            raise _broken(part.stored, "it is not what was packed, its sha256 differs")
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
        unit = self._where[name][0]
        pieces = self._pieces(unit)
        total = sum(info.nbytes for _, info in pieces.values())
        whole = sum(self.infos[tensor].nbytes for tensor in self.units[unit])
        layout = "bf12" if "low" in pieces else "df11"
        return layout, total * self.infos[name].nbytes / whole


def open_lossless(folder: Path, config: Mapping[str, Any]) -> LosslessStore:
    """All the files of a packed folder: their names and order mean nothing."""
    files = sorted(folder.glob("*.safetensors"))
    return LosslessStore(files, config, read_manifest(folder) or {})


def pieces(store: Store, name: str) -> Iterator[Tensor]:
    """A tensor some rows at a time, about PIECE numbers: no more of it is ever in memory."""
    shape = store.infos[name].shape
    if not math.prod(shape) or not shape:
        yield store.read(Part(name))
        return
    step = max(1, PIECE // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield store.read(Part(name, rows=(start, min(start + step, shape[0]))))


def tensor_hash(tensors: Iterable[Tensor]) -> str:
    """sha256 (hex) of the bytes of tensors one after the other; hashes one, makes the next."""
    digest, waiting = hashlib.sha256(), None
    with ThreadPoolExecutor(1) as pool:
        for tensor in tensors:
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            if waiting is not None:
                waiting.result()
            waiting = pool.submit(digest.update, data)
    return digest.hexdigest()


def _mapping(manifest: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A mapping inside a manifest, which may come from anywhere: empty if it is not there."""
    value = manifest.get(key)
    return value if isinstance(value, dict) else {}


def disproved(
    store: Store, folder: Path, progress: Callable[[int, int, str], None]
) -> tuple[list[str], int]:
    """Decode every tensor again: what is not what was packed, in words, and how many are.

    Needs no original: the manifest has its hashes. Tensors without one are not counted.
    """
    hashes = _mapping(read_manifest(folder) or {}, HASHES)
    problems = [f"{name} is missing" for name in sorted(hashes.keys() - store.infos.keys())]
    proven = 0
    for at, name in enumerate(store.infos, 1):
        progress(at, len(store.infos), name)
        if name in hashes and tensor_hash(pieces(store, name)) != hashes[name]:
            problems.append(f"{name} does not decode to what was packed")
        elif name in hashes:
            proven += 1
    return problems, proven


def _units(
    infos: Mapping[str, TensorInfo], config: Mapping[str, Any], shapes: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every unit that is stored, and the tensors it stands for."""
    patterns = _patterns(config)
    for name in infos:
        unit, _, suffix = name.rpartition(".")
        if suffix == "bf12_low":
            yield unit, (unit,)
        elif suffix == "luts":
            parts = next((parts for p, parts in patterns if p.fullmatch(unit)), None)
            if parts is None:
                raise _broken(unit, f"no pattern of {DF11_KEY} names it")
            if parts:
                yield unit, tuple(f"{unit}.{part}.weight" for part in parts)
            else:
                yield unit, (unit if unit in shapes else f"{unit}.weight",)


def _patterns(config: Mapping[str, Any]) -> list[tuple[re.Pattern[str], list[str]]]:
    """The patterns of a configuration that may come from a stranger: only harmless ones pass."""
    facts = config.get(DF11_KEY)
    if not isinstance(facts, dict):
        return []
    found = facts.get("pattern_dict")
    version = str(facts.get("version", ""))
    if not version.startswith(("0.2.", "0.3.", "0.4.", "0.5.")):
        fix = "pack the original model with `optim pack`"
        raise OptimError(f"{DF11_KEY}: version {version!r} is not known", fix, USAGE)
    if not isinstance(found, dict) or len(found) > MOST_PATTERNS:
        raise OptimError(f"{DF11_KEY}: pattern_dict is not a usable mapping", None, USAGE)
    made = []
    for text, parts in found.items():
        try:
            check_pattern(f"re:{text}")
        except ValueError as error:
            raise OptimError(f"{DF11_KEY}: {error}", None, USAGE) from None
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise OptimError(f"{DF11_KEY}: {text!r} must name a list of modules", None, USAGE)
        made.append((re.compile(text), parts))
    return made


def _shape(
    name: str, size: int, shapes: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[int, ...]:
    """A packed tensor's shape: the manifest's, or rows of the width the configuration says."""
    known = shapes.get(name)
    if isinstance(known, list) and all(type(n) is int and n > 0 for n in known):
        shape = tuple(known)
    else:
        width = _width(name, text_config(dict(config)))
        shape = (size // width, width) if width else (size,)
    if math.prod(shape) != size:
        raise _broken(name, f"{size} weights do not fit the shape {list(shape)}")
    return shape


def _width(name: str, config: Mapping[str, Any]) -> int:
    """Inputs of a linear or embedding of the published releases; 0 where they are not known."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    inner = config.get("head_dim") or (hidden or 0) // (heads or 1)
    widths = {"down_proj": config.get("intermediate_size"), "o_proj": inner * (heads or 0)}
    width = widths.get(module, hidden)
    return width if type(width) is int and width > 0 else 0


def _broken(name: str, why: str) -> OptimError:
    return OptimError(f"{name} cannot be read: {why}", "fetch or pack the model again", USAGE)
