"""The decoder: embeddings, blocks, head. A family is a row of architecture/table.py.

    h = embed(ids)
    for each block:  h += attention(norm(h));  h += mlp(norm(h))
    logits = head(norm(h))

with norms before, after or around, in sequence or in parallel, as the family says.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.rope import Rope
from optim.runtime.architecture.shape import Shape
from optim.runtime.cache.device_position import Place
from optim.runtime.cache.full import Layer, LayeredCache, Policy, StaticCache, static_layers
from optim.runtime.cache.quantized import packed_layers
from optim.runtime.cache.streaming import Turn, stream_cache
from optim.runtime.decoder.attention import Attention, Step
from optim.runtime.decoder.layers import FeedForward, Norm
from optim.runtime.decoder.linears.base import Linear, Table
from optim.runtime.kernels.cpu import decode
from optim.runtime.kernels.cpu import step as cpu_step
from optim.runtime.kernels.cpu.shortlist import MOST, Shortlist

Work = tuple[LayeredCache, Sequence[int]]
"""A text's cache and the tokens that follow what it holds."""
POSITION_OFFSET = 2  # OPT's learned positions start at row 2
CHUNK = 512  # tokens of a prompt computed at a time; bounds the scratch
STEPS = 8  # tokens up to which steps over all blocks at once are faster than block by block


