"""A packed model whose scales and norms can be trained, its integers and zero points fixed.

    w = (q - z) s0 (1 + f)        f [out, groups] is trained and begins at zero

Each step moves f by about the learning rate whatever the scale's size. Every block is in memory, a
byte a weight; of a batch's activations only those at the borders of the blocks, and one block's.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from optim.quant.attempts import small_parameters
from optim.quant.grid import Grid, grouped, restore
from optim.recipes.errors import USAGE, OptimError
from optim.runtime.formats.pack_quantized import SUFFIXES, Scheme, unpack
from optim.runtime.storage.checkpoint import Checkpoint, schemes_of
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.walk.walk import (
    TOKENS_PER_BATCH,
    HiddenStates,
    StoredLinear,
    Walk,
    linears,
)

LOGIT_BYTES = 256 * 2**20  # logits of one model held at a time


class TunedLinear(StoredLinear):
    """A packed linear whose scales are trained; `weight` are its integers, uint8 `[out, in]`."""

    def __init__(
        self, q: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, bias: Tensor | None
    ) -> None:
        super().__init__(q, bias)
        self.scheme, self.stored = scheme, scale.dtype
        self.first_scale = scale.float()
        middle = torch.full_like(self.first_scale, 2.0 ** (scheme.bits - 1))
        self.zero = middle if zero is None else zero.float()
        self.factor = nn.Parameter(torch.zeros_like(self.first_scale))

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Rows of the weight at the scales as they now are, float32 `[rows, in]`."""
        scale = self.first_scale[rows] * (1 + self.factor[rows])
        return restore(self.weight[rows], Grid(scale, self.zero[rows], self.scheme))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.factor, self)  # type: ignore[no-untyped-call]
        bias = self.dense_bias()
        return y if bias is None else y + bias.to(x.dtype)

    def scale(self) -> Tensor:
        """The scales as they are to be stored `[out, groups]`; one that cannot be is as it was."""
        new = (self.first_scale * (1 + self.factor.detach())).to(self.stored)
        usable = (new > 0) & new.isfinite()
        return torch.where(usable, new, self.first_scale.to(self.stored))


class _Product(torch.autograd.Function):
    """x Wᵀ with gradients for x and the scales' factors, W widened some rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, linear: TunedLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (x,) = ctx.saved_tensors
        linear: TunedLinear = ctx.linear
        flat, gradients = x.flatten(0, -2), g.flatten(0, -2)
        down = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        factor = torch.empty_like(linear.first_scale)
        for rows in linear.slices():
            part = gradients[:, rows]
            if down is not None:
                down += part @ linear.dense(rows).to(part.dtype)
            of_weight = grouped((part.T @ flat).float(), linear.scheme)
            steps = grouped(linear.weight[rows].float(), linear.scheme) - linear.zero[rows, :, None]
            factor[rows] = (of_weight * steps).sum(-1) * linear.first_scale[rows]
        return None if down is None else down.view_as(x), factor, None


class PackedWalk(Walk):
    """A walk over a packed artifact whose linears can be tuned."""

    def __init__(self, artifact: Checkpoint, device: torch.device) -> None:
        super().__init__(PlainView(artifact), device)
        self.artifact, self._scheme_of = artifact, schemes_of(artifact)

    def _linear(self, path: str, weight: Tensor, bias: Tensor | None) -> StoredLinear:
        names, module = self.artifact.tensors, path.removesuffix(".")
        if f"{module}.weight_packed" not in names:
            return super()._linear(path, weight, bias)
        scheme = self._scheme_of(module)
        assert scheme is not None, module
        keys = (key for key in SUFFIXES if f"{module}.{key}" in names)
        parts = {key: self.artifact.read(f"{module}.{key}") for key in keys}
        q, scale, zero = unpack(parts, scheme, module)
        if q.shape != weight.shape:
            what = f"{module} has shape {list(q.shape)}, the configuration {list(weight.shape)}"
            raise OptimError(what, "config.json and the weights do not belong together", USAGE)
        read = None if bias is None else self.artifact.read(f"{module}.bias").to(self.device)
        on = self.device
        zero = None if zero is None else zero.to(on)
        return TunedLinear(q.to(on), scale.to(on), zero, scheme, read)


class Student:
    """The artifact, all blocks in memory; `windows` int64 `[n, length]` are what it will read."""

    def __init__(self, artifact: Checkpoint, windows: Tensor, path: Path, device: torch.device):
        self.walk, self.windows = PackedWalk(artifact, device), windows
        self.embedded = self.walk.embed(windows, path)
        self.blocks = [self.walk.block(i) for i in range(len(self.walk))]
        self.scales = {
            f"{self.walk.prefix}.{i}.{name}": linear
            for i, block in enumerate(self.blocks)
            for name, linear in linears(block).items()
            if isinstance(linear, TunedLinear)
        }
        self.norms = {
            f"{self.walk.prefix}.{i}.{name}": parameter
            for i, block in enumerate(self.blocks)
            for name, parameter in small_parameters(block)
            if parameter.dim() == 1 and "norm" in name and name.endswith(".weight")
        }

        for norm in self.norms.values():
            norm.requires_grad_()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained."""
        factors = {name: linear.factor for name, linear in self.scales.items()}
        return factors | self.norms

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What is stored of what was trained, by name; norms in float32."""
        for name, linear in self.scales.items():
            yield f"{name}.weight_scale", linear.scale().cpu()
        for name, parameter in self.norms.items():
            yield name, parameter.detach().cpu()

    def hidden(self, rows: Sequence[int]) -> Tensor:
        """The last block's output for windows `rows`; with gradients, borders are kept alone."""
        x = self.embedded.take(rows)
        for i, block in enumerate(self.blocks):
            if torch.is_grad_enabled():
                x = recomputed(self.walk.run, i, block, x, use_reentrant=False)
            else:
                x = self.walk.run(i, block, x)
        return x

    def divergence(
        self, teacher: Walk, wanted: HiddenStates, rows: Sequence[int], learn: bool
    ) -> float:
        """KL(teacher || student), nats a token, over windows `rows`; adds gradients to `learn`.

        `wanted` is the teacher's last block's output for every window.
        """
        step = max(1, TOKENS_PER_BATCH // self.windows.shape[1])
        parts = [rows[k : k + step] for k in range(0, len(rows), step)]
        return sum(
            self._divergence(teacher, wanted, part, len(part) / len(rows), learn) for part in parts
        )

    def _divergence(
        self, teacher: Walk, wanted: HiddenStates, rows: Sequence[int], share: float, learn: bool
    ) -> float:
        ids, given = self.windows[list(rows)], wanted.take(rows)
        with torch.set_grad_enabled(learn):
            out = self.hidden(rows)
        end = out.detach().requires_grad_(learn)
        vocab = int(self.walk.model.config.get_text_config().vocab_size)
        step = max(1, LOGIT_BYTES // (4 * vocab * len(ids)))
        total = 0.0
        for start in range(0, ids.shape[1], step):
            part = slice(start, start + step)
            with torch.no_grad():
                sure = teacher.logits(ids[:, part], given[:, part]).log_softmax(-1)
            with torch.set_grad_enabled(learn):
                logs = self.walk.logits(ids[:, part], end[:, part]).log_softmax(-1)
                loss = F.kl_div(logs, sure, reduction="sum", log_target=True)
                loss = loss * (share / ids.numel())
                if learn:
                    loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if learn:
            assert end.grad is not None
            out.backward(end.grad)  # type: ignore[no-untyped-call]
        return total
