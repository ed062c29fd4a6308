"""Read static integers (formats/w4a4.py) out of an artifact: for the engine, and to be walked over.

The walk runs transformers' own blocks with our norms and linears set in; the engine its own. Both
get the same modules from here, so what is evaluated is what runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architectures import FAMILIES
from optim.runtime.checkpoint import Checkpoint
from optim.runtime.formats.w4a4 import (
    SITE_PARTS,
    Exact,
    Site,
    Static,
    StaticSite,
    StepLinear,
    StepNorm,
    TokenSite,
    check_linear,
    read_config,
    stream_rotation,
)
from optim.runtime.hadamard import Mixing, mixing
from optim.runtime.plain import PlainView
from optim.runtime.walk import EXPERT_PARTS, Experts, HiddenStates, Walk, is_fused_experts


@dataclass(slots=True)
class StaticReader:
    """Makes the modules of one artifact on `device`; outputs are in `dtype`."""

    checkpoint: Checkpoint
    static: Static
    device: torch.device
    dtype: torch.dtype = torch.float32
    exact: Exact = field(default_factory=Exact)
    _mixes: dict[int, Mixing] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether `name` is a linear of static integers, or a norm that emits them."""
        tensors = self.checkpoint.tensors
        return f"{name}.weight_packed" in tensors or f"{name}.gain" in tensors

    def norm(self, name: str, eps: float) -> StepNorm:
        """The norm `name`, which emits codes."""
        site = StaticSite(self._parts(f"{name}."), self.static.bits["norm"], None, self.exact)
        return StepNorm(site.to(self.device), eps)

    def linear(self, *names: str) -> StepLinear:
        """The linears `names`, which read one input, side by side.

        Raises OptimError (2) naming one whose tensors do not fit.
        """
        role = self._role(names[0])
        stored = [self._stored(name) for name in names]
        packed, scale = (
            torch.cat([s[k] for s in stored]) for k in ("weight_packed", "weight_scale")
        )
        bias = None
        if any("bias" in s for s in stored):
            bias = torch.cat([s.get("bias", torch.zeros_like(s["weight_scale"])) for s in stored])
        site = self._site(names[0], role)
        linear = StepLinear(
            packed, scale, bias, self.static.bits[role], site, self.exact, self.dtype
        )
        return linear.to(self.device)

    def _role(self, name: str) -> str:
        facts = FAMILIES[str(self.checkpoint.text_config["model_type"])].decoder
        last = name.rpartition(".")[2]
        roles = {facts.out.rpartition(".")[2]: "out", facts.down.rpartition(".")[2]: "down"}
        return roles.get(last, "norm")

    def _stored(self, name: str) -> dict[str, Tensor]:
        keys = [k for k in ("weight_packed", "weight_scale", "bias") if self._in(f"{name}.{k}")]
        parts = {key: self.checkpoint.read(f"{name}.{key}") for key in keys}
        check_linear(name, parts)
        return parts

    def _site(self, name: str, role: str) -> Site | None:
        bits = self.static.bits[role]
        parts = self._parts(f"{name}.input_")
        if self._in(f"{name}.input_clip"):
            clip = float(self.checkpoint.read(f"{name}.input_clip"))
            width = 2 * self.checkpoint.tensors[f"{name}.weight_packed"].shape[1]
            return TokenSite(clip, bits, self._mix(width))
        if not parts:
            return None
        mix = None if role == "norm" else self._mix(parts["gain"].shape[0])
        return StaticSite(parts, bits, mix, self.exact)

    def _mix(self, width: int) -> Mixing:
        if width not in self._mixes:
            self._mixes[width] = mixing(width).to(self.device, torch.float32)
        return self._mixes[width]

    def _parts(self, stem: str) -> dict[str, Tensor]:
        parts = {k: self.checkpoint.read(f"{stem}{k}") for k in SITE_PARTS if self._in(stem + k)}
        if parts and not all(bool(x.isfinite().all()) for x in parts.values()):
            fix = "is the artifact complete?"
            raise OptimError(f"{stem}gain and its kin are not finite numbers", fix, USAGE)
        return parts

    def _in(self, name: str) -> bool:
        return name in self.checkpoint.tensors


@dataclass(slots=True)
class StaticWalk:
    """A walk over the blocks of an artifact of static integers."""

    walk: Walk
    static: Static
    rotation: Mixing | None

    def hidden(self, windows: Tensor, path: Path, step: Callable[[int], None]) -> HiddenStates:
        """The last block's output for every window int64 `[n, length]`, as the head wants it."""
        prefix, walk = self.static.prefix, self.walk
        first = torch.tensor(prefix, dtype=torch.int64).expand(len(windows), -1)
        states = walk.embed(torch.cat((first, windows), 1), path.with_name(path.name + ".prefix"))
        walk.release()
        if self.rotation is not None:
            for rows in walk.slices(states):
                states[rows] = self.rotation(states[rows])
        for i in range(len(walk)):
            block = walk.block(i)
            for rows in walk.slices(states):
                states[rows] = walk.run(i, block, states[rows])
            step(i + 1)
        return self._without_prefix(states, path)

    def _without_prefix(self, states: HiddenStates, path: Path) -> HiddenStates:
        count, length, width = states.shape
        first = len(self.static.prefix)
        out = HiddenStates(path, (count, length - first, width), states.dtype)
        for rows in self.walk.slices(states):
            part = states[rows][:, first:]
            out[rows] = part if self.rotation is None else self.rotation.inverse(part)
        states.path.unlink()
        return out


def static_walk(checkpoint: Checkpoint, device: torch.device) -> StaticWalk | None:
    """A walk over `checkpoint` with its integers in place; None if it has another layout."""
    static = read_config(checkpoint.quantization)
    if static is None:
        return None
    exact = Exact(len(static.prefix))
    reader = StaticReader(checkpoint, static, device, torch.float32, exact)
    walk = Walk(PlainView(checkpoint), device, dress=lambda block, path: dress(reader, block, path))
    rotation = None
    if static.rotated:
        rotation = stream_rotation(int(checkpoint.text_config["hidden_size"]))
    return StaticWalk(walk, static, rotation)


def dress(reader: StaticReader, block: nn.Module, prefix: str) -> None:
    """Set the artifact's norms and linears into an empty block of transformers."""
    for name, module in list(block.named_modules()):
        path = prefix + name
        if isinstance(module, nn.Linear) and reader.has(path):
            block.set_submodule(name, reader.linear(path))
        elif is_fused_experts(module):
            block.set_submodule(name, _experts(reader, module, path))
        elif reader.has(path):
            eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
            block.set_submodule(name, reader.norm(path, eps))


def _experts(reader: StaticReader, fused: Any, path: str) -> Experts:
    experts: list[nn.Module] = []
    for e in range(fused.gate_up_proj.shape[0]):
        expert = nn.Module()
        for part in EXPERT_PARTS:
            setattr(expert, part, reader.linear(f"{path}.{e}.{part}"))
        experts.append(expert)
    return Experts(experts, fused.act_fn)
