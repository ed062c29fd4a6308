"""Weight files, read one tensor at a time: safetensors and `pytorch_model.bin`, single or sharded.

The safetensors header is 8 bytes of little-endian length, then JSON: name -> dtype, shape and byte
range. It is read and checked against the file's size at open, so a damaged download fails before
any work. Bytes are read into a fresh tensor, not mapped: a mapped page stays in resident memory.
Format: https://huggingface.co/docs/safetensors (format).
"""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.system.files import AGAIN, MAX_JSON, damaged, load_json

INDEX = "model.safetensors.index.json"
OWN_INDEX = "optim.safetensors.index.json"
"""Of layouts that others would misread: a program that looks for INDEX finds no weights at all."""
OWN_SINGLE = "model-00001-of-00001.safetensors"  # the one file of such a layout, for that reason
INDEXES = (INDEX, "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
SIDE = "sparsity.safetensors"
"""Beside the weights: what may be skipped (sparsity/side_file.py)."""
SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")
MAX_DIMS = 16
MAX_SIZE = 2**63

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a tensor will be when it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor, or one matrix of a stack [experts, out, in], or some rows of that."""

    stored: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part, given that of the stored tensor."""
        shape = stored if self.expert is None else stored[1:]
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])

    def span(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """First element and number of elements: a part is always contiguous."""
        shape = stored if self.expert is None else stored[1:]
        first = (self.expert or 0) * math.prod(shape)
        if self.rows is None:
            return first, math.prod(shape)
        row = math.prod(shape[1:])
        return first + self.rows[0] * row, (self.rows[1] - self.rows[0]) * row


class Store(Protocol):
    """Where tensors come from: their infos by stored name, and a lazy `read`."""

    files: list[Path]
    infos: dict[str, TensorInfo]

    def read(self, part: Part) -> Tensor: ...

    def held(self, name: str) -> tuple[str, float] | None:
        """Format and bytes of a tensor that is stored otherwise than it is read; else None."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name is given twice")
    return names


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries of a safetensors header and the offset of its data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON):
            damaged(path, f"a header of {length} bytes in a file of {size}")
        try:
            entries = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            damaged(path, f"its header is not valid JSON ({error})")
    if not isinstance(entries, dict):
        damaged(path, "its header is not a JSON object")
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _entry(path: Path, name: str, entry: Any, room: int) -> tuple[TensorInfo, int]:
    """One checked header entry: its info, and where its bytes begin in the data."""
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not isinstance(entry["shape"], list):
            raise TypeError
        numbers_ok = all(type(n) is int and 0 <= n < MAX_SIZE for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        damaged(path, f"the entry of {name} is malformed")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise OptimError(f"{path}: {name} has the unknown dtype {kind!r}", code=USAGE)
    if len(shape) > MAX_DIMS:
        damaged(path, f"{name} has {len(shape)} dimensions")
    nbytes = math.prod(shape) * DTYPES[kind].itemsize if numbers_ok else -1
    if not numbers_ok or end - begin != nbytes:
        damaged(path, f"{name} has shape {list(shape)} but bytes {begin} to {end}")
    if end > room:
        damaged(path, f"{name} ends {end - room} bytes after the end: the file is truncated")
    return TensorInfo(shape, DTYPES[kind], nbytes), begin


class SafetensorsFiles:
    """The tensors of some safetensors files; OptimError (2) at open if a header cannot be true."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self.infos: dict[str, TensorInfo] = {}
        self._where: dict[str, tuple[Path, int]] = {}
        for path in self.files:
            try:
                self._open(path)
            except OSError as error:
                raise OptimError(f"cannot read {path}: {error.strerror}", code=USAGE) from None

    def _open(self, path: Path) -> None:
        entries, data = _header(path)
        room, end = path.stat().st_size - data, 0
        found = {name: _entry(path, name, entry, room) for name, entry in entries.items()}
        for name, (info, begin) in sorted(found.items(), key=lambda item: item[1][1]):
            if begin < end:
                damaged(path, f"the bytes of {name} overlap another tensor's")
            end = begin + info.nbytes
            if name in self.infos:
                damaged(path, f"{name} is also in {self._where[name][0].name}")
            self.infos[name], self._where[name] = info, (path, data + begin)

    def held(self, name: str) -> None:
        """Every tensor is stored as it is read."""

    def read(self, part: Part) -> Tensor:
        """The tensor, on the CPU, in its stored dtype."""
        shape = self.infos[part.stored].shape
        first, count = part.span(shape)
        return self.flat(part.stored, first, first + count).view(part.shape(shape))

    def flat(self, name: str, first: int, end: int) -> Tensor:
        """The elements first..end of a tensor, whatever its shape."""
        info, (path, begin) = self.infos[name], self._where[name]
        count = end - first
        buffer = torch.empty(count * info.dtype.itemsize, dtype=torch.uint8)
        try:
            with path.open("rb") as file:
                file.seek(begin + first * info.dtype.itemsize)
                got = file.readinto(buffer.numpy().data)
        except OSError as error:
            raise OptimError(f"cannot read {name} from {path}: {error}", AGAIN, USAGE) from None
        if got != buffer.numel():
            damaged(path, f"the bytes of {name} end too early")
        return buffer.view(info.dtype)


class TorchFiles:
    """The tensors of `pytorch_model.bin` files: `weights_only`, so no pickle is ever executed."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self.infos: dict[str, TensorInfo] = {}
        self._where: dict[str, Path] = {}
        self._open: tuple[Path, dict[str, Tensor]] | None = None
        for path in self.files:
            for name, tensor in self._load(path).items():
                if name in self.infos:
                    damaged(path, f"{name} is also in {self._where[name].name}")
                size = tensor.numel() * tensor.element_size()
                self.infos[name] = TensorInfo(tuple(tensor.shape), tensor.dtype, size)
                self._where[name] = path

    def _load(self, path: Path) -> dict[str, Tensor]:
        """The mapped tensors of one file; only the last file stays open."""
        if self._open and self._open[0] == path:
            return self._open[1]
        _check_zip(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise OptimError(
                f"{path} holds more than tensors; its pickle is not executed",
                "use the safetensors files of the model",
                USAGE,
            ) from None
        except Exception as error:  # a pickle of odd content raises nearly anything
            damaged(path, str(error).partition("\n")[0] or type(error).__name__)
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            damaged(path, "it does not hold a dictionary of tensors")
        for name, tensor in state.items():
            if not _is_plain(tensor):
                damaged(path, f"{name} is not a plain tensor that lies within its file")
        self._open = (path, state)
        return state

    def held(self, name: str) -> None:
        """Every tensor is stored as it is read."""

    def read(self, part: Part) -> Tensor:
        """The tensor, copied out of the mapping."""
        tensor = self._load(self._where[part.stored])[part.stored].detach()
        tensor = tensor if part.expert is None else tensor[part.expert]
        return tensor[slice(*part.rows)].clone() if part.rows else tensor.contiguous().clone()


def _check_zip(path: Path) -> None:
    """Refuse a file that is no zip archive, or whose parts grow as they are read."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except Exception as error:  # zipfile raises what struct and codecs do, too
        damaged(path, f"it is not a torch zip file ({error})")
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED or part.file_size > part.compress_size:
            damaged(path, f"its part {part.filename} is compressed")
        if part.filename.endswith(".pkl") and part.file_size > MAX_JSON:
            damaged(path, f"its part {part.filename} is larger than {MAX_JSON >> 20} MB")


def _is_plain(tensor: Any) -> bool:
    """Whether it is a dense tensor on the CPU whose last element is within its storage."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return False
    if tensor.device.type != "cpu" or tensor.dtype not in DTYPES.values():
        return False
    if not tensor.numel():
        return True
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    if tensor.numel() * tensor.itemsize > max(tensor.untyped_storage().nbytes(), 1):
        return False  # a view that repeats itself: a terabyte of one stored number
    return min(tensor.stride(), default=0) >= 0 and (last + 1) * tensor.itemsize <= int(
        tensor.untyped_storage().nbytes()
    )


def _indexed(folder: Path, index: Path) -> tuple[list[Path], set[str]]:
    """Shards and tensor names of an index; a shard is a plain file name inside the folder."""
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        damaged(index, "it has no weight_map")
    names = sorted({str(shard) for shard in weight_map.values()})
    for name in names:
        plain = Path(name).name == name and "\\" not in name and name not in ("", ".", "..")
        if not plain or len(name) > 100:
            damaged(index, f"it names the shard {name[:100]!r}, which is no file of this folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise OptimError(f"{folder} lacks the shard {missing[0]}{more}", AGAIN, USAGE)
    return [folder / name for name in names], set(weight_map)


def _unindexed(folder: Path) -> list[Path]:
    shards = sorted(path for path in folder.glob("model-*.safetensors") if SHARD.match(path.name))
    for path in shards:
        total = int(SHARD.match(path.name).group(1))  # type: ignore[union-attr]
        if total != len(shards):
            raise OptimError(f"{folder} has {len(shards)} of {total} shards", AGAIN, USAGE)
    return shards


def _open_files(files: list[Path]) -> Store:
    return TorchFiles(files) if files[0].suffix == ".bin" else SafetensorsFiles(files)


def _open_indexed(folder: Path, index: Path) -> Store:
    files, names = _indexed(folder, index)
    store = _open_files(files)
    if lost := sorted(names - set(store.infos)):
        damaged(index, f"it names {lost[0]}, which no shard has")
    return store


def open_files(folder: Path) -> Store:
    """The weights of a Hugging Face folder; OptimError (2) if they are missing or damaged."""
    if (folder / OWN_INDEX).is_file():
        return _open_indexed(folder, folder / OWN_INDEX)
    for index, single in zip(INDEXES, SINGLES, strict=True):
        if (folder / single).is_file():  # before an index beside it, as transformers does
            return _open_files([folder / single])
        if (folder / index).is_file():
            return _open_indexed(folder, folder / index)
        if (folder / single).is_file():
            return _open_files([folder / single])
        if single == SINGLES[0] and (shards := _unindexed(folder)):
            return _open_files(shards)
    raise OptimError(
        f"{folder} holds no model.safetensors or pytorch_model.bin",
        "give the folder of a Hugging Face model, a .gguf file, a hub id, or `demo`",
        USAGE,
    )
