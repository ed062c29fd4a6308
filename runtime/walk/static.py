"""A walk over an artifact of static integers: transformers' own blocks, with our norms and linears.

The engine has its own blocks, and the same modules in them: what is evaluated is what runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from optim.runtime.decoder.linears.source import Source
from optim.runtime.decoder.linears.static_int import StaticReader
from optim.runtime.formats.hadamard import Mixing
from optim.runtime.formats.static_int import Exact, Static, read_config, stream_rotation
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.walk.skeleton import is_fused_experts
from optim.runtime.walk.walk import Experts, HiddenStates, Walk


@dataclass(slots=True)
class StaticWalk:
    """A walk over the blocks of an artifact of static integers."""

    walk: Walk
    static: Static
    rotation: Mixing | None

    def hidden(
        self, windows: Tensor, path: Path, step: Callable[[int], None], begin: int = 0
    ) -> HiddenStates:
        """The last block's output for every window int64 `[n, length]`, as the head wants it.

        The first `begin` tokens of a window are left out where the prefix begins with them; in
        their place is then the output of the prefix's last tokens.
        """
        prefix, walk = self.static.prefix, self.walk
        held = begin if begin and prefix[:begin] == tuple(windows[0, :begin].tolist()) else 0
        put = torch.tensor(prefix, dtype=torch.int64).expand(len(windows), -1)
        ids = torch.cat((put, windows[:, held:]), 1)
        states = walk.embed(ids, path.with_name(path.name + ".prefix"))
        walk.release()
        if self.rotation is not None:
            for rows in walk.slices(states):
                states[rows] = self.rotation(states[rows])
        for i in range(len(walk)):
            block = walk.block(i)
            for rows in walk.slices(states):
                states[rows] = walk.run(i, block, states[rows])
            step(i + 1)
        return self._without(len(prefix) - held, states, path)

    def _without(self, first: int, states: HiddenStates, path: Path) -> HiddenStates:
        count, length, width = states.shape
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
    reader = StaticReader(Source(checkpoint, device, torch.float32), static, exact)
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
            made = Experts.read(module, partial(_expert, reader, path))
            block.set_submodule(name, made)
        elif reader.has(path):
            eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
            block.set_submodule(name, reader.norm(path, eps))


def _expert(reader: StaticReader, path: str, name: str, _like: Tensor) -> nn.Module:
    return reader.linear(f"{path}.{name}")
