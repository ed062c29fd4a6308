"""The side file: what makes a plain checkpoint run sparsely, in one small safetensors file.

It lies beside the weights as `sparsity.safetensors` and carries, under the key `optim` of its
metadata, the method, its options and the fingerprint of the model it was measured on: thresholds of
one model mean nothing to another. Readers that know nothing of it run the checkpoint densely.

    <block>.<site>.threshold   inputs of the site's linears up to this size are skipped
    <block>.gate.threshold     act(gate) up to this size counts as zero (FATReLU, CATS; 0 is exact)
    <block>.prior              float [neurons], or [clusters, neurons]: scores on calibration text
    <block>.norm               float [neurons]: squared column norms of `down`
    <block>.mean               float [neurons]: the mean of a neuron, which stands in for it
    <block>.keep               int64: neurons kept
    centroids                  float [clusters, neurons]: what a prompt is compared with

A site is where linears read one tensor: `qkv`, `out`, `up` (gate and up), `down`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.shape import resolve
from optim.runtime.architecture.table import FAMILIES, Decoder
from optim.runtime.formats.static_int import read_config
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.tensors import SIDE as SIDE
from optim.runtime.system.files import ordinary_mode

REAL = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
VERSION = 1
SITES = ("qkv", "out", "up", "down")
AGAIN = "prune the model again, or delete the file to run it densely"


@dataclass(frozen=True, slots=True)
class Core:
    """A block's fixed neurons: scores and means on calibration text, and how many are kept."""

    keep: int
    prior: Tensor | None
    mean: Tensor | None
    norm: Tensor | None


@dataclass(frozen=True, slots=True)
class BlockSide:
    """What is skipped in one block."""

    thresholds: Mapping[str, float]
    gate: float | None
    core: Core | None


@dataclass(frozen=True, slots=True)
class Side:
    """A whole side file; `options` are the recipe's keys for `method`."""

    method: str
    options: dict[str, Any]
    blocks: tuple[BlockSide, ...]
    centroids: Tensor | None


def linears_of(facts: Decoder) -> dict[str, tuple[str, ...]]:
    """The linears of each site, by their path in the block."""
    return {"qkv": facts.qkv, "out": (facts.out,), "up": facts.up, "down": (facts.down,)}


def require_known(checkpoint: Checkpoint) -> Decoder:
    """How the family's blocks are made.

    Raises OptimError (2) for a family that is not in the table, and for mixtures of experts.
    """
    family = checkpoint.family
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        message = f"{checkpoint.source}: the feed-forward of family {family!r} is not understood"
        raise OptimError(message, f"known families: {known}", USAGE)
    if any(".experts." in name for name in checkpoint.tensors):
        message = f"{checkpoint.source} is a mixture of experts: it is sparse by design already"
        raise OptimError(message, "prune a model with one feed-forward a block", USAGE)
    return FAMILIES[family].decoder


def write_side(
    path: Path, method: str, options: dict[str, Any], model: str, tensors: dict[str, Tensor]
) -> None:
    """Write a side file for the model with the fingerprint `model`."""
    facts = {"version": VERSION, "method": method, "options": options, "model": model}
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # One key: safetensors writes several in any order, and equal runs must give equal bytes.
    save_file(whole, path, metadata={"optim": json.dumps(facts)})
    ordinary_mode(path)


def carry_side(checkpoint: Checkpoint, folder: Path) -> int:
    """Write the side file of `checkpoint` for the model in `folder`, which has the same weights,
    stored otherwise; returns its bytes. OptimError (2) as `read_side`."""
    read_side(checkpoint)
    facts, tensors = _load(checkpoint.folder / SIDE)
    model = open_checkpoint(str(folder)).fingerprint()
    write_side(folder / SIDE, facts["method"], facts["options"], model, tensors)
    return (folder / SIDE).stat().st_size


