"""A family outside the table: transformers' modules run it, with our linears set in.

The model is made on the meta device, so nothing is allocated twice; each tensor is then read from
the checkpoint to its place. Embeddings, norms and rotary tables are transformers' own, and so is
what is handed on from token to token: keys and values, or the state of a recurrent family.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.cache.full import Policy
from optim.runtime.decoder.linears.base import Linear
from optim.runtime.decoder.linears.source import Source
from optim.runtime.engine.loader import Loader
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.walk.skeleton import (
    fill_buffers,
    is_fused_experts,
    meta_model,
    refuse_strange,
    their_errors,
)
from optim.runtime.walk.walk import Experts

STATES = ("cache", "past_key_values", "cache_params", "state")  # what a forward may call its state
CONTEXTS = ("max_position_embeddings", "max_seq_len", "context_length", "seq_length")


@dataclass(slots=True)
class ForeignCache:
    """What a model of transformers hands on, and the tokens that it stands for.

    The tokens are kept because not every state can be cut back: then all is read again.
    """

    limit: int
    padding: Tensor | None
    length: int = 0
    past: Any = None
    held: int = 0
    """Positions in `past`; fewer than `length` if a step was interrupted."""
    tokens: Tensor | None = None

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self.length = min(self.length, length)

    def resume(self, recurrent: bool, count: int) -> int:
        """The position from which `count` tokens more can be read, after the state held.

        A recurrent state stands for one text and goes on token by token; what cannot go on from
        it begins at 0, with no state.
        """
        ahead = self.held - self.length
        fits = not ahead and not (recurrent and count > 1)
        if ahead > 0 and not recurrent and _crops(self.past):
            self.past.crop(-ahead)
            fits = True
        if self.past is None or not fits:
            self.past = None
            return 0
        return self.length

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors(self.past))

    @property
    def summary(self) -> str:
        return f"{self.length} of {self.limit} tokens"


def _crops(past: Any) -> bool:
    """Whether all layers of a cache hold every position, so that the last can be taken off."""
    layers = getattr(past, "layers", None) or []
    return bool(layers) and all(type(layer).__name__ == "DynamicLayer" for layer in layers)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif type(value).__module__.startswith("transformers.cache_utils"):
        yield from _tensors(list(vars(value).values()))


@dataclass(slots=True)
class Foreign:
    """A transformers model that answers like a Decoder."""

    model: Any
    name: str
    max_context: int
    dtype: torch.dtype
    skipped_bytes: float = 0.0
    takes: frozenset[str] = field(init=False)
    state: str | None = field(init=False)
    recurrent: bool = field(init=False)

    def __post_init__(self) -> None:
        self.takes = frozenset(inspect.signature(self.model.forward).parameters)
        self.state = next((name for name in STATES if name in self.takes), None)
        self.recurrent = bool(getattr(self.model, "_is_stateful", False))

    def new_cache(
        self,
        batch: int,
        limit: int,
        device: torch.device,
        padding: Tensor | None,
        policy: Policy,
    ) -> ForeignCache:
        """An empty cache for at most `limit` positions; it grows with the text.

        OptimError (2) for a `policy` other than the plain one.
        """
        if policy != Policy():
            what = f"{self.model.config.model_type} runs through transformers, with a plain cache"
            raise OptimError(what, "leave out --kv-bits and --kv-policy", USAGE)
        return ForeignCache(limit, padding)

    def __call__(self, ids: Tensor, cache: ForeignCache, all_logits: bool) -> Tensor:
        """fp32 logits after `ids` `[B, T]`, which follow what is in `cache`: the last, or all T."""
        count = ids.shape[1]
        start = cache.resume(self.recurrent, count)
        before = None if cache.tokens is None else cache.tokens[:, : cache.length]
        whole = ids if before is None else torch.cat((before, ids), 1)
        cache.tokens, cache.held = whole, -1
        kept = count if all_logits else 1
        with their_errors(self.name, type(self.model).__name__):
            out = self.model(whole[:, start:], **self._inputs(whole, start, cache, kept))
        cache.length = whole.shape[1]
        cache.past = getattr(out, self.state, None) if self.state else None
        cache.held = cache.length if cache.past is not None else 0
        logits: Tensor = out.logits[:, -kept:].float()
        return logits if all_logits else logits[:, -1]

    def _inputs(self, whole: Tensor, start: int, cache: ForeignCache, kept: int) -> dict[str, Any]:
        """What the family's forward takes beside the tokens from `start` on."""
        end = whole.shape[1]
        places = torch.arange(start, end, device=whole.device)[None].expand(len(whole), -1)
        given: dict[str, Any] = {"use_cache": True, "logits_to_keep": kept}
        if cache.padding is not None and not (self.recurrent and start):
            every = torch.arange(end, device=whole.device)
            given["attention_mask"] = (every >= cache.padding[:, None]).long()
        if cache.padding is not None:
            places = (places - cache.padding[:, None]).clamp(min=0)
        given["position_ids"] = places
        given = {key: value for key, value in given.items() if key in self.takes}
        return given | ({self.state: cache.past} if self.state else {})


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model without its weights. Raises OptimError (2) for one that cannot be run."""
    model = meta_model(checkpoint, dtype)
    refuse_strange(model, checkpoint.tensors, checkpoint.source)
    return model


def build_foreign(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> tuple[Foreign, int]:
    """The model of `checkpoint` through transformers, and the bytes of weights a token reads.

    Raises OptimError (2) for a model type transformers does not know, or tensors that do not fit.
    """
    model = skeleton(checkpoint, dtype)
    loader, weight_bytes = Loader(checkpoint, device, dtype), 0
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (_stored(loader, name) or not _tied(model, module)):
            linear = _linear(loader, name, module.weight)
            model.set_submodule(name, linear)
            weight_bytes += linear.nbytes
        elif is_fused_experts(module):
            read = partial(_expert, loader, name)
            model.set_submodule(name, Experts.read(module, read))
    fill(model, loader)
    config = model.config
    found = (getattr(config, key, None) for key in CONTEXTS)
    context = next((n for n in found if type(n) is int and n > 0), 2048)
    return Foreign(model, checkpoint.source, context, dtype), weight_bytes


def _stored(source: Source, name: str) -> bool:
    return source.has(f"{name}.weight") or source.has(f"{name}.weight_packed")


def _tied(model: Any, module: nn.Module) -> bool:
    """A head that is the embedding: the file may leave it out."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return tied and module is model.get_output_embeddings()