@dataclass(slots=True)
class Block:
    """One decoder block; a norm that the family lacks is None."""

    attention: Attention
    mlp: FeedForward
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    parallel: bool
    residual_scale: float
    norm_after_add: bool

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a decoded token reads, if it leaves nothing out."""
        return self.attention.qkv.nbytes + self.attention.out.nbytes + self.mlp.nbytes

    @property
    def skipped_bytes(self) -> float:
        """Of those, how many were left out on average over the tokens decoded so far."""
        attention = self.attention
        read = attention.qkv.skipped_bytes + attention.out.skipped_bytes
        return read + self.mlp.skipped_bytes

    @property
    def recordable(self) -> bool:
        """Whether a recorded step may hold it."""
        attention = self.attention
        return attention.qkv.recordable and attention.out.recordable and self.mlp.recordable

    def __call__(self, h: Tensor, cache: Layer, step: Step) -> Tensor:
        """`h` `[B, T, hidden]` -> the same shape."""
        a = _norm(self.after_attention, self.attention(self._before(h), cache, step))
        if self.parallel:
            return h + a + self.mlp(_norm(self.before_mlp, h))
        if self.norm_after_add:
            h = _norm(self.before_attention, h + a)
            return _norm(self.before_mlp, h + self.mlp(h))
        h = torch.add(h, a, alpha=self.residual_scale)
        m = _norm(self.after_mlp, self.mlp(_norm(self.before_mlp, h)))
        return torch.add(h, m, alpha=self.residual_scale)

    def _before(self, h: Tensor) -> Tensor:
        return h if self.norm_after_add else _norm(self.before_attention, h)


def _norm(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


@dataclass(slots=True)
class Decoder:
    """The whole model; tensors are made by build.py."""

    shape: Shape
    embed: Table
    positions: Tensor | None
    project_in: nn.Module | None
    ropes: dict[str, Rope]
    blocks: Sequence[Block]
    norm: Norm | None
    project_out: nn.Module | None
    head: Linear
    dtype: torch.dtype
    cache_dtype: torch.dtype
    one_call: decode.Blocks | None
    shortlist: Shortlist | None = None
    """The head, where only its largest outputs are asked for."""
    prefix: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Keys and values `[1, P, kv_heads, D]` of each block that every text begins with."""

    @property
    def prefix_length(self) -> int:
        """Positions before the first token of a text."""
        return self.prefix[0][0].shape[1] if self.prefix else 0

    @property
    def max_context(self) -> int:
        return self.shape.max_context - self.prefix_length

    @property
    def skipped_bytes(self) -> float:
        """Bytes of weights that a token did not read, on average over those decoded so far."""
        in_blocks = sum(self.blocks[i].skipped_bytes for i in range(len(self.blocks)))
        if self.shortlist is None or not self.shortlist.tokens:
            return in_blocks
        rows = self.shortlist.rows_read / self.head.out_features
        return in_blocks + self.head.nbytes * (1 - rows) - self.shortlist.nbytes

    def new_cache(
        self,
        batch: int,
        limit: int,
        device: torch.device,
        padding: Tensor | None,
        policy: Policy,
    ) -> LayeredCache:
        """An empty cache for `batch` rows of at most `limit` positions.

        OptimError (2) where `policy` does not fit this family, or a batch.
        """
        count, heads, dim = len(self.blocks), self.shape.kv_heads, self.shape.head_dim
        if policy.bits == 16:
            layers = self.empty_layers(batch, device, self.cache_dtype)
        else:
            layers = packed_layers(count, batch, heads, dim, device, policy.bits)
        if policy.kind == "stream" and self.prefix:
            what = "the model begins every text with tokens of its own, which a stream would forget"
            raise OptimError(what, "--kv-policy full", USAGE)
        if policy.kind == "stream" and self.crossing is not None and limit > self.crossing:
            what = f"a text longer than {self.crossing} tokens has other rotary angles"
            raise OptimError(what, f"--context {self.crossing}, or --kv-policy full", USAGE)
        if policy.kind == "stream":
            return stream_cache(layers, self._turns(limit), limit, batch)
        cache = StaticCache(layers, limit, padding=padding, prefix=self.prefix_length)
        if self.prefix:
            cache.reserve(self.prefix_length)
        for layer, (keys, values) in zip(layers, self.prefix, strict=False):
            layer.write(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), 0)
        return cache

    def empty_layers(self, batch: int, device: torch.device, dtype: torch.dtype) -> list[Layer]:
        """A cache's layers with values as they are, as this decoder's attention wants them."""
        torch_only = device.type == "cpu" and self.blocks[0].attention.one_token is None
        sizes = len(self.blocks), batch, self.shape.kv_heads, self.shape.head_dim
        return static_layers(*sizes, device, dtype, transposed=torch_only)

    def _turns(self, limit: int) -> list[Turn | None]:
        """How each block's keys are moved to other positions."""
        if self.positions is not None:
            what = "a family with learned positions cannot stream"
            raise OptimError(what, "--kv-policy full", USAGE)

        def turn(rope: Rope) -> Turn:
            return lambda keys, by: rope.turn(keys, by, limit)

        kinds = [block.attention.rope for block in self.blocks]
        return [turn(self.ropes[kind]) if kind else None for kind in kinds]

    def __call__(self, ids: Tensor, cache: LayeredCache, all_logits: bool) -> Tensor:
        """fp32 logits after `ids` `[B, T]`, which follow what is in `cache`: the last, or all T."""
        asked = ids.shape[1]
        if self.crossing is not None:
            ids = self._from_the_start(ids, cache, self.crossing)
        end = min(cache.length + ids.shape[1], cache.span) + self.prefix_length
        if self._few(ids, cache):
            h = self._steps([(cache, ids[0].tolist())], end)[0]
            return self._rows(h)[None] if all_logits else self._rows(h[-1:])
        logits = []
        for chunk in torch.split(ids, min(CHUNK, cache.step), 1):
            h = self._hidden(chunk, cache, end)
            if all_logits:
                logits.append(self._logits(h))
        return torch.cat(logits, 1)[:, -asked:] if all_logits else self._logits(h[:, -1:])[:, 0]

    def read(self, ids: Tensor, cache: LayeredCache, piece: int) -> Generator[None, None, Tensor]:
        """fp32 logits `[1, vocab]` after `ids` `[1, T]`, which are read `piece` tokens at a time.

        There is a pause after each block of each piece: other caches may go on in it, and this one
        may be left there, with the pieces that it has.
        """
        if self.crossing is not None:
            ids = self._from_the_start(ids, cache, self.crossing)
        end = min(cache.length + ids.shape[1], cache.span) + self.prefix_length
        for part in torch.split(ids, min(piece, cache.step), 1):
            if self._few(part, cache):
                h = self._steps([(cache, part[0].tolist())], end)[0][None]
                yield
            else:
                h = yield from self._blocks(part, cache, end)
        return self._logits(h[:, -1:])[:, 0]

    def _few(self, ids: Tensor, cache: LayeredCache) -> bool:
        """Whether all blocks at once, a token after the other, are the faster way for `ids`."""
        few = len(ids) == 1 and ids.shape[1] <= (1 if self._scaled else STEPS)
        return few and self._steps_read(cache)

    @property
    def crossing(self) -> int | None:
        """The length past which a text has other rotary angles, also of what was read before."""
        limits = [rope.crossing for rope in self.ropes.values() if rope.crossing is not None]
        return min(limits) - self.prefix_length if limits else None

    def _from_the_start(self, ids: Tensor, cache: LayeredCache, crossing: int) -> Tensor:
        """`ids`; after all that the cache holds, if that was read with the other angles."""
        assert isinstance(cache, StaticCache)
        whole, before = ids, cache.length
        if before:
            assert cache.seen is not None
            whole = torch.cat((cache.seen[:, :before], ids), 1)
        was, cache.long, cache.seen = cache.long, whole.shape[1] > crossing, whole
        if before and was != cache.long:
            cache.truncate(0)
            return whole
        return ids

    def _hidden(self, ids: Tensor, cache: LayeredCache, end: int) -> Tensor:
        blocks = self._blocks(ids, cache, end)
        while True:
            try:
                next(blocks)
            except StopIteration as done:
                h: Tensor = done.value
                return h

    def _blocks(self, ids: Tensor, cache: LayeredCache, end: int) -> Generator[None, None, Tensor]:
        """What the blocks make of `ids` `[B, T]`: `[B, T, hidden]`; a pause after each."""
        h, step = self._begin(ids, cache, end)
        call = self.one_call if len(ids) == 1 and self._steps_read(cache) else None
        if call is not None and call.reads(cache.layers):
            yield from call.read(h, decode.Part(cache, step.start, ids.shape[1]), step.angles)
        else:
            for block, layer in zip(self.blocks, cache.layers, strict=True):
                h = block(h, layer, step)
                yield
        cache.length += ids.shape[1]
        return h

    def steps_at_once(self, cache: LayeredCache) -> bool:
        """Whether a few tokens that follow `cache` go through all blocks in one call."""
        return self._steps_read(cache) and not self._scaled

    def _steps_read(self, cache: LayeredCache) -> bool:
        """Whether the C step can go on from this cache."""
        alone = self.one_call is not None and cache.padding is None
        return alone and all(map(cpu_step.reads, cache.layers))

    @property
    def _scaled(self) -> bool:
        """Whether a token's angles depend on the length of the text."""
        return any(rope.scaled for rope in self.ropes.values())

    def step_many(self, work: Sequence[Work], best: int = 0) -> list[Tensor]:
        """fp32 logits `[k, vocab]` after each token of each text: its cache and k tokens.

        In every bit those of a step a token; in one call where `steps_at_once`. If only the `best`
        largest of each row matter, smaller ones may be minus infinity; 0: all do.
        """
        if not work or not all(self.steps_at_once(cache) for cache, _ in work):
            return [torch.cat([self._alone(i, cache) for i in ids]) for cache, ids in work]
        logits = self._rows(torch.cat(self._steps(work)), best)
        return list(torch.split(logits, [len(ids) for _, ids in work]))

    def _alone(self, token: int, cache: LayeredCache) -> Tensor:
        place = cache.layers[0].keys_at(0, 0).device
        return self(torch.tensor([[token]], device=place), cache, False)

    def _steps(self, work: Sequence[Work], end: int = 0) -> list[Tensor]:
        """What the blocks make of each text's tokens: `[k, hidden]`.

        A text goes as far in a call as its cache stays as it is. `end` as for `_enter`.
        """
        assert self.one_call is not None
        done: list[list[Tensor]] = [[] for _ in work]
        left = list(range(len(work)))
        while left:
            parts: list[decode.Part] = []
            tokens: list[int] = []
            for i in left:
                cache, ids = work[i]
                rest = ids[sum(map(len, done[i])) :]
                start, count = cache.place_run(len(rest))
                parts.append(decode.Part(cache, start, count))
                tokens += rest[:count]
            places = [torch.arange(p.cache.length, p.cache.length + p.count) for p in parts]
            h, angles = self._enter(torch.tensor([tokens]), torch.cat(places)[None], None, end)
            self.one_call(h, parts, angles)
            counts = [part.count for part in parts]
            for i, part, rows in zip(left, parts, torch.split(h[0], counts), strict=True):
                part.cache.length += part.count
                done[i].append(rows)
            left = [i for i in left if sum(map(len, done[i])) < len(work[i][1])]
        return [rows[0] if len(rows) == 1 else torch.cat(rows) for rows in done]

    def _rows(self, h: Tensor, best: int = 0) -> Tensor:
        """fp32 logits of `h` `[n, hidden]`, each row in every bit as alone; `best`: step_many."""
        h, head = _norm(self.norm, h), self.head
        if self.shortlist is not None and 0 < best <= MOST:
            return self.shortlist(h, best)
        parts = [head(part) for part in torch.split(h, min(head.alike, len(h)))]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.shape.logit_cap is None:
            return self._capped(logits.float())
        return torch.cat([self._capped(row) for row in torch.split(logits.float(), 1)])

    def step(self, ids: Tensor, cache: LayeredCache, place: Place) -> Tensor:
        """fp32 logits `[B, vocab]` after one token `ids` `[B, 1]` at `place`, on any device.

        Nothing about the place is read by the host, and `cache.length` stays as it is.
        """
        h, angles = self._enter(ids, place.position[None], cache.padding, 0)
        step = Step(0, angles, cache.padding, self.prefix_length, place)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            h = block(h, layer, step)
        return self._logits(h)[:, 0]

    def _begin(self, ids: Tensor, cache: LayeredCache, end: int) -> tuple[Tensor, Step]:
        start, t = cache.place(ids.shape[1]), ids.shape[1]
        places = torch.arange(cache.length, cache.length + t, device=ids.device)[None]
        h, angles = self._enter(ids, places, cache.padding, end)
        return h, Step(start, angles, cache.padding, self.prefix_length)

    def _enter(
        self, ids: Tensor, places: Tensor, padding: Tensor | None, end: int
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The embedded `ids` `[B, T]` at `places` `[1, T]` of a text of `end`, and the angles."""
        if padding is not None:
            places = (places - padding[:, None]).clamp_(min=0)
        places = places + self.prefix_length
        h = self.embed[ids].to(self.dtype)
        if self.shape.embed_scale != 1:
            h = h * self.shape.embed_scale
        if self.project_in is not None:
            h = self.project_in(h)
        if self.positions is not None:
            h = h + self.positions[places + POSITION_OFFSET].to(h.dtype)
        return h, {kind: rope.angles(places, end) for kind, rope in self.ropes.items()}

    def _logits(self, h: Tensor) -> Tensor:
        h = _norm(self.norm, h)
        if self.project_out is not None:
            h = self.project_out(h)
        return self._capped(self.head(h).float())

    def _capped(self, logits: Tensor) -> Tensor:
        if self.shape.logit_scale != 1:
            logits = logits * self.shape.logit_scale
        cap = self.shape.logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap
