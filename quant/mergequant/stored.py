"""From a recipe to static integers on disk: the solver, its prefix, the stored tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optim.quant.mergequant.prefix import find_prefix
from optim.quant.mergequant.solver import Form, MergeSolver
from optim.recipes.schema import MergeQuant
from optim.runtime.decoder.linears.static_int import StepLinear, StepNorm
from optim.runtime.formats.pack_quantized import Scheme
from optim.runtime.formats.static_int import (
    SITE_PARTS,
    Site,
    Static,
    StaticSite,
    stream_rotation,
)
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.walk.walk import StoredLinear, Walk

PREFIX = "prefix.json"


def merge_solver(
    recipe: MergeQuant, checkpoint: Checkpoint, walk: Walk, windows: Tensor, folder: Path
) -> tuple[MergeSolver, list[int], Tensor]:
    """The solver of a recipe, its prefix (found once, then kept in `folder`), and what it reads.

    That is the windows with the prefix before each: it takes the place of the BOS they begin with.
    """
    mixture = any(".experts." in name for name in checkpoint.tensors)
    prefix: list[int] = []
    if recipe.prefix and not mixture:
        begin = list(checkpoint.tokenizer().begin)
        begun = bool(begin) and windows[:, : len(begin)].eq(torch.tensor(begin)).all()
        text = windows[:, len(begin) :] if begun else windows
        prefix = _prefix(checkpoint, text, folder, begin if begun else [])
        windows = _with_prefix(prefix, text)
    width = int(checkpoint.text_config["hidden_size"])
    tokens = windows.numel()
    widest = max(info.shape[-1] for name, info in checkpoint.tensors.items() if ".layers." in name)
    form = Form(
        bits=recipe.act_bits,
        down_bits=recipe.down_bits,
        rotate=recipe.rotate,
        damping=recipe.damping if tokens >= widest else max(recipe.damping, 0.1),
        **_ends(recipe),
    )
    rotation = stream_rotation(width) if recipe.rotate else None
    return MergeSolver(walk, form, rotation, len(prefix)), prefix, windows


def _ends(recipe: MergeQuant) -> dict[str, Any]:
    """How o_proj and down_proj are read: without a prefix, each token has to give its step."""
    kinds = _kinds(recipe)
    return {"out": kinds["out"], "down": kinds["down"]}


def _kinds(recipe: MergeQuant) -> dict[str, str]:
    if recipe.prefix or recipe.act_bits == 8:
        return {"out": "channel", "down": "channel"}
    return {"out": "token", "down": "token"}


def _prefix(checkpoint: Checkpoint, windows: Tensor, folder: Path, begin: list[int]) -> list[int]:
    path = folder / PREFIX
    if not path.is_file():
        found = find_prefix(checkpoint, windows, folder / "prefix-states", begin)
        path.write_text(json.dumps(found))
    tokens: list[int] = json.loads(path.read_text())
    return tokens


def _with_prefix(prefix: list[int], windows: Tensor) -> Tensor:
    """Each window with the prefix before it."""
    first = torch.tensor(prefix, dtype=torch.int64).expand(len(windows), -1)
    return torch.cat((first, windows), 1)


def static_config(
    recipe: MergeQuant, schemes: Mapping[str, Scheme], prefix: list[int]
) -> dict[str, Any]:
    """The artifact's `quantization_config`."""
    mixture = any(".experts." in name for name in schemes)
    kinds = {k: "token" if v == "token" else "static" for k, v in _kinds(recipe).items()}
    if mixture:
        kinds["down"] = "token"
    bits = {"norm": recipe.act_bits, "out": recipe.act_bits, "down": recipe.down_bits}
    kinds = {"norm": "static"} | kinds
    return Static(bits, kinds, recipe.rotate, tuple(prefix)).config()


def static_tensors(block: nn.Module, prefix: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What is stored of a block of static integers, by published name."""
    tensors: dict[str, Tensor] = {}
    owned: set[str] = set()
    for name, module in block.named_modules():
        if isinstance(module, StepNorm):
            stored = checkpoint.disk_name(f"{prefix}{name}.weight").removesuffix(".weight")
            tensors |= {f"{stored}.{k}": v for k, v in _site(module.site).items()}
        elif isinstance(module, StepLinear):
            stored = checkpoint.disk_name(f"{prefix}{name}.weight").removesuffix(".weight")
            tensors |= {f"{stored}.{key}": value for key, value in _linear(module).items()}
        elif isinstance(module, StoredLinear):
            owned |= {f"{name}.weight", f"{name}.bias"}
            stored = checkpoint.disk_name(f"{prefix}{name}.weight").removesuffix(".weight")
            tensors[f"{stored}.weight"] = module.dense().cpu()
            bias = module.dense_bias()
            if bias is not None:
                tensors[f"{stored}.bias"] = bias.cpu()
    for name, parameter in block.named_parameters():
        if name not in owned:
            tensors[checkpoint.disk_name(prefix + name)] = parameter.detach().float().cpu()
    return {
        name: tensor.clone().contiguous() for name, tensor in tensors.items()
    }  # experts share a site


def _linear(linear: StepLinear) -> dict[str, Tensor]:
    parts = {"weight_packed": linear.packed, "weight_scale": linear.scale}
    if linear.bias is not None:
        parts["bias"] = linear.bias
    if linear.site is not None:
        parts |= {f"input_{key}": value for key, value in _site(linear.site).items()}
    return {key: value.cpu() for key, value in parts.items()}


def _site(site: Site) -> dict[str, Tensor]:
    if not isinstance(site, StaticSite):
        return {"clip": torch.tensor([site.clip])}
    found = {key: getattr(site, key) for key in SITE_PARTS}
    return {key: value.cpu() for key, value in found.items() if value is not None}
