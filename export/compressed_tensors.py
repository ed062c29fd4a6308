"""`compressed-tensors`: pack-quantized integers from any source that has some, for vLLM."""

import torch

from optim.export.exporter import Held, Plan, Progress, Prove, refuse
from optim.export.folder import Unit, plain_config, write_folder
from optim.export.integers import (
    Grid,
    Pieces,
    float_held,
    float_unit,
    grids,
    held,
    integer_unit,
    require_zeros,
)
from optim.recipes.schema import Export
from optim.runtime.formats.bits import words
from optim.runtime.formats.pack_quantized import pack, write_config
from optim.runtime.formats.schemes import Scheme
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.writer import Entries

BITS = (2, 3, 4, 8)  # what its readers have kernels for


class CompressedTensors:
    """See Exporter. Scales and plain weights keep their types."""

    title = "compressed-tensors (pack-quantized), for vLLM, SGLang and transformers"
    suffix = ""
    keys: frozenset[str] = frozenset()

    def hold(self, model: PlainView, wanted: Export) -> list[Held]:
        """See Exporter."""
        found = grids(model)
        made = []
        for name in model.tensors:
            if (grid := found.get(name)) is None:
                made.append(float_held(model, name, None))
                continue
            scheme = _scheme(model, grid)
            made.append(held(grid, str(scheme), _pieces(grid, scheme), ""))
        return made

    def write(self, made: Plan, progress: Progress, prove: Prove | None = None) -> int:
        """See Exporter."""
        found = grids(made.model)
        units, schemes, plain = [], dict[str, Scheme](), list[str]()
        for name in made.model.tensors:
            stem = made.checkpoint.disk_name(name).removesuffix(".weight")
            if (grid := found.get(name)) is not None:
                schemes[stem] = _scheme(made.model, grid)
                units.append(_unit(made, grid, schemes[stem]))
                continue
            units.append(float_unit(made, name, None))
            if name.endswith(".weight") and len(made.model.info(name).shape) == 2:
                plain.append(stem)
        ignored = {*plain, made.checkpoint.disk_name("lm_head.weight").removesuffix(".weight")}
        config = plain_config(made)
        config["quantization_config"] = write_config(schemes, ignored)
        return write_folder(made, units, config, progress, prove)


def _scheme(model: PlainView, grid: Grid) -> Scheme:
    if grid.scheme.bits not in BITS:
        why = f"{grid.name} has {grid.scheme.bits} bits, which its readers do not"
        raise refuse(model, why, "use --format mlx or safetensors")
    require_zeros(model, grid, "use --format mlx, gguf or safetensors")
    return Scheme(grid.scheme.bits, grid.scheme.group_size, grid.symmetric)


def _pieces(grid: Grid, scheme: Scheme) -> Entries:
    (outputs, inputs), count = grid.shape, grid.scale.shape[1]
    made: Entries = {
        "weight_packed": (torch.int32, (outputs, words(inputs, scheme.bits))),
        "weight_scale": (grid.scale.dtype, (outputs, count)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        zeros = (words(outputs, scheme.bits), count)
        made = {**made, "weight_zero_point": (torch.int32, zeros)}
    return made


def _unit(made: Plan, grid: Grid, scheme: Scheme) -> Unit:
    def packed() -> Pieces:
        q = made.model.integers(grid.name)[0]
        return pack(q, grid.scale, None if scheme.symmetric else grid.zero, scheme)

    return integer_unit(made, grid.name, _pieces(grid, scheme), packed)
