"""Stream hidden states through a model's blocks with one block in memory at a time.

The skeleton is transformers' own model on the meta device, so every family's masks, rotary tables
and head come from its modeling code. The parent's forward is run with its blocks replaced by taps:
a tap takes the hidden states out before the first block, or puts them in after the last. What the
parent passes to each block is recorded once and used for every batch of that length.

Weights stay in the dtype they are stored in and are widened one linear at a time, so a block costs
its stored bytes. Compressing a model larger than memory and evaluating one are this same motion.
"""

import copy
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optim.recipes.errors import OptimError
from optim.runtime.architecture.table import FAMILIES
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.gate import read_finite
from optim.runtime.system.memory import reuse_memory
from optim.runtime.walk.hidden_states import HiddenStates as HiddenStates
from optim.runtime.walk.skeleton import (
    EXPERT_PARTS,
    fill_buffers,
    is_fused_experts,
    meta_model,
    refuse_strange,
    their_errors,
)

TOKENS_PER_BATCH = 2048
Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a parent passes beside the hidden states
WIDEN_BYTES = 64 * 2**20  # a linear larger than this is widened and applied in slices of rows


class StoredLinear(nn.Module):
    """y = x Wᵀ + b with W `[out, in]` kept in its stored dtype, computed in the dtype of x.

    `in_scale` `[in]` multiplies the columns and `out_scale` `[out]` divides the rows of W (and the
    bias): folds are held beside the weight until it is rounded, and can be taken back.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_scale: Tensor | None = None
        self.out_scale: Tensor | None = None
        self.out_features, self.in_features = weight.shape

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Rows of the weight, folds applied, float32 `[rows, in]`."""
        w = self.weight[rows].float()
        if self.in_scale is not None:
            w = w * self.in_scale
        return w if self.out_scale is None else w / self.out_scale[rows, None]

    def dense_bias(self) -> Tensor | None:
        """The bias `[out]`, folds applied, float32."""
        if self.bias is None:
            return None
        bias = self.bias.float()
        return bias if self.out_scale is None else bias / self.out_scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self) if x.requires_grad else self.product(x)  # type: ignore[no-untyped-call]
        bias = self.dense_bias()
        return y if bias is None else y + bias.to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ, W widened some rows at a time."""
        parts = [F.linear(x, self.dense(rows).to(x.dtype)) for rows in self.slices()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def slices(self) -> list[slice]:
        """The rows of W in parts that are widened at a time."""
        step = max(1, WIDEN_BYTES // (4 * self.in_features))
        return [slice(i, i + step) for i in range(0, self.out_features, step)]


class _Product(torch.autograd.Function):
    """x Wᵀ that widens W again to go backwards: autograd would keep it whole until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: StoredLinear) -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        linear: StoredLinear = ctx.linear
        parts = (g[..., rows] @ linear.dense(rows).to(g.dtype) for rows in linear.slices())
        return reduce(Tensor.add_, parts), None


