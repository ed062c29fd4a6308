"""`awq` and `gptq`: integers in words, one width and one group size for the whole model."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.export.exporter import Held, Plan, Progress, Prove, refuse
from optim.export.folder import plain_config, write_folder
from optim.export.integers import (
    OTHERWISE,
    Grid,
    Pieces,
    common_size,
    float_held,
    float_unit,
    grids,
    held,
    integer_unit,
    require_zeros,
    scale_change,
)
from optim.recipes.schema import Export
from optim.runtime.formats.bits import pack_rows
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.foreign import awq, gptq
from optim.runtime.storage.writer import Entries

HALF = torch.float16


@dataclass(frozen=True, slots=True)
class Target:
    """What all linears of a model have in common."""

    bits: int
    size: int
    symmetric: bool


class Words(ABC):
    """See Exporter. What differs between the formats is answered by those below."""

    title: str
    name: str
    suffix = ""
    keys: frozenset[str] = frozenset()

    @abstractmethod
    def target(self, model: PlainView, found: Mapping[str, Grid]) -> Target:
        """What the model will have; OptimError (2) where the format or its readers lack that."""

    @abstractmethod
    def pieces(self, shape: tuple[int, ...], target: Target) -> Entries:
        """What a linear `[out, in]` is stored as."""

    @abstractmethod
    def pack(self, q: Tensor, scale: Tensor, zero: Tensor, target: Target) -> Pieces:
        """The pieces of a linear: uint8 q `[out, in]`, scale and zero `[out, groups]`."""

    @abstractmethod
    def config(self, target: Target) -> dict[str, Any]:
        """Its `quantization_config`."""

    def hold(self, model: PlainView, wanted: Export) -> list[Held]:
        """See Exporter."""
        found = grids(model)
        target = self.target(model, found)
        made = []
        for name in model.tensors:
            if (grid := found.get(name)) is None:
                made.append(float_held(model, name, HALF))
                continue
            require_zeros(model, grid, "use --format mlx, gguf or safetensors")
            form = f"{self.name} {target.bits}-bit g{target.size}"
            change = scale_change(model, grid, HALF)
            made.append(held(grid, form, self.pieces(grid.shape, target), change))
        return made

    def write(self, made: Plan, progress: Progress, prove: Prove | None = None) -> int:
        """See Exporter."""
        found = grids(made.model)
        target = self.target(made.model, found)
        units = [
            integer_unit(
                made,
                name,
                self.pieces(found[name].shape, target),
                self._packer(made.model, found[name], target),
            )
            if name in found
            else float_unit(made, name, HALF)
            for name in made.model.tensors
        ]
        config = plain_config(made) | {"dtype": "float16"}
        config.pop("torch_dtype", None)
        config["quantization_config"] = self.config(target)
        return write_folder(made, units, config, progress, prove)

    def _packer(self, model: PlainView, grid: Grid, target: Target) -> Callable[[], Pieces]:
        def pack() -> Pieces:
            scale, zero, _ = grid.spread(target.size)
            assert zero is not None
            return self.pack(model.integers(grid.name)[0], scale.to(HALF), zero, target)

        return pack


def _divides(model: PlainView, grid: Grid, outputs: int, inputs: int) -> None:
    """Whole words along both sides."""
    for what, size, step in zip(("outputs", "inputs"), grid.shape, (outputs, inputs), strict=True):
        if size % step:
            why = f"{grid.name} has {size} {what}, which {step} does not divide"
            raise refuse(model, why, OTHERWISE)


class AwqWords(Words):
    """AutoAWQ's "gemm": 4 bits with zero points. Fewer bits go into its 4 as they are."""

    title = "AutoAWQ (gemm), for vLLM, SGLang and transformers"
    name = "AWQ"

    def target(self, model: PlainView, found: Mapping[str, Grid]) -> Target:
        """See Words."""
        for grid in found.values():
            if grid.scheme.bits > awq.BITS:
                why = f"{grid.name} has {grid.scheme.bits} bits, AWQ 4"
                raise refuse(model, why, OTHERWISE)
            _divides(model, grid, awq.EIGHT, 1)
        return Target(awq.BITS, common_size(model, found.values()), False)

    def pieces(self, shape: tuple[int, ...], target: Target) -> Entries:
        """See Words."""
        outputs, inputs = shape
        words, count = outputs // awq.EIGHT, inputs // target.size
        return {
            "qweight": (torch.int32, (inputs, words)),
            "qzeros": (torch.int32, (count, words)),
            "scales": (HALF, (count, outputs)),
        }

    def pack(self, q: Tensor, scale: Tensor, zero: Tensor, target: Target) -> Pieces:
        """See Words."""
        scales = scale.T.contiguous()
        return {"qweight": awq.pack(q), "qzeros": awq.pack(zero), "scales": scales}

    def config(self, target: Target) -> dict[str, Any]:
        """See Words."""
        known = {"quant_method": "awq", "bits": target.bits, "group_size": target.size}
        return known | {"zero_point": True, "version": "gemm", "modules_to_not_convert": None}


class GptqWords(Words):
    """GPTQ: version 1 of symmetric weights; version 2, which fewer programs read, of others."""

    title = "GPTQ, for vLLM, SGLang, transformers and GPTQModel"
    name = "GPTQ"

    def target(self, model: PlainView, found: Mapping[str, Grid]) -> Target:
        """See Words."""
        widths = sorted({grid.scheme.bits for grid in found.values()})
        if len(widths) > 1 or widths[0] not in gptq.BITS:
            why = f"it has linears of {' and '.join(map(str, widths))} bits"
            raise refuse(model, f"{why}, GPTQ one of {gptq.BITS} for all", OTHERWISE)
        whole = 32 // math.gcd(32, widths[0])  # values in whole words
        for grid in found.values():
            _divides(model, grid, whole, whole)
        symmetric = all(grid.symmetric for grid in found.values())
        return Target(widths[0], common_size(model, found.values()), symmetric)

    def pieces(self, shape: tuple[int, ...], target: Target) -> Entries:
        """See Words."""
        outputs, inputs = shape
        count = inputs // target.size
        return {
            "qweight": (torch.int32, (inputs * target.bits // 32, outputs)),
            "qzeros": (torch.int32, (count, outputs * target.bits // 32)),
            "scales": (HALF, (count, outputs)),
            "g_idx": (torch.int32, (inputs,)),
        }

    def pack(self, q: Tensor, scale: Tensor, zero: Tensor, target: Target) -> Pieces:
        """See Words."""
        return {
            "qweight": pack_rows(q, target.bits).T.contiguous(),
            "qzeros": gptq.pack_zeros(zero, target.bits, 1 if target.symmetric else 2),
            "scales": scale.T.contiguous(),
            "g_idx": (torch.arange(q.shape[1]) // target.size).to(torch.int32),
        }

    def config(self, target: Target) -> dict[str, Any]:
        """See Words."""
        known = {"quant_method": "gptq", "bits": target.bits, "group_size": target.size}
        version = "gptq" if target.symmetric else "gptq_v2"
        known |= {"desc_act": False, "sym": target.symmetric, "lm_head": False}
        return known | {"checkpoint_format": version, "pack_dtype": "int32"}
