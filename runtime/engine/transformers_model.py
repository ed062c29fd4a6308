"""A family outside the table: transformers' modules run it, with our linears set in.

The model is made on the meta device, so nothing is allocated twice; each tensor is then read from
the checkpoint to its place. Embeddings, norms and rotary tables are transformers' own.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.cache.full import Policy, Reading
from optim.runtime.decoder.linears.source import Source
from optim.runtime.engine.loader import Loader
from optim.runtime.storage.checkpoint import Checkpoint


class ForeignCache:
    """transformers' DynamicCache behind the interface of StaticCache."""

    def __init__(self, limit: int, padding: Tensor | None) -> None:
        from transformers import DynamicCache

        self.past: Any = DynamicCache()
        self.limit, self.padding, self.length = limit, padding, 0
        self.reading: Reading | None = None  # a prompt is read in one piece

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self.length = min(self.length, length)
        if self.past.get_seq_length() > self.length:  # an interrupted step left more
            self.past.crop(self.length)

    @property
    def nbytes(self) -> int:
        held = (t for layer in self.past.layers for t in vars(layer).values())
        return sum(t.nbytes for t in held if isinstance(t, Tensor))

    @property
    def summary(self) -> str:
        return f"{self.length} of {self.limit} tokens"


@dataclass(slots=True)
class Foreign:
    """A transformers model that answers like a Decoder."""

    model: Any
    max_context: int
    dtype: torch.dtype
    skipped_bytes: float = 0.0

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
        end = cache.length + ids.shape[1]
        cache.truncate(cache.length)
        places = torch.arange(cache.length, end, device=ids.device)[None].expand_as(ids)
        mask = None
        if cache.padding is not None:
            places = (places - cache.padding[:, None]).clamp(min=0)
            mask = (torch.arange(end, device=ids.device) >= cache.padding[:, None]).long()
        out = self.model(
            ids,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache.past,
            use_cache=True,
            logits_to_keep=0 if all_logits else 1,
        )
        cache.length = end
        logits: Tensor = out.logits.float()
        return logits if all_logits else logits[:, -1]


def build_foreign(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> tuple[Foreign, int]:
    """The model of `checkpoint` through transformers, and the bytes of weights a token reads.

    Raises OptimError (2) for a model type transformers does not know, or tensors that do not fit.
    """
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    config = checkpoint.hf_config()
    with torch.device("meta"):
        model = factory.from_config(config, dtype=dtype).eval()
    loader, weight_bytes = Loader(checkpoint, device, dtype), 0
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not _tied(name, config):
            linear = loader.linear(name)
            model.set_submodule(name, linear)
            weight_bytes += linear.nbytes
    fill(model, loader)
    context = getattr(config, "max_position_embeddings", None) or 2048
    return Foreign(model, int(context), dtype), weight_bytes


def _tied(name: str, config: Any) -> bool:
    return name == "lm_head" and bool(getattr(config, "tie_word_embeddings", False))


def fill(model: Any, source: Source) -> None:
    """Give every parameter and buffer that is still on the meta device its values.

    Raises OptimError (2) if the checkpoint lacks one.
    """
    for module in model.modules():
        _fresh_buffers(model, module, source.device)
    missing = []
    for name, weight in list(model.named_parameters()):
        if not weight.is_meta:
            continue
        if not source.has(name):
            missing.append(name)
            continue
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(source.tensor(name, source.dtype), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, value)
    model.tie_weights()
    if any(weight.is_meta for weight in model.parameters()):
        raise OptimError(
            f"{source.checkpoint.source} lacks {missing[0]} and {len(missing) - 1} more",
            "this family's tensors are not named as transformers names them",
            USAGE,
        )


def _fresh_buffers(model: Any, module: nn.Module, device: torch.device) -> None:
    """Buffers that no checkpoint has (rotary frequencies) come from transformers' own init."""
    own = {k: b for k, b in module.named_buffers(recurse=False) if b.is_meta}
    for key, buffer in own.items():
        module.register_buffer(key, torch.empty_like(buffer, device=device), persistent=False)
    if own and all(p.is_meta for p in module.parameters(recurse=False)):
        model._init_weights(module)