class Experts(nn.ModuleList):
    """A mixture's experts as separate gated linears; stands in for transformers' fused module."""

    def __init__(self, experts: list[nn.Module], act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__(experts)
        self.act_fn = act_fn
        self.chosen = torch.empty(0, 0)
        """The experts of each token of the batch that was last read, `[tokens, k]`."""

    @classmethod
    def read(cls, fused: Any, linear: Callable[[str, Tensor], nn.Module]) -> "Experts":
        """The experts of transformers' module `fused`, one linear after the other.

        `linear(name, like)` gives the one called `name` ("3.up_proj"), shaped like the weight
        `like` `[out, in]` of the skeleton.
        """
        experts: list[nn.Module] = []
        for e in range(fused.gate_up_proj.shape[0]):
            expert = nn.Module()
            like = (*fused.gate_up_proj[e].chunk(2), fused.down_proj[e])
            for part, weight in zip(EXPERT_PARTS, like, strict=True):
                setattr(expert, part, linear(f"{e}.{part}", weight))
            experts.append(expert)
        return cls(experts, fused.act_fn)

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden `[tokens, hidden]`, top_k_* `[tokens, k]` -> `[tokens, hidden]`."""
        self.chosen = top_k_index
        out = torch.zeros_like(hidden)
        for e, expert in enumerate(self):
            token, choice = torch.where(top_k_index == e)
            if len(token) == 0:
                continue
            x = hidden[token]
            gate, up, down = (expert.get_submodule(part) for part in EXPERT_PARTS)
            y = down(self.act_fn(gate(x)) * up(x))
            out.index_add_(0, token, y * top_k_weights[token, choice, None].to(y.dtype))
        return out


class Walk:
    """A checkpoint's model, its blocks loaded one at a time.

    `device` is where blocks run, `dtype` what hidden states are held and computed in. `dress` may
    set modules of its own into an empty block (of the given path) before the rest is read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | PlainView,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        read: Callable[[str], Tensor] | None = None,
        dress: Callable[[nn.Module, str], None] | None = None,
    ) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        self._read, self._dress = partial(read_finite, read or checkpoint.read), dress
        self.model = meta_model(checkpoint, torch.float32)
        refuse_strange(self.model, checkpoint.tensors, checkpoint.name)
        self.prefix, self.blocks = find_blocks(self.model)
        self.calls: list[Call] = []
        self._loaded: set[str] = set()
        reuse_memory()

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def head_name(self) -> str:
        """Canonical name of the output head."""
        names = self.checkpoint.tensors
        known = "lm_head.weight" in names  # older gpt-neox code calls the module `embed_out`
        return "lm_head" if known else self._name_of(self.model.get_output_embeddings())

    @property
    def embedding_name(self) -> str:
        """Module name of the input embedding."""
        return self._name_of(self.model.get_input_embeddings())

    def _name_of(self, wanted: nn.Module) -> str:
        names: dict[nn.Module, str] = {m: n for n, m in self.model.named_modules()}
        return names[wanted]

    def linear_names(self) -> set[str]:
        """Module names of the linears in all blocks, a mixture's experts one by one."""
        names = set()
        for name, module in self.blocks.named_modules(prefix=self.prefix):
            if isinstance(module, nn.Linear):
                names.add(name)
            elif is_fused_experts(module):
                count = module.gate_up_proj.shape[0]
                names |= {f"{name}.{e}.{part}" for e in range(count) for part in EXPERT_PARTS}
        return names

    def embed(self, windows: Tensor, path: Path) -> "HiddenStates":
        """Token windows `[n, length]` -> what the first block reads, kept in the file `path`."""
        self.prepare(windows)
        shape = (*windows.shape, int(self.model.config.get_text_config().hidden_size))
        states = HiddenStates(path, shape, self.dtype)
        for rows in self.slices(windows):
            states[rows] = self._through(windows[rows], [])[0]
        return states

    def prepare(self, windows: Tensor) -> None:
        """Record what the parent passes to every block for windows of this length.

        Raises OptimError (2) for windows longer than a family's learned positions.
        """
        config = self.model.config
        family = FAMILIES.get(config.model_type)
        limit, length = getattr(config, "max_position_embeddings", None), windows.shape[1]
        if family is not None and family.decoder.positions and limit and length > limit:
            what = f"{self.checkpoint.name} has {limit} learned positions, a window {length} tokens"
            raise OptimError(what, f"windows of {limit} tokens at most", 2)
        self._load_outer(head=False)
        self.calls = []
        self._through(windows[:1], [])

    def release(self) -> None:
        """Free embeddings and head; they are read again when next asked for."""
        self.model = meta_model(self.checkpoint, torch.float32)
        self.blocks = self.model.get_submodule(self.prefix)
        self._loaded = set()

    @staticmethod
    def slices(windows: "Tensor | HiddenStates") -> list[slice]:
        """Rows of `windows` in batches of about TOKENS_PER_BATCH tokens."""
        step = max(1, TOKENS_PER_BATCH // windows.shape[1])
        return [slice(i, i + step) for i in range(0, len(windows), step)]

    def logits(self, windows: Tensor, states: Tensor) -> Tensor:
        """Final hidden states `[n, t, hidden]` of `windows` `[n, t]` -> logits `[n, t, vocab]`."""
        self._load_outer(head=True)
        out = self._through(windows, [states.to(self.device, self.dtype)])[1]
        logits: Tensor = out.logits.float()
        return logits

    def block(self, i: int) -> nn.Module:
        """Block i with its weights read, on the device, in their stored dtype."""
        block = copy.deepcopy(self.blocks[i])
        if self._dress is not None:
            self._dress(block, f"{self.prefix}.{i}.")
        return self._fill(block, f"{self.prefix}.{i}.")

    def run(self, i: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """One batch `[b, t, hidden]` through block i as its parent would call it."""
        args, kwargs = self.calls[i]
        out: Tensor | tuple[Tensor, ...]
        with their_errors(self.checkpoint.name, type(self.model).__name__):
            out = block(hidden.to(self.device, self.dtype), *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _fill(self, module: nn.Module, prefix: str) -> nn.Module:
        for name, child in list(module.named_modules()):
            path = f"{prefix}{name}." if name else prefix
            self._fill_buffers(child, path)
            if isinstance(child, nn.Linear):
                module.set_submodule(name, self._linear(path, child.weight, child.bias))
            elif is_fused_experts(child):
                module.set_submodule(name, Experts.read(child, partial(self._expert, path)))
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                value = self._read(prefix + name).to(self.device, self.dtype)
                _set_parameter(module, name, value)
        return module.eval()

    def _fill_buffers(self, module: nn.Module, path: str) -> None:
        names = self.checkpoint.tensors
        fill_buffers(self.model, module, path, names, self._read, self.device)

    def _linear(self, path: str, weight: Tensor, bias: Tensor | None) -> StoredLinear:
        """The stored linear at `path`, shaped like `weight` and `bias` of the skeleton."""
        read = [
            _shaped(path + key, self._read(path + key), like).to(self.device)
            for key, like in (("weight", weight), ("bias", bias))
            if like is not None
        ]
        return StoredLinear(read[0], read[1] if len(read) == 2 else None)

    def _expert(self, path: str, name: str, like: Tensor) -> StoredLinear:
        return self._linear(f"{path}{name}.", like, None)

    def _load_outer(self, head: bool) -> None:
        """Fill what stands outside the blocks: embeddings, final norm, the head if asked for."""
        names = set(self.checkpoint.tensors)
        ends = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        for name, module in list(self.model.named_modules()):
            inside = name.startswith(self.prefix + ".") or name == self.prefix
            if inside or name in self._loaded or (module is ends[0] and not head):
                continue
            self._load_module(name, module, names, ends)
            self._loaded.add(name)
            if module is ends[1]:  # rotary tables take this dtype
                module.register_forward_hook(lambda _module, _args, out: out.to(self.dtype))

    def _load_module(
        self, name: str, module: nn.Module, names: set[str], tied: tuple[Any, Any]
    ) -> None:
        head, embedding = tied
        if module is head:
            name = self.head_name
            if f"{name}.weight" in names or not self.model.config.tie_word_embeddings:
                weight = self._read(f"{name}.weight")
            else:
                weight = embedding.weight.data
            bias = self._read(f"{name}.bias") if f"{name}.bias" in names else None
            self.model.set_output_embeddings(StoredLinear(weight.to(self.device), bias))
            return
        self._fill_buffers(module, f"{name}." if name else "")
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = self._read(f"{name}.{key}").to(self.device)
                keep = isinstance(module, nn.Embedding)
                _set_parameter(module, key, value if keep else value.to(self.dtype))

    def _through(self, windows: Tensor, put: list[Tensor]) -> tuple[Tensor, Any]:
        """Run the parent with tapped blocks; returns (what block 0 got, its output: with `put`,
        what the last block is to give, the logits)."""
        taken: list[Tensor] = []
        record: list[Call] | None = [] if not self.calls else None
        first, last = self.blocks[0], self.blocks[-1]

        def tap(block: nn.Module) -> Callable[..., Tensor]:
            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if record is not None:
                    record.append((args, kwargs))
                if block is first:
                    taken.append(hidden.to(self.dtype))
                return put[0] if put and block is last else hidden

            return forward

        for block in self.blocks:
            block.forward = tap(block)
        try:
            ids = windows.to(self.device)
            run = self.model if put else self.model.base_model
            with their_errors(self.checkpoint.name, type(self.model).__name__):
                out = run(input_ids=ids, use_cache=False)
        finally:
            for block in self.blocks:
                del block.forward
        if record is not None:
            self.calls = record
        return taken[0], out


def linear_at(block: nn.Module, path: str) -> StoredLinear:
    """The linear of a loaded block at `path`."""
    module = block.get_submodule(path)
    assert isinstance(module, StoredLinear), path
    return module


def linears(block: nn.Module) -> dict[str, StoredLinear]:
    """The linears of a loaded block by their path in it, in the order of definition."""
    return {name: m for name, m in block.named_modules() if isinstance(m, StoredLinear)}


def tokens_read(block: nn.Module, path: str) -> Tensor | None:
    """Which tokens of the batch the linear at `path` reads, in its order; None for all of them."""
    parts = path.split(".")
    for k in range(1, len(parts)):
        module = block.get_submodule(".".join(parts[:k]))
        if isinstance(module, Experts):
            return torch.where(module.chosen == int(parts[k]))[0]
    return None


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of like modules is the stack of decoder blocks."""
    lists = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len({type(b) for b in m}) == 1
    ]
    if not lists:
        raise OptimError(f"{type(model).__name__} has no list of decoder blocks", code=2)
    return max(lists, key=lambda pair: len(pair[1]))


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    value = _shaped(name, value, getattr(owner, key))
    setattr(owner, key, nn.Parameter(value, requires_grad=False))


def _shaped(name: str, value: Tensor, like: Tensor) -> Tensor:
    if value.shape != like.shape:
        raise OptimError(
            f"{name} has shape {list(value.shape)}, the configuration says {list(like.shape)}",
            fix="config.json and the weights do not belong together",
            code=2,
        )
    return value