def read_side(checkpoint: Checkpoint) -> Side | None:
    """The side file that lies beside `checkpoint`; None where there is none.

    Raises OptimError (2) if it is damaged or belongs to another model.
    """
    path = checkpoint.folder / SIDE
    if not path.is_file():
        return None
    from pydantic import TypeAdapter

    from optim.recipes.schema import CoreInfer, Prune

    if read_config(checkpoint.quantization) is not None:
        what = f"{path} is beside static integers, which read all of their inputs"
        raise OptimError(what, "delete the file", USAGE)
    facts, tensors = _load(path)
    known = facts.get("model")
    if known != checkpoint.sampled_fingerprint() and known != checkpoint.fingerprint():
        raise OptimError(f"{path} was made for another model than the one beside it", AGAIN, USAGE)
    if why := _wrong(checkpoint, tensors):
        raise _damaged(path, why)
    try:
        section = TypeAdapter(Prune).validate_python(facts["options"] | {"method": facts["method"]})
        side = make_side(checkpoint, section.method, section.model_dump(), tensors)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise _damaged(path, " ".join(str(error).split())[:200]) from None
    cores = [block.core for block in side.blocks if block.core is not None]
    if cores and not isinstance(section, CoreInfer):
        raise _damaged(path, f"{section.method} keeps no fixed neurons, and the file has some")
    by_norm = isinstance(section, CoreInfer) and section.score == "energy"
    if by_norm and any(core.norm is None for core in cores):
        raise _damaged(path, "a block has no norms of its neurons")
    return side


def _wrong(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a tensor of a side file: found and expected; None if all fit."""
    facts = require_known(checkpoint)
    neurons = resolve(checkpoint.settings, facts).inner
    centroids = tensors.get("centroids")
    kinds = None if centroids is None else tuple(centroids.shape[:1])
    for name, tensor in tensors.items():
        found, leaf = tuple(tensor.shape), name.rpartition(".")[2]
        wanted: tuple[int, ...] = (neurons,)
        if leaf in ("threshold", "keep"):
            wanted = found if tensor.numel() == 1 else (1,)
        elif leaf == "centroids" or (leaf == "prior" and kinds):
            wanted = (*(kinds or (1,)), neurons)
        elif leaf not in ("prior", "mean", "norm"):
            continue
        if found != wanted or (leaf == "centroids" and not tensor.numel()):
            return f"{name} is {list(found)}, expected {list(wanted)}"
        if tensor.is_complex() or not bool(tensor.float().isfinite().all()):
            return f"{name} is not of finite numbers"
        if leaf != "keep" and tensor.dtype not in REAL:
            return f"{name} is of {tensor.dtype}, expected numbers with a fraction"
        value = float(tensor) if tensor.numel() == 1 else 1.0
        if leaf == "keep" and not (value.is_integer() and 1 <= value <= neurons):
            return f"{name} is {value:g}, of {neurons} neurons"
    return None


def make_side(
    checkpoint: Checkpoint, method: str, options: dict[str, Any], tensors: Mapping[str, Tensor]
) -> Side:
    """The side file's content as its readers use it."""
    layers = require_known(checkpoint).layers
    count = int(checkpoint.text_config["num_hidden_layers"])
    blocks = tuple(_block(tensors, f"{layers}.{i}") for i in range(count))
    centroids = tensors.get("centroids")
    return Side(method, options, blocks, None if centroids is None else centroids.float())


def _load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads((file.metadata() or {}).get("optim", "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise _damaged(path, error) from None
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        raise _damaged(path, f"its version is not {VERSION}")
    return facts, tensors


def _damaged(path: Path, why: object) -> OptimError:
    return OptimError(f"{path} is not a side file that can be used: {why}", AGAIN, USAGE)


def _block(tensors: Mapping[str, Tensor], name: str) -> BlockSide:
    thresholds = {
        site: float(tensors[key])
        for site in SITES
        if (key := f"{name}.{site}.threshold") in tensors
    }
    gate = tensors.get(f"{name}.gate.threshold")
    core = None
    if f"{name}.keep" in tensors:
        held = (tensors.get(f"{name}.{key}") for key in ("prior", "mean", "norm"))
        core = Core(int(tensors[f"{name}.keep"]), *held)
    return BlockSide(thresholds, None if gate is None else float(gate), core)
