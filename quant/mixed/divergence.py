"""How far a model whose linears are rounded diverges from what it was, and each linear's share.

Weights go from W, as they are, to Q, as they were solved. Near W the divergence along this way is
KL(W + t (Q - W)) ≈ c t², so its derivative at t = 1/2 is c, and that of every linear for itself,

    <∂KL/∂W_l, Q_l - W_l>  at  (W + Q) / 2,

adds up to it: a linear's share of the cost, with the errors of all others around it (Aumann and
Shapley's value of it, by the rule of the midpoint). One gradient tells the shares of all linears,
and half an error is that of one bit more: a small model survives where 3 or even 2 bits break it.

The gradient is taken block by block, backwards: one block and one batch are in memory at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.walk.walk import HiddenStates, Walk, linears

Read = Callable[[str], Tensor]
Progress = Callable[[str], None]
STEP = 4  # every so many tokens the divergence is measured


class Judge:
    """What a plain model says of `windows` int64 `[n, length]`; files are kept in `folder`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Tensor,
        folder: Path,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.windows, self.folder = checkpoint, windows, folder
        self.device, self.progress = device, progress
        walk = Walk(checkpoint, device)
        self.blocks = f"{walk.prefix}."
        self.plain = self._forwards(walk, "plain")

    def divergence(self, read: Read) -> float:
        """KL in nats a token of the model whose tensors are `read`."""
        walk = Walk(self.checkpoint, self.device, read=read)
        return self._end(walk, self._forwards(walk, "rounded"))

    def shares(self, solved: Read) -> dict[str, float]:
        """What each linear costs, KL in nats a token, where all blocks are as `solved`."""

        def half(name: str) -> Tensor:
            plain = self.checkpoint.read(name)
            inside = name.startswith(self.blocks)
            return (plain.float() + solved(name).float()) / 2 if inside else plain

        walk, found = Walk(self.checkpoint, self.device, read=half), dict[str, float]()
        inputs: list[HiddenStates] = []
        gradient = self._like("gradient")
        self._end(walk, self._forwards(walk, "half", inputs), gradient)
        walk.release()
        for i in reversed(range(len(walk))):
            self._backwards(walk, i, inputs[i], gradient, found)
        return found

    def _like(self, name: str) -> HiddenStates:
        return HiddenStates(self.folder / name, self.plain.shape, self.plain.dtype)

    @torch.no_grad()
    def _forwards(
        self, walk: Walk, name: str, inputs: list[HiddenStates] | None = None
    ) -> HiddenStates:
        """The last block's output; with `inputs` what each block reads is kept there."""
        states = walk.embed(self.windows, self.folder / name)
        walk.release()
        for i in range(len(walk)):
            after = states
            if inputs is not None:
                inputs.append(states)
                after = HiddenStates(self.folder / f"{name}-{i}", states.shape, states.dtype)
            block = walk.block(i)
            for rows in walk.slices(states):
                after[rows] = walk.run(i, block, states[rows])
            states = after
            self.progress(f"block {i}")
        return states

    def _end(self, walk: Walk, states: HiddenStates, gradient: HiddenStates | None = None) -> float:
        """The divergence, and in `gradient` its own at the last block's output."""
        total, step = 0.0, slice(STEP - 1, None, STEP)
        for n in range(len(self.windows)):
            row = slice(n, n + 1)
            ids, hidden = self.windows[row, step], states[row][:, step]
            with torch.no_grad():
                base = walk.logits(ids, self.plain[row][:, step]).log_softmax(-1)
            with torch.set_grad_enabled(gradient is not None):
                hidden.requires_grad_(gradient is not None)
                logs = walk.logits(ids, hidden).log_softmax(-1)
                kl = (base.exp() * (base - logs)).sum(-1).mean() / len(self.windows)
            total += float(kl.detach())
            if gradient is not None:
                whole = torch.zeros_like(states[row])
                (whole[:, step],) = torch.autograd.grad(kl, hidden)
                gradient[row] = whole
        return total

    def _backwards(
        self,
        walk: Walk,
        i: int,
        states: HiddenStates,
        gradient: HiddenStates,
        found: dict[str, float],
    ) -> None:
        """Takes `gradient` through block i; what its linears moved by is added up in `found`."""
        block, prefix = walk.block(i), f"{walk.prefix}.{i}."
        for rows in walk.slices(states):
            x = states[rows].requires_grad_()
            with torch.enable_grad(), self._watched(block, prefix, found):
                out = walk.run(i, block, x)
                (gradient[rows],) = torch.autograd.grad(out, x, gradient[rows].to(out))
        self.progress(f"block {i}, backwards")

    @contextmanager
    def _watched(self, block: nn.Module, prefix: str, found: dict[str, float]) -> Iterator[None]:
        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(linear: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
                read = args[0].detach()

                def take(g: Tensor) -> None:
                    plain = self.checkpoint.read(f"{prefix}{name}.weight").to(read)
                    moved = 2 * F.linear(read, linear.dense() - plain)  # type: ignore[operator]
                    found[prefix + name] = found.get(prefix + name, 0.0) + float((moved * g).sum())

                out.register_hook(take)  # type: ignore[no-untyped-call]

            return hook

        handles = [m.register_forward_hook(watch(name)) for name, m in linears(block).items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
