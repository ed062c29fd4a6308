"""Ways of compressing a block, one tried after the other, and the best put in place."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from optim.quant.rounding import RoundedLinear
from optim.runtime.walk.walk import StoredLinear, linears


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a way makes of a block: rounded linears, folded parameters and scales, and notes."""

    rounded: dict[str, RoundedLinear]
    parameters: dict[str, Tensor]
    scales: dict[str, tuple[Tensor | None, Tensor | None]]
    notes: list[str]

    @classmethod
    def of(cls, block: nn.Module, rounded: dict[str, RoundedLinear], notes: list[str]) -> "Attempt":
        """Of a block as it now is, its linears not yet replaced by those that are rounded."""
        parameters = {n: p.detach().clone() for n, p in small_parameters(block)}
        scales = {n: (m.in_scale, m.out_scale) for n, m in linears(block).items()}
        return cls(rounded, parameters, scales, notes)

    def put(self, block: nn.Module, originals: Mapping[str, StoredLinear]) -> None:
        """Make the block what this attempt made of it; `originals` are its own linears."""
        replace(block, originals)
        for name, parameter in small_parameters(block):
            parameter.data.copy_(self.parameters[name])
        for name, linear in originals.items():
            linear.in_scale, linear.out_scale = self.scales[name]
        replace(block, self.rounded)


def small_parameters(block: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that folds change: norms and routers, not the linears' weights."""
    owned = {id(p) for m in linears(block).values() for p in m.parameters()}
    return [(n, p) for n, p in block.named_parameters() if id(p) not in owned]


def replace(block: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules into the block by their path."""
    for name, module in modules.items():
        block.set_submodule(name, module)
