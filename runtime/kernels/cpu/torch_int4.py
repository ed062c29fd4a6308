"""Packed weights on a CPU through torch's own int4 operator, where there is no C compiler.

The operator computes sum x * ((q - 8) * s + z) in bf16 with s, z bf16 per group. Values are shifted
so that their middle is 8, and z = (middle - zero) * s is small (0 if symmetric). It decodes fast
but does not gain from many tokens: beyond `few_tokens` rows of weights are unpacked and multiplied
densely, straight from the operator's layout, which is blocks of `block` rows with row r in the low
and row r + block / 2 in the high nibbles, column by column.
"""

from functools import cache

import torch
from torch import Tensor

from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.torch_tiles import by_tiles
from optim.runtime.system.instructions import has_bf16_units

GROUPS = (32, 64, 128, 256)
PADDING = 64  # rows; a multiple of every block the operator uses


def supports(scheme: Scheme, device: torch.device) -> bool:
    """At most 4 bits, in groups the operator knows."""
    return device.type == "cpu" and scheme.bits <= 4 and scheme.group_size in GROUPS


def few_tokens() -> int:
    """Up to how many tokens the operator beats unpacking and a dense product."""
    return 180 if has_bf16_units() else 24


class Weight:
    """One linear `[out, in]` in the operator's layout; call it with `[tokens, in]`."""

    def __init__(
        self, q: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, bias: Tensor | None
    ) -> None:
        self.outputs, self.inputs = q.shape
        padding = (0, 0, 0, -self.outputs % PADDING)
        middle = 1 << (scheme.bits - 1)
        padded = torch.nn.functional.pad(q + (8 - middle), padding).to(torch.int32)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(padded, 1)
        scale, added = scale.float(), torch.zeros(1) if zero is None else zero.float()
        if scheme.offset:
            added = added + middle * scale
        elif zero is not None:
            added = (middle - added) * scale
        both = torch.stack([scale, added.expand_as(scale)], -1).to(torch.bfloat16)
        padded_both = torch.nn.functional.pad(both, (0, 0, *padding))
        self.scales = padded_both.transpose(0, 1).contiguous()  # [groups, out, 2]
        self.group, self.bias = scheme.group_size, bias

    @property
    def nbytes(self) -> int:
        held = (self.packed, self.scales, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start..stop (start a multiple of 64) as the operator sees them, in `dtype`."""
        whole = slice(start, min(-(-stop // PADDING) * PADDING, self.packed.shape[0]))
        half = block() // 2
        packed = self.packed[whole].reshape(-1, self.inputs, half).transpose(1, 2)
        q = torch.stack([packed & 15, packed >> 4], 1).reshape(
            -1, self.inputs // self.group, self.group
        )
        scale, shift = self.scales[:, whole].float().permute(2, 1, 0).unsqueeze(-1)
        weight = q.float().sub_(8).mul_(scale).add_(shift)
        return weight.view(-1, self.inputs)[: stop - start].to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """`[tokens, in]` -> `[tokens, out]` in the dtype of x, bias included."""
        if x.shape[0] > few_tokens():
            y = by_tiles(x, self.outputs, lambda start, stop: self.rows(start, stop, x.dtype))
        else:
            half = x.to(torch.bfloat16).contiguous()
            wide = torch.ops.aten._weight_int4pack_mm_for_cpu(
                half, self.packed, self.group, self.scales
            )
            y = wide[:, : self.outputs].to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@cache
def block() -> int:
    """How many rows the operator interleaves here. Raises NoKernel if it is none we know."""
    q = torch.randint(0, 16, (PADDING, 32), generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
    for rows in (16, 32, 64):
        nibbles = packed.view(-1, 32, rows // 2).transpose(1, 2)
        if torch.equal(torch.stack([nibbles & 15, nibbles >> 4], 1).reshape(q.shape), q.byte()):
            return rows
    raise NoKernel("torch's int4 layout on this machine is not known")


@cache
def check() -> str:
    """Compares the operator and its unpacking with the formula. Raises NoKernel."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (80, 96), generator=generator).to(torch.uint8)
    zero = torch.randint(0, 16, (80, 3), generator=generator).to(torch.uint8)
    scale = torch.rand(80, 3, generator=generator).to(torch.bfloat16)
    weight = Weight(q, scale, zero, Scheme(4, 32, False), None)
    exact = (q.float().view(80, 3, 32) - zero.unsqueeze(-1)) * scale.float().unsqueeze(-1)
    x = torch.randn(300, 96, generator=generator)
    wanted = x @ exact.view(80, 96).T
    for tokens in (1, 300):
        error = (weight(x[:tokens]) - wanted[:tokens]).norm() / wanted[:tokens].norm()
        if not error < 2e-2:
            raise NoKernel(f"torch's int4 operator is off by {float(error):.1e}")
    return f"torch {torch.backends.cpu.get_cpu_capability()}, blocks of {block()} rows"
