"""A runnable model: an artifact or a plain checkpoint behind one small interface."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.build import build
from optim.runtime.cache import StaticCache, static_cache
from optim.runtime.checkpoint import Checkpoint, open_checkpoint
from optim.runtime.decoder import Decoder
from optim.runtime.machine import compute_dtype, pick_device

if TYPE_CHECKING:
    from optim.runtime.text import Tokenizer


@dataclass(slots=True)
class Model:
    """`forward` and `new_cache` are all that generation needs."""

    checkpoint: Checkpoint
    decoder: Decoder
    device: torch.device
    weight_bytes: int
    """Bytes of weights that one decoded token reads."""
    _tokenizer: "Tokenizer | None" = field(default=None, repr=False)

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.text_config

    @property
    def max_context(self) -> int:
        return self.decoder.shape.max_context

    @property
    def place(self) -> str:
        """Where and in what it computes: `cpu, 2 threads, fp32`."""
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.decoder.dtype]
        if self.device.type == "cpu":
            return f"cpu, {torch.get_num_threads()} threads, {dtype}"
        return f"{torch.cuda.get_device_name(self.device)}, {dtype}"

    @property
    def tokenizer(self) -> "Tokenizer":
        if self._tokenizer is None:
            self._tokenizer = self.checkpoint.tokenizer()
        return self._tokenizer

    def new_cache(
        self, batch: int = 1, length: int | None = None, padding: Sequence[int] | None = None
    ) -> StaticCache:
        """An empty cache for at most `length` positions (default: the model's context).

        `padding` counts the pad tokens at the left of each row of a batch.
        """
        shape = self.decoder.shape
        return static_cache(
            layers=len(shape.layers),
            batch=batch,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            limit=length or shape.max_context,
            device=self.device,
            dtype=torch.float32 if self.device.type == "cpu" else self.decoder.dtype,
            padding=None if padding is None else torch.tensor(padding, device=self.device),
        )

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: StaticCache, *, all_logits: bool = False) -> Tensor:
        """Logits after `ids` (int64 `[B, T]`), which go on from what `cache` holds.

        fp32 `[B, vocab]` of the last position, or `[B, T, vocab]` with `all_logits`.
        Raises OptimError (2) where the cache's limit would be passed.
        """
        if cache.length + ids.shape[1] > cache.limit:
            raise OptimError(
                f"{cache.length + ids.shape[1]} tokens do not fit a context of {cache.limit}",
                "shorten the prompt, or give a larger --context",
                USAGE,
            )
        return self.decoder(ids.to(self.device), cache, all_logits)


def load_model(
    source: "str | Checkpoint", *, device: str = "auto", threads: int | None = None
) -> Model:
    """Make `source` runnable on `device` ("auto": a GPU if there is one), with `threads` on a CPU.

    Raises OptimError: 2 for a source that cannot be read, 4 for a device that is not there.
    """
    if threads:
        torch.set_num_threads(threads)
    place = pick_device(device)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    decoder, weight_bytes = build(checkpoint, place, compute_dtype(place))
    return Model(checkpoint, decoder, place, weight_bytes)
