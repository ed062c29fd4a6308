"""Changes that make a file untrue: of JSON, of tensors, of a safetensors header, of bytes."""

import json
import struct
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

WORDS = ("", "x", "cuda", "\x1b[31m", "\x9b2J", "[/x]", "a" * 5000, "../../x", "\ud800", "bfloat16")
NUMBERS: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 5, 7, 16, 17, 64, 4096, 2**31, 2**32, 2**63, 2**64, 10**30, True),
    *(0.5, -0.5, 8.0, 1e300, float("inf"), float("-inf"), float("nan")),
)
ODD: tuple[Any, ...] = (None, [], {}, [[]], [None], {"a": 1}, {"a": {"b": [1]}}, [1, 2, 3])
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64),
    *(torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn),
)


def value(draw: Random) -> Any:
    """Something that is not what it should be."""
    return draw.choice(draw.choice((WORDS, NUMBERS, NUMBERS, ODD)))


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every container and key of a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [data]
    while waiting:
        inside = waiting.pop()
        if isinstance(inside, dict | list):
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            found += [(inside, key) for key in keys]
            waiting += [inside[key] for key in keys]
    return found


def lie(data: Any, draw: Random, count: int = 1, added: tuple[str, ...] = ()) -> str:
    """Change `count` values of a JSON value in place; says what."""
    said = []
    for _ in range(count):
        if added and isinstance(data, dict) and draw.random() < 0.3:
            inside, key = data, draw.choice(added)
        else:
            found = places(data)
            if not found:
                break
            inside, key = draw.choice(found)
        kind = draw.random()
        if kind < 0.15 and key in (inside if isinstance(inside, dict) else range(len(inside))):
            del inside[key]
            said.append(f"-{key}")
            continue
        new = deepcopy(value(draw))
        inside[key] = new
        said.append(f"{key}={new!r}"[:80])
    return "; ".join(said)


def write_json(path: Path, data: Any) -> None:
    """JSON with whatever Python's writer lets through: NaN, infinity, lone surrogates."""
    path.write_text(json.dumps(data), encoding="utf-8")


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118


def tensor_lie(tensors: dict[str, Tensor], draw: Random) -> str:
    """Change one tensor of a dictionary in place; says what."""
    name = draw.choice(sorted(tensors))
    old = tensors[name]
    kind = draw.randrange(8)
    if kind == 0:
        del tensors[name]
        return f"-{name}"
    if kind == 1:
        other = draw.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), old.clone()
        return f"{name} <-> {other}"
    if kind == 2:
        tensors[f"{name}{draw.choice(('.x', '2', '.weight', '.luts'))}"] = old.clone()
        return f"+ like {name}"
    if kind == 3:
        tensors[name] = old.to(new := draw.choice(DTYPES))
        return f"{name} {new}"
    if kind in (4, 5):
        shape = list(old.shape)
        size = draw.choice((0, 1, 2, 3, 5, 8, 17, 33, 64, 100, 129, 512))
        if shape and kind == 4:
            shape[draw.randrange(len(shape))] = size
        else:
            shape = draw.choice(([], [size], [size, 1], [1, size], [2, 2, 2], [*shape, 1]))
        tensors[name] = torch.zeros(shape).to(old.dtype)
        return f"{name} {list(old.shape)} -> {shape}"
    flat = old.clone().reshape(-1)
    if flat.numel():
        strange = draw.choice((float("nan"), float("inf"), -1.0, 0.0, 1e30, 255.0, -129.0))
        if not flat.is_floating_point():
            strange = draw.choice((-1, 0, 1, 127, -128, 255, 10**6, -(2**31), 2**31 - 1))
        where = slice(None) if draw.random() < 0.3 else draw.randrange(flat.numel())
        kind_of = torch.float64 if old.is_floating_point() else torch.int64
        wide = torch.tensor(strange, dtype=kind_of)
        flat[where] = wide.to(old.dtype)
        tensors[name] = flat.reshape(old.shape)
        return f"{name} has {strange}"
    return f"{name} is empty"


def lie_in_tensors(path: Path, draw: Random, count: int = 1) -> str:
    """Change `count` tensors of a safetensors file."""
    tensors, metadata = load(path)
    said = [tensor_lie(tensors, draw) for _ in range(count) if tensors]
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata or None)
    return "; ".join(said)


def header_lie(path: Path, draw: Random) -> str:
    """Change the header of a safetensors file, or its length."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    head, data = raw[8 : 8 + size], raw[8 + size :]
    kind = draw.randrange(4)
    if kind == 0:
        cut = draw.randrange(len(raw))
        path.write_bytes(raw[:cut])
        return f"cut at {cut}"
    if kind == 1:
        length = draw.choice((0, 1, 7, size - 1, size + 1, len(raw), 2**31, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", length) + head + data)
        return f"header of {length}"
    if kind == 2:
        flipped = bytearray(head)
        for _ in range(draw.randrange(1, 4)):
            flipped[draw.randrange(len(flipped))] = draw.randrange(256)
        path.write_bytes(struct.pack("<Q", size) + bytes(flipped) + data)
        return "header flips"
    entries = json.loads(head)
    said = lie(entries, draw, draw.randrange(1, 3))
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return said


def flip(path: Path, draw: Random, most: int = 4096) -> str:
    """Change some bytes, or the number that begins at one of them."""
    raw = bytearray(path.read_bytes())
    said = []
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(min(len(raw), most))
        new = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        if draw.random() < 0.5:
            raw[at] = new
        else:
            number = draw.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, draw.randrange(2**16)))
            raw[at : at + 8] = struct.pack("<Q", number)
        said.append(str(at))
    path.write_bytes(bytes(raw))
    return f"bytes {', '.join(said)}"
