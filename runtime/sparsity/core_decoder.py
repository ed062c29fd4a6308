"""A decoder whose feed-forwards keep the core neurons of the prompt (CoreInfer) while it decodes.

A prompt is read densely and watched; the first token decoded after it chooses. One sequence at a
time: batches, and a cache that was not watched here, run densely. `refresh` tokens later the latest
tokens are read again densely and the choice is made anew; with `max_kl` the choice is first tried
on the end of the prompt, and given up where it moves the logits by more than that.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from optim.runtime.cache.full import LayeredCache, Policy
from optim.runtime.decoder.c_decode import one_call
from optim.runtime.decoder.decoder import Decoder
from optim.runtime.kernels.cpu.decode import Blocks
from optim.runtime.sparsity.core_ffn import CoreFeedForward
from optim.runtime.sparsity.core_neurons import Guide, chosen
from optim.runtime.sparsity.side_file import Side

TRIED = 64  # tokens of the prompt on which a choice is tried


@dataclass(slots=True)
class CoreDecoder:
    """`inner` with its feed-forwards told what to do; the same calls as a Decoder."""

    inner: Decoder
    side: Side
    feeds: list[CoreFeedForward]
    state: str = "unknown"  # "watched", "sparse", or "given up": decode densely
    kl: float | None = None
    _cache: LayeredCache | None = field(default=None, repr=False)
    _decoded: list[Tensor] = field(default_factory=list)
    _calls: dict[str, Blocks | None] = field(default_factory=dict)
    """All blocks in one call, where that can be, for the feed-forwards of each mode."""

    @property
    def max_context(self) -> int:
        return self.inner.max_context

    @property
    def crossing(self) -> int | None:
        return self.inner.crossing

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def skipped_bytes(self) -> float:
        return self.inner.skipped_bytes

    def new_cache(
        self, batch: int, limit: int, device: torch.device, padding: Tensor | None, policy: Policy
    ) -> LayeredCache:
        """As the inner decoder's."""
        return self.inner.new_cache(batch, limit, device, padding, policy)

    def __call__(self, ids: Tensor, cache: LayeredCache, all_logits: bool) -> Tensor:
        """As the inner decoder's."""
        ours = self._cache is cache
        if ids.shape[0] > 1 or (not ours and cache.length):
            return self._run("dense", ids, cache, all_logits)
        if not ours or not cache.length:
            self._begin(cache)
        if ids.shape[1] > 1 or not cache.length:
            logits = self._run("watch", ids, cache, all_logits)
            self.state, self._decoded = "watched", []
            self._choose(ids, cache)
            return logits
        if self.state != "sparse":
            return self._run("dense", ids, cache, all_logits)
        self._refresh(cache)
        self._decoded.append(ids)
        return self._run("sparse", ids, cache, all_logits)

    def _run(self, mode: str, ids: Tensor, cache: LayeredCache, all_logits: bool) -> Tensor:
        for feed in self.feeds:
            feed.mode = mode
        if mode not in self._calls:
            self._calls[mode] = one_call(self.inner.blocks, self.inner.shape)
        self.inner.one_call = None if mode == "watch" else self._calls[mode]
        return self.inner(ids, cache, all_logits)

    def _begin(self, cache: LayeredCache) -> None:
        self._cache, self.state, self._decoded = cache, "unknown", []
        for feed in self.feeds:
            feed.score, feed.compact = None, None

    def _choose(self, ids: Tensor, cache: LayeredCache) -> None:
        """Gather the neurons that the scores so far ask for, and try them if there is a budget."""
        guide = Guide(self.side, [])
        for feed in self.feeds:
            assert feed.score is not None
            if not guide.clusters:
                guide.assign(feed.score)
            feed.keep(chosen(guide.total(feed.score, feed.core), feed.core.keep))
        self.state = "sparse"
        self._calls.pop("sparse", None)
        limit = self.side.options.get("max_kl")
        if limit is not None and ids.shape[1] > 1:
            self.kl = self._divergence(ids[:, -TRIED:], cache)
            if not self.kl <= limit:
                self.state = "given up"

    def _divergence(self, ids: Tensor, cache: LayeredCache) -> float:
        """KL(dense || sparse) a token of the latest `ids`, whose cache is left as it was."""
        end, logs = cache.length, []
        for mode in ("sparse", "dense"):
            cache.truncate(end - ids.shape[1])
            logs.append(self._run(mode, ids, cache, True).log_softmax(-1))
        sparse, dense = logs
        return float((dense.exp() * (dense - sparse)).sum(-1).mean())

    def _refresh(self, cache: LayeredCache) -> None:
        """After so many tokens, read them again densely and choose by them."""
        every = int(self.side.options.get("refresh") or 0)
        if not every or len(self._decoded) < every:
            return
        ids, self._decoded = torch.cat(self._decoded, 1), []
        length = cache.length
        cache.truncate(length - ids.shape[1])
        if cache.length + ids.shape[1] != length:
            return  # a cache that had to let go of more: what is left goes on as it is
        for feed in self.feeds:
            feed.score = None
        self._run("watch", ids, cache, False)
        self._choose(ids[:, :0], cache)


def core_decoder(decoder: Decoder, side: Side) -> Decoder | CoreDecoder:
    """`decoder` as the side file asks: with core neurons if it names any."""
    feeds = [block.mlp for block in decoder.blocks if isinstance(block.mlp, CoreFeedForward)]
    return CoreDecoder(decoder, side, feeds) if feeds else decoder
