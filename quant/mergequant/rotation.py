"""Fold norms and turn the residual stream, and prove that nothing changed.

RMSNorm gives x / rms(x) * g. The gain g goes into the columns of every reader; what is left
commutes with any orthogonal R, as R keeps rms(x). With R at the embedding and its inverse at
the end, every reader takes W diag(g) R^T and every writer to the stream R W: the model is the same
(SliceGPT, arXiv 2401.15024; QuaRot, arXiv 2404.00456), and the stream has no outlier channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optim.quant.fold import family_groups
from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.table import FAMILIES, Family
from optim.runtime.formats.hadamard import Mixing
from optim.runtime.walk.walk import StoredLinear, linear_at

WHY = {
    "layer_norm": "its norms subtract a mean (LayerNorm), and the steps are folded into RMSNorm",
    "post": "it has no norm before its linears for the steps to be folded into",
    "unknown": "it is not in the table of families, so what its norms feed is not known",
    "sandwich": "it also normalizes after attention, so its residual stream cannot be turned",
}


@dataclass(frozen=True, slots=True)
class NormSite:
    """A norm and who reads it: `linears` to quantize, `others` (a router) that stay in floats."""

    norm: str
    linears: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def fused(self) -> bool:
        """Whether the norm itself may emit codes: nobody needs its floats."""
        return not self.others


@dataclass(frozen=True, slots=True)
class Places:
    """The sites of one block: norms in the order in which they run, writers to the stream."""

    attention: NormSite
    out: str
    mlp: NormSite
    downs: tuple[str, ...]


def refuse_family(model_type: str, rotate: bool) -> None:
    """OptimError (2), with the reason, for a family whose norms cannot carry the steps."""
    family = FAMILIES.get(model_type)
    why = "unknown" if family is None else _why_not(family, rotate)
    if why is None:
        return
    fix = "--no-rotate keeps it as it is" if why == "sandwich" else "-m awq works on every family"
    raise OptimError(f"{model_type} cannot be quantized by mergequant: {WHY[why]}", fix, USAGE)


def _why_not(family: Family, rotate: bool) -> str | None:
    facts = family.decoder
    if facts.layer_norm:
        return "layer_norm"
    if facts.attention_norms[0] is None or facts.mlp_norms[0] is None:
        return "post"
    after = facts.attention_norms[1] or facts.mlp_norms[1]
    return "sandwich" if rotate and after else None


def places(block: nn.Module, model_type: str) -> Places:
    """Who reads which norm in a loaded block, experts spelled out."""
    facts = FAMILIES[model_type].decoder
    groups = {group.source: group for group in family_groups(block, model_type)[0]}
    before, mid = facts.attention_norms[0], facts.mlp_norms[0]
    assert before is not None and mid is not None
    attention = NormSite(before, facts.qkv, ())
    feed = groups.get(mid)
    readers = facts.up if feed is None else feed.readers
    others = () if feed is None else feed.unquantized
    names = dict(block.named_modules())
    if facts.down in names:
        downs: tuple[str, ...] = (facts.down,)
    else:
        downs = tuple(name for name in names if name.endswith(".down_proj"))
    return Places(attention, facts.out, NormSite(mid, readers, others), downs)


@torch.no_grad()
def fold_norm(block: nn.Module, site: NormSite, offset: int) -> None:
    """Move the norm's gain into its readers; the norm is left with a gain of one."""
    norm = block.get_submodule(site.norm)
    weight = norm.get_parameter("weight")
    gain = weight.float() + offset
    for name in site.linears:
        replace_weight(block, name, linear_at(block, name).dense() * gain)
    for name in site.others:
        owner = block.get_submodule(name)
        set_weight(owner, (_weight(owner) * gain))
    weight.data.fill_(1 - offset)


@torch.no_grad()
def turn(block: nn.Module, found: Places, rotation: Mixing) -> None:
    """The block in a turned stream: readers (norms folded already) and writers."""
    for site in (found.attention, found.mlp):
        for name in site.linears:
            replace_weight(block, name, _rows(linear_at(block, name).dense(), rotation))
        for name in site.others:
            owner = block.get_submodule(name)
            set_weight(owner, _rows(_weight(owner), rotation))
    for name in (found.out, *found.downs):
        linear = linear_at(block, name)
        bias = linear.dense_bias()
        turned = _rows(linear.dense().T, rotation).T.contiguous()
        replace_weight(block, name, turned, None if bias is None else rotation(bias.double()))


def _rows(weight: Tensor, rotation: Mixing) -> Tensor:
    return rotation(weight.double()).float()


def _weight(owner: nn.Module) -> Tensor:
    return owner.dense() if isinstance(owner, StoredLinear) else owner.get_parameter("weight").data


def set_weight(owner: nn.Module, weight: Tensor) -> None:
    """Give a module another weight of the same shape, in float32."""
    owner.weight = nn.Parameter(weight.float(), requires_grad=False)


def replace_weight(block: nn.Module, name: str, weight: Tensor, bias: Tensor | None = None) -> None:
    """Put a float32 weight `[out, in]` in place of the linear's own; the bias stays by default."""
    old = linear_at(block, name)
    kept = old.dense_bias() if bias is None else bias.float()
    block.set_submodule(name, StoredLinear(weight.float(), kept))
