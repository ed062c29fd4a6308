"""AWQ, GPTQ and MLX as their descriptions say, value by value: nothing of ours packs here."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Integers = tuple[Tensor, Tensor, Tensor]
"""q int64 [out, in], scale fp16 [out, groups], zero int64 [out, groups] (MLX: bias fp16)."""
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def stream(rows: Tensor, bits: int) -> Tensor:
    """[n, m] -> int32 [n, m*bits/32]: value i at bits [i*b, (i+1)*b) of the row's stream."""
    made = np.zeros((rows.shape[0], rows.shape[1] * bits // 32), dtype=np.uint32)
    for i in range(rows.shape[1]):
        column = rows[:, i].numpy().astype(np.uint64)
        word, at = divmod(i * bits, 32)
        shifted = column << np.uint64(at)
        made[:, word] |= (shifted & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        if at + bits > 32:
            made[:, word + 1] |= (shifted >> np.uint64(32)).astype(np.uint32)
    return torch.from_numpy(made.view(np.int32))


def awq(values: Integers, bits: int) -> dict[str, Tensor]:
    q, scale, zero = values

    def words(rows: Tensor) -> Tensor:  # [n, out]
        made = torch.zeros(rows.shape[0], rows.shape[1] // 8, dtype=torch.int64)
        for c in range(rows.shape[1] // 8):
            for i in range(8):
                made[:, c] |= rows[:, 8 * c + AWQ_ORDER[i]] << (4 * i)
        return torch.from_numpy(made.numpy().astype(np.uint32).view(np.int32))

    return {"qweight": words(q.T), "qzeros": words(zero.T), "scales": scale.T.contiguous()}


def gptq(values: Integers, bits: int, version: int = 1) -> dict[str, Tensor]:
    q, scale, zero = values
    stored = (zero - 1) % (1 << bits) if version == 1 else zero
    return {
        "qweight": stream(q, bits).T.contiguous(),
        "qzeros": stream(stored.T, bits),
        "scales": scale.T.contiguous(),
        "g_idx": (torch.arange(q.shape[1]) // (q.shape[1] // scale.shape[1])).to(torch.int32),
    }


def mlx(values: Integers, bits: int) -> dict[str, Tensor]:
    q, scale, bias = values
    return {"weight": stream(q, bits).view(torch.uint32), "scales": scale, "biases": bias}


def draw(outputs: int, inputs: int, bits: int, group: int, seed: int = 0) -> Integers:
    """A random weight of about the size that a small model's have."""
    made = torch.Generator().manual_seed(seed)
    size = inputs if group == -1 else group
    shape, top = (outputs, inputs // size), 1 << bits
    q = torch.randint(0, top, (outputs, inputs), generator=made)
    scale = (torch.rand(shape, generator=made) * 0.1 / top + 0.02 / top).half()
    return q, scale, torch.randint(1, top, shape, generator=made)


def dense(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """What it stands for, float32 [out, in]."""
    size = q.shape[1] // scale.shape[1]
    shift = zero.double().repeat_interleave(size, 1)
    steps = scale.double().repeat_interleave(size, 1)
    if zero.is_floating_point():
        return (q * steps + shift).float()
    return ((q - shift) * steps).float()


def rewrite(
    plain: Path,
    to: Path,
    make: Callable[[str, tuple[int, ...]], tuple[Integers, dict[str, Tensor]] | None],
    config: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The folder `plain` with its matrices replaced by `make`; returns what they stand for."""
    to.mkdir()
    for path in plain.iterdir():
        if path.suffix not in (".safetensors",):
            (to / path.name).write_bytes(path.read_bytes())
    tensors, stood = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        made = make(name, tuple(tensor.shape)) if tensor.dim() == 2 else None
        if made is None:
            tensors[name] = tensor
            continue
        values, pieces = made
        stood[name] = dense(*values)
        path = name.removesuffix(".weight")
        tensors |= {f"{path}.{piece}": value for piece, value in pieces.items()}
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    known = json.loads((plain / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(known | dict(config)))
    return stood
