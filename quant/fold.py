"""Move a scale from a linear's input into what feeds it, and prove on the block that nothing
changed.

Scaling the input channels of every reader of a tensor by s and dividing the tensor by s at its
source is the identity, if the table is right about who reads it. A row that is wrong (a forgotten
router, a norm that multiplies by 1 + w) changes the block's output: `try_fold` runs the block
before and after and takes the fold back when it does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from optim.runtime.architecture.table import FAMILIES, Family, Group
from optim.runtime.walk.walk import StoredLinear, linear_at

TOLERANCE = 1e-3  # of the block's own contribution to the residual stream, in float32


def family_groups(block: nn.Module, model_type: str) -> tuple[list[Group], int]:
    """The fold groups of a loaded block (experts spelled out) and its norm offset.

    A family outside the table has none here; see `discover`.
    """
    family = FAMILIES.get(model_type, Family())
    return list(_present(block, family.groups)), family.norm_offset


def _present(block: nn.Module, groups: tuple[Group, ...]) -> Iterator[Group]:
    modules = dict(block.named_modules())
    for group in groups:
        for concrete in _spell_out(group, modules):
            if {concrete.source, *concrete.readers, *concrete.unquantized} <= modules.keys():
                yield concrete


def _spell_out(group: Group, modules: dict[str, nn.Module]) -> list[Group]:
    starred = next((name for name in group.readers if "*" in name), None)
    if starred is None:
        return [group]
    stem = starred.split("*")[0]
    inside = {name[len(stem) :].split(".")[0] for name in modules if name.startswith(stem)}
    experts = sorted((name for name in inside if name.isdigit()), key=int)
    if "*" not in group.source:  # one norm feeds them all
        readers = tuple(r.replace("*", e) for e in experts for r in group.readers)
        return [replace(group, readers=readers)]
    return [
        Group(group.source.replace("*", e), tuple(r.replace("*", e) for r in group.readers))
        for e in experts
    ]


def discover(block: nn.Module, run: Callable[[], Tensor]) -> list[Group]:
    """Candidate groups of an unknown family: norms whose output tensor linears read.

    Found by running the block once and comparing tensor identities. Readers that are no linears are
    not seen here; `try_fold` finds them out.
    """
    made: dict[int, str] = {}
    kept: list[Tensor] = []  # alive, so that identities stay unique
    readers: dict[str, list[str]] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(m: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if isinstance(m, StoredLinear):
                source = made.get(id(args[0]))
                if source is not None:
                    readers.setdefault(source, []).append(name)
            else:
                kept.append(out)
                made[id(out)] = name

        return module.register_forward_hook(hook)

    handles = [
        watch(n, m) for n, m in block.named_modules() if isinstance(m, StoredLinear) or _is_norm(m)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [Group(source, tuple(names)) for source, names in readers.items()]


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1
    )


def query_repeats(block: nn.Module, group: Group) -> tuple[int, int] | None:
    """(query heads a KV head, head dim) where the source is an attention's values, else None."""
    if not isinstance(block.get_submodule(group.source), StoredLinear):
        return None  # a norm inside the attention: its channels are no heads
    parent: Any = block.get_submodule(group.source.rpartition(".")[0])
    repeats = int(getattr(parent, "num_key_value_groups", 1))
    return (repeats, int(parent.head_dim)) if repeats > 1 else None


@dataclass(frozen=True, slots=True)
class Probe:
    """What a block makes of a little of its input: `hidden` -> `expected`; `run` does it again."""

    hidden: Tensor
    expected: Tensor
    run: Callable[[], Tensor]

    def change(self) -> float:
        """How far the block's output is from `expected`, relative to what the block adds."""
        added = (self.expected - self.hidden).norm().clamp(min=1e-20)
        return float((self.run() - self.expected).norm() / added)


@dataclass(slots=True)
class _Undo:
    """What a fold touched, as it was."""

    columns: list[StoredLinear]
    parameters: list[tuple[nn.Parameter, Tensor]]
    source: StoredLinear | None
    out_scale: Tensor | None

    def __call__(self) -> None:
        for linear in self.columns:
            linear.in_scale = None
        for parameter, value in self.parameters:
            parameter.data.copy_(value)
        if self.source is not None:
            self.source.out_scale = self.out_scale


def fold_checked(
    block: nn.Module,
    folds: list[tuple[Group, Tensor]],
    norm_offset: int,
    norm_dtype: torch.dtype,
    probe: Probe,
) -> list[tuple[Group, float]]:
    """Fold each scale `[in]` into its group; returns those that changed the block, unfolded again.

    All are folded at once and checked with one run; only if that fails, one by one.
    """
    undos = [_fold(block, group, scale, norm_offset, norm_dtype) for group, scale in folds]
    if not folds or probe.change() <= TOLERANCE:
        return []
    for undo in reversed(undos):
        undo()
    wrong = []
    for group, scale in folds:
        undo = _fold(block, group, scale, norm_offset, norm_dtype)
        change = probe.change()
        if change > TOLERANCE:
            undo()
            wrong.append((group, change))
    return wrong


def _fold(
    block: nn.Module, group: Group, scale: Tensor, norm_offset: int, norm_dtype: torch.dtype
) -> _Undo:
    source = block.get_submodule(group.source)
    undo = _Undo([], [], None, None)
    if isinstance(source, StoredLinear):
        undo.source, undo.out_scale = source, source.out_scale
        source.out_scale = _row_scale(source, scale, query_repeats(block, group))
    else:
        scale = _fold_norm(source, scale, norm_offset, norm_dtype, undo)
    for name in group.readers:
        linear = linear_at(block, name)
        linear.in_scale = scale
        undo.columns.append(linear)
    for name in group.unquantized:
        weight = block.get_parameter(f"{name}.weight")
        undo.parameters.append((weight, weight.data.clone()))
        weight.data *= scale
    return undo


def _row_scale(source: StoredLinear, scale: Tensor, repeats: tuple[int, int] | None) -> Tensor:
    """The divisor of each source row; a fused source feeds the readers with its last rows."""
    if repeats is not None:
        scale = scale.view(-1, *repeats)[:, 0].reshape(-1)
    rows = torch.ones(source.out_features, device=scale.device)
    rows[-len(scale) :] = scale
    return rows if source.out_scale is None else rows * source.out_scale


def _fold_norm(norm: Any, scale: Tensor, offset: int, dtype: torch.dtype, undo: _Undo) -> Tensor:
    """Divide the norm by `scale`; returns the scale that its *stored* weights really divide by.

    Rounding the new weight to its stored dtype would cost a little in every channel: the rounded
    weight is taken as given and the readers get exactly what it lacks.
    """
    weight: nn.Parameter = norm.weight
    undo.parameters.append((weight, weight.data.clone()))
    gain = weight.data.float() + offset
    stored = (gain / scale - offset).to(dtype).float()
    new = stored + offset
    dead = (new.abs() < 1e-6) | (gain.abs() < 1e-6)
    exact = torch.where(
        dead, torch.ones_like(gain), gain / torch.where(dead, torch.ones_like(new), new)
    )
    weight.data.copy_(torch.where(dead, weight.data.float(), stored))
    bias = getattr(norm, "bias", None)
    if bias is not None:
        undo.parameters.append((bias, bias.data.clone()))
        bias.data.div_(exact)
    return exact