def _expert(loader: Loader, path: str, name: str, like: Tensor) -> Linear:
    return _linear(loader, f"{path}.{name}", like)


def _linear(loader: Loader, name: str, like: Tensor) -> Linear:
    """The stored linear `name`, which must have the shape of the skeleton's weight `like`."""
    linear = loader.linear(name)
    _same(f"{name}.weight", (linear.out_features, linear.in_features), like)
    return linear


def _same(name: str, found: tuple[int, ...], like: Tensor) -> None:
    if found != tuple(like.shape):
        what = f"{name} is {list(found)}, expected {list(like.shape)}"
        raise OptimError(what, "config.json and the weights do not belong together", USAGE)


def fill(model: Any, source: Source) -> None:
    """Give every parameter and buffer that is still on the meta device its values.

    Raises OptimError (2) if the checkpoint lacks one, or has one of another shape.
    """
    checkpoint, missing = source.checkpoint, []
    plain = PlainView(checkpoint)  # a table may be packed
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        fill_buffers(model, module, prefix, checkpoint.tensors, checkpoint.read, source.device)
    for name, weight in list(model.named_parameters()):
        if not weight.is_meta:
            continue
        if name not in plain.tensors:
            missing.append(name)
            continue
        owner, _, leaf = name.rpartition(".")
        read = plain.read(name).to(source.device, source.dtype)
        value = nn.Parameter(read, requires_grad=False)
        _same(name, tuple(value.shape), weight)
        setattr(model.get_submodule(owner), leaf, value)
    if isinstance(model.get_output_embeddings(), nn.Linear):
        model.tie_weights()
    if any(weight.is_meta for weight in model.parameters()):
        raise OptimError(
            f"{checkpoint.source} lacks {missing[0]} and {len(missing) - 1} more",
            "this family's tensors are not named as transformers names them",
            USAGE,
        )
