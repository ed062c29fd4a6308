"""`safetensors`: the plain model that an artifact stands for, as transformers loads it."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from optim.export.exporter import Held, Plan, Progress, Prove
from optim.export.floats import FLOATS, described, float_change
from optim.export.folder import Unit, plain_config, write_folder
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import Export
from optim.runtime.storage.dense_view import PlainView


class Safetensors:
    """Every weight as a float: bf16 unless `type` says otherwise."""

    title = "a plain model folder (safetensors)"
    suffix = ""
    keys = frozenset({"type"})

    def hold(self, model: PlainView, wanted: Export) -> list[Held]:
        """See Exporter."""
        name = wanted.type or "bf16"
        if name not in FLOATS:
            fix = f"--type {', '.join(FLOATS)}, or --format gguf"
            raise OptimError(f"--type {name} is a type of GGUF files alone", fix, USAGE)
        return [_held(model, tensor, name) for tensor in model.tensors]

    def write(self, made: Plan, progress: Progress, prove: Prove | None = None) -> int:
        """See Exporter."""
        dtype = FLOATS[made.wanted.type or "bf16"]
        units = [_unit(made, held, dtype) for held in made.held]
        config = plain_config(made) | {"dtype": str(dtype).removeprefix("torch.")}
        config.pop("torch_dtype", None)
        return write_folder(made, units, config, progress, prove)


def _held(model: PlainView, tensor: str, name: str) -> Held:
    info, scheme, dtype = model.info(tensor), model.scheme(tensor), FLOATS[name]
    change = float_change(info.dtype, scheme, dtype)
    nbytes = math.prod(info.shape) * dtype.itemsize
    return Held(tensor, info.shape, described(model, tensor), name, nbytes, change)


def _unit(made: Plan, held: Held, dtype: torch.dtype) -> Unit:
    stored = made.checkpoint.disk_name(held.name)

    def make() -> Iterator[tuple[str, Tensor]]:
        yield stored, made.model.read(held.name).to(dtype)

    return Unit({stored: (dtype, held.shape)}, make)
