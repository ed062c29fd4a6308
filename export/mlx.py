"""`mlx`: affine integers of 2, 3, 4, 5, 6 or 8 bits, for mlx-lm and LM Studio."""

from typing import Any

import torch
from torch import Tensor

from optim.export.exporter import Held, Plan, Progress, Prove, refuse
from optim.export.folder import Unit, plain_config, write_folder
from optim.export.integers import (
    Grid,
    Pieces,
    common_size,
    float_held,
    float_unit,
    grids,
    held,
    integer_unit,
    offset_change,
    scale_change,
)
from optim.recipes.schema import Export
from optim.runtime.formats.bits import pack_rows
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.writer import Entries

HALF = torch.float16
EXPERTS = ".experts."


class Mlx:
    """See Exporter. Each module may have bits and a group of its own; embeddings stay packed."""

    title = "MLX (affine), for mlx-lm and LM Studio"
    suffix = ""
    keys: frozenset[str] = frozenset()

    def hold(self, model: PlainView, wanted: Export) -> list[Held]:
        """See Exporter."""
        found = _grids(model)
        made = []
        for name in model.tensors:
            if (grid := found.get(name)) is None:
                made.append(float_held(model, name, HALF))
                continue
            changes = scale_change(model, grid, HALF), offset_change(grid, HALF)
            size = common_size(model, [grid])
            form = f"MLX {grid.scheme.bits}-bit g{size}"
            made.append(held(grid, form, _pieces(grid, size), "; ".join(filter(None, changes))))
        return made

    def write(self, made: Plan, progress: Progress, prove: Prove | None = None) -> int:
        """See Exporter."""
        found = _grids(made.model)
        units, modules = [], {}
        for name in made.model.tensors:
            if (grid := found.get(name)) is None:
                units.append(float_unit(made, name, HALF))
                continue
            size = common_size(made.model, [grid])
            stem = made.checkpoint.disk_name(name).removesuffix(".weight")
            modules[stem] = {"group_size": size, "bits": grid.scheme.bits}
            units.append(_unit(made, grid, size))
        config = plain_config(made) | {"dtype": "float16"}
        config.pop("torch_dtype", None)
        return write_folder(made, units, _with(config, modules), progress, prove)


def _grids(model: PlainView) -> dict[str, Grid]:
    found = grids(model, everywhere=True)
    for name, grid in found.items():
        if EXPERTS in name:
            fix = "use --format gguf, which stacks them, or safetensors"
            raise refuse(model, "its experts are stacked in MLX, which is not written", fix)
        if grid.shape[1] * grid.scheme.bits % 32:
            fix = "use --format safetensors"
            raise refuse(model, f"the {grid.shape[1]} inputs of {name} fill no whole words", fix)
    return found


def _pieces(grid: Grid, size: int) -> Entries:
    outputs, inputs = grid.shape
    shape = (outputs, inputs // size)
    words = (outputs, inputs * grid.scheme.bits // 32)
    return {"weight": (torch.uint32, words), "scales": (HALF, shape), "biases": (HALF, shape)}


def _unit(made: Plan, grid: Grid, size: int) -> Unit:
    def pack() -> Pieces:
        scale, zero, offset = grid.spread(size)
        q = made.model.integers(grid.name)[0]
        return {
            "weight": pack_rows(q, grid.scheme.bits).view(torch.uint32),
            "scales": scale.to(HALF),
            "biases": _offsets(scale, zero, offset).to(HALF),
        }

    return integer_unit(made, grid.name, _pieces(grid, size), pack)


def _offsets(scale: Tensor, zero: Tensor | None, offset: Tensor | None) -> Tensor:
    if offset is not None:
        return offset
    assert zero is not None
    return -zero.float() * scale.float()


def _with(config: dict[str, Any], modules: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The configuration with what most modules have, and by their names what others do."""
    kinds = list(modules.values())
    most = max(kinds, key=kinds.count)
    own = {name: kind for name, kind in modules.items() if kind != most}
    block = most | own
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and "rope_theta" not in config:
        config["rope_theta"] = rope["rope_theta"]  # where mlx-lm looks for it
    return config | {"quantization": block, "quantization_config": block}
