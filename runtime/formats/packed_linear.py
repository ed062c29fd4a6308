"""A linear that stays packed: holds the stored tensors, then the layout of this machine's kernel.

The first call (or `prepare`) repacks the weight once for the device it is on and lets go of the
stored tensors; from then on nothing dense exists but what a kernel unpacks for a moment.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.formats.packed import SUFFIXES, pack, unpack
from optim.runtime.formats.schemes import Scheme


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed `[out, in]`; x `[..., in]` of any float dtype, y of the same."""

    weight_packed: Tensor | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    weight_shape: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        scheme: Scheme,
        bias: Tensor | None = None,
        name: str = "weight",
    ) -> None:
        """`tensors` as `packed.pack` makes them; `bias` `[out]`; `name` for messages."""
        super().__init__()
        self.scheme, self.name = scheme, name
        for key in SUFFIXES:
            self.register_buffer(key, tensors.get(key))
        self.register_buffer("bias", bias)
        self.kernel: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes held for weight and bias, and read for one token."""
        if self.kernel is not None:
            return int(self.kernel.nbytes)
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            self.prepare()
        y: Tensor = self.kernel(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
        return (y if y.dtype == x.dtype else y.to(x.dtype)).view(*x.shape[:-1], y.shape[1])

    def prepare(self, kernel: ModuleType | None = None) -> "PackedLinear":
        """Repacks for `kernel` (default: the best one for the device) and frees the stored form.

        Raises OptimError naming the tensor if the stored form is corrupt.
        """
        q, scale, zero = unpack(self.stored(), self.scheme, self.name)
        for key in SUFFIXES:
            setattr(self, key, None)
        chosen = kernel or choose(self.scheme, q.device)
        self.kernel = chosen.Weight(q, scale, zero, self.scheme, self.bias)
        self.bias = None
        return self

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors. Only before `prepare`."""
        return {name: tensor for name, tensor in self.named_buffers() if name in SUFFIXES}


def fuse(parts: Sequence[PackedLinear]) -> PackedLinear:
    """Linears of one scheme that read one input, as one: outputs side by side.

    `parts` must not be prepared yet. Raises OptimError (2) where schemes, inputs or the presence of
    a bias differ.
    """
    schemes = {part.scheme for part in parts}
    if len(schemes) != 1 or len({part.bias is None for part in parts}) != 1:
        kinds = ", ".join(sorted(map(str, schemes)))
        raise OptimError(f"linears stored in different ways cannot be joined: {kinds}", None, USAGE)
    name = "+".join(part.name for part in parts)
    biases = [part.bias for part in parts if part.bias is not None]
    bias = torch.cat(biases) if biases else None
    if (whole := _side_by_side([part.stored() for part in parts], parts[0].scheme)) is not None:
        return PackedLinear(whole, parts[0].scheme, bias, name)
    opened = [unpack(part.stored(), part.scheme, part.name) for part in parts]
    if len({q.shape[1] for q, _, _ in opened}) != 1:
        raise OptimError("linears with different inputs cannot be joined", None, USAGE)
    q, scale = torch.cat([q for q, _, _ in opened]), torch.cat([s for _, s, _ in opened])
    zeros = [zero for _, _, zero in opened if zero is not None]
    tensors = pack(q, scale, torch.cat(zeros) if zeros else None, parts[0].scheme)
    return PackedLinear(tensors, parts[0].scheme, bias, name)


def _side_by_side(
    parts: Sequence[Mapping[str, Tensor]], scheme: Scheme
) -> dict[str, Tensor] | None:
    """The stored forms joined as they are: no word holds values of two parts. None: not so here."""
    stored = [part["weight_shape"] for part in parts if "weight_shape" in part]
    shapes = [shape.tolist() for shape in stored if shape.shape == (2,)]
    whole_words = scheme.symmetric or all(out * scheme.bits % 32 == 0 for out, _ in shapes)
    alike = {tuple((k, t.dtype, t.shape[1:]) for k, t in sorted(part.items())) for part in parts}
    same_inputs = len(shapes) == len(parts) and len({inputs for _, inputs in shapes}) == 1
    if not (whole_words and same_inputs and len(alike) == 1):
        return None
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    outputs = sum(out for out, _ in shapes)
    return joined | {"weight_shape": parts[0]["weight_shape"].new_tensor([outputs, shapes[0][1]])}


def choose(scheme: Scheme, device: torch.device) -> ModuleType:
    """The best kernel module for `scheme` on `device`: the first that can and passes its check."""
    return next(kernel for kernel in _kernels(device.type) if kernel.supports(scheme, device))


@cache
def _kernels(device: str) -> list[ModuleType]:
    """The kernels that work here, best first; `plain` always does."""
    from optim.runtime.kernels import cpu_int4, cpu_w4a8, plain

    candidates = [cpu_w4a8, cpu_int4] if device == "cpu" else []
    if device == "cuda" and find_spec("triton"):
        from optim.runtime.kernels import triton_w4a16

        candidates = [triton_w4a16]
    working = []
    for kernel in candidates:
        try:
            kernel.check()
            working.append(kernel)
        except Exception:  # whatever it is, the next kernel is taken; `optim doctor` says why
            continue
    return [*working, plain]
