"""The walk of calibration text through dense blocks, looking at what each site's linears read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from optim.runtime.architecture.table import Decoder
from optim.runtime.sparsity.rules import activation
from optim.runtime.sparsity.side_file import linears_of
from optim.runtime.walk.walk import HiddenStates, Walk

See = Callable[[str, Tensor], None]
"""Called with a site and what its linears read, `[b, t, n]`; with `gate` and act(gate)."""


@dataclass(slots=True)
class Seen:
    """A dense block, what went into it and what came out: `[n, t, hidden]` of a few windows."""

    index: int
    block: nn.Module
    inputs: Tensor
    outputs: Tensor

    def loss(self, out: Tensor, start: int = 0) -> float:
        """||y - out||^2 / ||y - x||^2 from token `start` on: relative to what the block adds."""
        wrong, added = out - self.outputs, self.outputs - self.inputs
        error = wrong[:, start:].square().sum() / added[:, start:].square().sum()
        return float(error)


def calibrate(
    walk: Walk, facts: Decoder, windows: Tensor, folder: Path, see: Callable[[int], See], few: int
) -> Iterator[Seen]:
    """Each block after all `windows` int64 `[n, length]` have gone through it; `few` are kept.

    `see(i)` gives what looks at block i's sites while the windows pass.
    """
    states = walk.embed(windows, folder / "states")
    walk.release()
    for i in range(len(walk)):
        block = walk.block(i)
        inputs = states[slice(0, few)]
        hooks = _watch(block, facts, see(i), windows.shape[1])
        _advance(walk, i, block, states)
        for hook in hooks:
            hook.remove()
        yield Seen(i, block, inputs, states[slice(0, few)])


def _advance(walk: Walk, i: int, block: nn.Module, states: HiddenStates) -> None:
    for rows in walk.slices(states):
        states[rows] = walk.run(i, block, states[rows])


def _watch(block: nn.Module, facts: Decoder, see: See, length: int) -> list[RemovableHandle]:
    def hook(site: str) -> Callable[..., None]:
        return lambda _module, args: show(site, args[0])

    def show(site: str, x: Tensor) -> None:
        see(site, x.reshape(-1, length, x.shape[-1]))  # some families flatten it

    firsts = {site: names[0] for site, names in linears_of(facts).items()}
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(hook(site))
        for site, name in firsts.items()
    ]
    gate = block.get_submodule(facts.up[0])
    act: Any = activation(block, facts)
    hooks.append(gate.register_forward_hook(lambda _m, _args, y: show("gate", act(y))))
    return hooks
