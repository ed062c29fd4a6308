"""Linears of static integers (formats/w4a4.py) as they run, and the norms that feed them codes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.table import FAMILIES
from optim.runtime.decoder.linears.base import Linear
from optim.runtime.decoder.linears.source import Source
from optim.runtime.formats.hadamard import Mixing, mixing
from optim.runtime.formats.static_int import (
    SITE_PARTS,
    Exact,
    Site,
    Static,
    StaticSite,
    TokenSite,
    check_linear,
    plain_product,
    read_config,
)
from optim.runtime.kernels.cpu import static_int


class StepNorm(nn.Module):
    """RMSNorm that emits codes: the step is in its weight. x `[..., n]` -> codes `[..., K]`.

    Floats, or on a GPU int8 from one kernel.
    """

    def __init__(self, site: StaticSite, eps: float) -> None:
        super().__init__()
        self.site, self.eps = site, eps

    def forward(self, x: Tensor) -> Tensor:
        fused, site = fast_norm(x.device.type), self.site
        if fused is not None and not site.exact.positions:
            flat = x.reshape(-1, x.shape[-1])
            made = fused(flat, site.gain, site.offset, site.index, self.eps, site.bits)[0]
            return made.view(*x.shape[:-1], made.shape[1])
        x = x.float()
        codes: Tensor = site(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))[0]
        return codes


class StepLinear(Linear):
    """y `[..., out]` from codes `[..., K]` of a norm, or through its own `site` from x."""

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        bits: int,
        site: Site | None,
        exact: Exact | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`packed`, `scale`, `bias` as stored; `bits` are those of the codes; y is `dtype`."""
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.bits, self.site, self.dtype = bits, site, dtype
        self.exact = exact or Exact()
        self.out_features, self.in_features = packed.shape[0], 2 * packed.shape[1]

    @classmethod
    def claims(cls, source: Source, names: Sequence[str]) -> bool:
        """Nibbles of an artifact of static integers."""
        reader = source.once(static_reader)
        return reader is not None and all(reader.has(name) for name in names)

    @classmethod
    def load(cls, source: Source, names: Sequence[str], below: float | None = None) -> Linear:
        """See Kind. Nothing is left out: the sizes of codes say nothing of thresholds."""
        reader = source.once(static_reader)
        assert reader is not None
        return reader.linear(*names)

    @property
    def nbytes(self) -> int:
        held = (self.packed, self.scale, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def forward(self, x: Tensor) -> Tensor:
        codes, step = (x, None) if self.site is None else self.site(x)
        codes = F.pad(codes, (0, self.in_features - codes.shape[-1]))  # an odd K is packed with a 0
        free = self.exact.positions if codes.dim() == 3 else 0
        if free:
            parts = plain_product(codes[:, :free], self.packed, self.bits), codes[:, free:]
            y = torch.cat((parts[0], product(parts[1], self.packed, self.bits)), 1)
        else:
            y = product(codes, self.packed, self.bits)
        y = y * self.scale
        if step is not None:
            y = y * step
        if self.bias is not None:
            y = y + self.bias
        return y.to(self.dtype)


def product(codes: Tensor, packed: Tensor, bits: int) -> Tensor:
    """Whole codes `[..., K]` as floats, nibbles `[N, K/2]` -> sums float32 `[..., N]`.

    Through the kernel that works here; all of them give the same integers.
    """
    kernel = fast_product(codes.device.type)
    if kernel is None:
        return plain_product(codes, packed, bits)
    flat = codes.reshape(-1, codes.shape[-1]).to(torch.int8)
    return kernel(flat, packed).view(*codes.shape[:-1], packed.shape[0])


@cache
def fast_norm(device: str) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The kernel of a norm that emits codes on this kind of device; None: use torch."""
    if device != "cuda" or fast_product(device) is None:
        return None
    from optim.runtime.kernels.triton import static_int as triton_w4a8

    return triton_w4a8.norm_codes


@cache
def fast_product(device: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """A product of int8 codes `[M, K]` and nibbles on this kind of device; None: use torch's."""
    if device == "cpu":
        return static_int.product if static_int.usable() else None
    if device != "cuda" or not find_spec("triton"):
        return None
    from optim.runtime.kernels.triton import static_int as triton_w4a8

    try:
        triton_w4a8.check()
    except Exception:  # whatever it is, torch's product is taken; `optim doctor` says why
        return None
    return lambda codes, packed: triton_w4a8.whole(codes, packed).float()


@dataclass(slots=True)
class StaticReader:
    """Makes the modules of one artifact, on the device of `source`; outputs are in its dtype."""

    source: Source
    static: Static
    exact: Exact = field(default_factory=Exact)
    _mixes: dict[int, Mixing] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether `name` is a linear of static integers, or a norm that emits them."""
        return self.source.has(f"{name}.weight_packed") or self.source.has(f"{name}.gain")

    def norm(self, name: str, eps: float) -> StepNorm:
        """The norm `name`, which emits codes."""
        site = StaticSite(self._parts(f"{name}."), self.static.bits["norm"], None, self.exact)
        return StepNorm(site.to(self.source.device), eps)

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
            packed, scale, bias, self.static.bits[role], site, self.exact, self.source.dtype
        )
        return linear.to(self.source.device)

    def _role(self, name: str) -> str:
        facts = FAMILIES[self.source.checkpoint.family].decoder
        last = name.rpartition(".")[2]
        roles = {facts.out.rpartition(".")[2]: "out", facts.down.rpartition(".")[2]: "down"}
        return roles.get(last, "norm")

    def _stored(self, name: str) -> dict[str, Tensor]:
        parts = self._read(f"{name}.", ("weight_packed", "weight_scale", "bias"))
        check_linear(name, parts)
        return parts

    def _site(self, name: str, role: str) -> Site | None:
        bits = self.static.bits[role]
        parts = self._parts(f"{name}.input_")
        if self.source.has(f"{name}.input_clip"):
            clip = float(self.source.checkpoint.read(f"{name}.input_clip"))
            width = 2 * self.source.checkpoint.tensors[f"{name}.weight_packed"].shape[1]
            return TokenSite(clip, bits, self._mix(width))
        if not parts:
            return None
        mix = None if role == "norm" else self._mix(parts["gain"].shape[0])
        return StaticSite(parts, bits, mix, self.exact)

    def _mix(self, width: int) -> Mixing:
        if width not in self._mixes:
            self._mixes[width] = mixing(width).to(self.source.device, torch.float32)
        return self._mixes[width]

    def _read(self, stem: str, keys: Sequence[str]) -> dict[str, Tensor]:
        """Those of the tensors `stem` + key that are there, on the CPU."""
        source = self.source
        return {k: source.checkpoint.read(stem + k) for k in keys if source.has(stem + k)}

    def _parts(self, stem: str) -> dict[str, Tensor]:
        parts = self._read(stem, SITE_PARTS)
        if parts and not all(bool(x.isfinite().all()) for x in parts.values()):
            fix = "is the artifact complete?"
            raise OptimError(f"{stem}gain and its kin are not finite numbers", fix, USAGE)
        return parts


def static_reader(source: Source) -> StaticReader | None:
    """The reader of an artifact of static integers; None where `source` is another."""
    static = read_config(source.checkpoint.quantization)
    return None if static is None else StaticReader(source, static)
