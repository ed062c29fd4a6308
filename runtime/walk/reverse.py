"""Walk a model backwards: how much the end loss feels each linear's output, token by token.

Forwards first, with what every block reads kept on disk; then from the head down, block by block:
the block is run again on what it read, with autograd, the gradient that came from above is taken
through it, and what reaches its inputs goes to the block below. One block and one batch of windows
are in memory at a time. The loss is the cross-entropy of the text, summed over its tokens.

Of the gradient g `[tokens, out]` at a linear's output, the mean squares over `groups` equal parts
of its rows are kept, `[tokens, groups]` float32. A linear of an expert feels the tokens that were
routed to it; the others are NaN there.

Every file is hashed and journalled when it is whole: a walk that was killed goes on where it was.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.workspace import append_line, disk_error, read_journal
from optim.runtime.system.files import sync
from optim.runtime.system.hashes import file_sha256, tokens_sha256
from optim.runtime.walk.walk import HiddenStates, Walk, linears, tokens_read

LOGIT_BYTES = 256 * 2**20  # logits held at a time
Progress = Callable[[int, int, str], None]
OUTPUT = ":output"
"""In a block's file beside the linears: the gradient at the block's output, of the last windows."""


@dataclass(slots=True)
class ReverseWalk:
    """The walk over `windows` int64 `[n, length]`, its files in `folder`.

    `groups` parts of a linear's rows are told apart; of the last `kept` windows the gradient at
    every block's output is kept as well.
    """

    checkpoint: Checkpoint
    windows: Tensor
    folder: Path
    groups: int = 1
    kept: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def run(self, progress: Progress = lambda at, total, text: None) -> None:
        """Do what is not done yet."""
        steps = _Steps(self.folder, self._identity())
        with torch.inference_mode(False), torch.no_grad():
            walk = Walk(self.checkpoint, self.device)
            total = 2 * len(walk)
            if (self._found(0)).name in steps.done:
                return
            self._forwards(walk, steps, lambda i: progress(i, total, "guide: forwards"))
            self._end(walk, steps)
            for i in reversed(range(len(walk))):
                if self._found(i).name not in steps.done:
                    self._block(walk, i, steps)
                progress(2 * len(walk) - i, total, "guide: backwards")

    def block(self, i: int) -> dict[str, Tensor]:
        """What was found of block i: linear's path -> mean squared gradients `[tokens, groups]`."""
        return load_file(self._found(i))

    def _identity(self) -> dict[str, object]:
        what = {"source": self.checkpoint.fingerprint(), "tokens": tokens_sha256(self.windows)}
        return what | {"groups": self.groups, "kept": self.kept}

    def _found(self, i: int) -> Path:
        return self.folder / f"block-{i}.safetensors"

    def _states(self, walk: Walk, name: str) -> HiddenStates:
        hidden = int(walk.model.config.get_text_config().hidden_size)
        shape = (self.windows.shape[0], self.windows.shape[1], hidden)
        return HiddenStates(self.folder / name, shape, walk.dtype)

    def _forwards(self, walk: Walk, steps: "_Steps", progress: Callable[[int], None]) -> None:
        """What each block reads, in `inputs-<i>`; the last block's output is the last of them."""
        if "inputs-0" not in steps.done:
            walk.embed(self.windows, self.folder / "inputs-0")
            steps.finish("inputs-0")
        else:
            walk.prepare(self.windows)
        walk.release()
        for i in range(len(walk)):
            if f"inputs-{i + 1}" in steps.done:
                continue
            states, after = (self._states(walk, f"inputs-{j}") for j in (i, i + 1))
            block = walk.block(i)
            for rows in walk.slices(states):
                after[rows] = walk.run(i, block, states[rows])
            steps.finish(f"inputs-{i + 1}")
            progress(i + 1)

    def _end(self, walk: Walk, steps: "_Steps") -> None:
        """The gradient at the last block's output."""
        last = len(walk)
        if f"gradient-{last}" in steps.done:
            return
        states, gradient = (self._states(walk, f"{k}-{last}") for k in ("inputs", "gradient"))
        for i in range(len(self.windows)):
            row = slice(i, i + 1)
            gradient[row] = end_gradient(walk, self.windows[row], states[row])
        walk.release()
        steps.finish(f"gradient-{last}")
        steps.drop(f"inputs-{last}")

    def _block(self, walk: Walk, i: int, steps: "_Steps") -> None:
        block = walk.block(i)
        states, above = (
            self._states(walk, f"{kind}-{j}") for kind, j in (("inputs", i), ("gradient", i + 1))
        )
        below = self._states(walk, f"gradient-{i}")
        found: dict[str, Tensor] = {}
        at = 0
        for rows in walk.slices(states):
            x = states[rows].requires_grad_()
            tokens = slice(at, at + x.shape[0] * x.shape[1])
            with torch.enable_grad(), self._watched(block, found, tokens):
                out = walk.run(i, block, x)
                (below[rows],) = torch.autograd.grad(out, x, above[rows].to(out))
            at = tokens.stop
        if self.kept:
            found[OUTPUT] = above[slice(len(states) - self.kept, len(states))]
        try:
            save_file(found, self._found(i))
        except OSError as error:
            raise disk_error(self._found(i), error) from error
        steps.finish(f"gradient-{i}")
        steps.finish(self._found(i).name)
        steps.drop(f"gradient-{i + 1}", f"inputs-{i}")

    @contextmanager
    def _watched(self, block: nn.Module, found: dict[str, Tensor], tokens: slice) -> Iterator[None]:
        """Fill the rows `tokens` of what is `found` at each linear's output."""
        total = self.windows.numel()

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
                read = tokens_read(block, name)

                def take(g: Tensor) -> None:
                    parts = g.flatten(0, -2).tensor_split(self.groups, -1)
                    norms = [part.norm(dim=-1).square() / part.shape[-1] for part in parts]
                    means = torch.stack(norms, -1).cpu()
                    kept = found.setdefault(name, torch.full((total, self.groups), torch.nan))
                    kept[tokens][slice(None) if read is None else read.cpu()] = means

                out.register_hook(take)  # type: ignore[no-untyped-call]

            return hook

        handles = [m.register_forward_hook(watch(n)) for n, m in linears(block).items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def end_gradient(walk: Walk, windows: Tensor, states: Tensor) -> Tensor:
    """The gradient of the summed cross-entropy of windows `[n, t]` at the last block's output.

    `states` `[n, t, hidden]` are that output; some positions are done at a time.
    """
    vocab = int(walk.model.config.get_text_config().vocab_size)
    step = max(1, LOGIT_BYTES // (4 * vocab * len(windows)))
    gradient = torch.zeros_like(states)
    last = windows.shape[1] - 1
    for start in range(0, last, step):
        part = slice(start, min(start + step, last))
        hidden = states[:, part].clone().requires_grad_()
        target = windows[:, part.start + 1 : part.stop + 1].to(walk.device)
        with torch.enable_grad():
            logits = walk.logits(windows[:, part], hidden)
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
            (gradient[:, part],) = torch.autograd.grad(loss, hidden)
    return gradient


class _Steps:
    """The files of a walk that are whole, by name; the journal of another walk is begun anew.

    A file that is not what was journalled, or is gone, begins it anew too.
    """

    def __init__(self, folder: Path, identity: dict[str, object]) -> None:
        self.folder, self._journal = folder, folder / "journal.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = read_journal(self._journal)
        if not lines or lines[0] != json.loads(json.dumps(identity)) or self._damaged(lines[1:]):
            lines = [identity]
        self._journal.unlink(missing_ok=True)  # a line cut off by a kill is dropped
        for line in lines:
            append_line(self._journal, line)
        self.done = {line["file"] for line in lines[1:] if "sha256" in line}

    def finish(self, name: str) -> None:
        """A file is whole: it is never written again."""
        try:
            sync(self.folder / name)
        except OSError as error:
            raise disk_error(self.folder / name, error) from error
        append_line(self._journal, {"file": name, "sha256": file_sha256(self.folder / name)})
        self.done.add(name)

    def drop(self, *names: str) -> None:
        """Files that nothing will read again."""
        for name in names:
            append_line(self._journal, {"file": name})
            (self.folder / name).unlink(missing_ok=True)

    def _damaged(self, lines: list[dict[str, Any]]) -> bool:
        wanted = {line["file"]: line.get("sha256") for line in lines}
        for name, sha256 in wanted.items():
            path = self.folder / name
            if sha256 is not None and not (path.is_file() and file_sha256(path) == sha256):
                return True
        return False
