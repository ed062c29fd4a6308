"""A decoder on a GPU whose one-token step is recorded as a CUDA graph and replayed.

A step is hundreds of launches, and launching a kernel takes longer than many of them run. The
recorded step reads its token and its place (cache/device_position.py) from fixed buffers, and the
cache's buffers where they were when it was recorded: it is recorded anew where they have moved. The
first few steps run unrecorded, which also compiles the kernels. What cannot be recorded, or fails
to be, runs as it always did.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optim.runtime.cache.device_position import Place, buffers, prepared
from optim.runtime.cache.full import LayeredCache, Policy
from optim.runtime.decoder.decoder import Decoder

WARM = 4  # steps before one is worth recording

Step = Callable[[], Tensor]
Key = tuple[object, ...]


@dataclass(slots=True)
class GraphDecoder:
    """`inner`, with a recorded step; the same calls as a Decoder.

    `record` turns a step into one that does the same work again, and returns the same tensor.
    """

    inner: Decoder
    record: Callable[[Step], Step]
    failure: str = ""
    _key: Key = ()
    _steps: int = 0
    _replay: Step | None = field(default=None, repr=False)
    _ids: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    _numbers: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

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

    @property
    def state(self) -> str:
        """How one-token steps run: `steps recorded`."""
        if self.failure:
            return f"steps not recorded: {self.failure}"
        return "steps recorded" if self._replay else "steps not recorded yet"

    def new_cache(
        self, batch: int, limit: int, device: torch.device, padding: Tensor | None, policy: Policy
    ) -> LayeredCache:
        """As the inner decoder's."""
        return self.inner.new_cache(batch, limit, device, padding, policy)

    def __call__(self, ids: Tensor, cache: LayeredCache, all_logits: bool) -> Tensor:
        """As the inner decoder's."""
        if ids.shape[1] > 1 or self.failure or self.inner.crossing is not None:
            return self.inner(ids, cache, all_logits)
        start = cache.place(1)
        bases = [prepared(layer, start) for layer in cache.layers]
        self._look(ids, cache)
        if self._steps < WARM:
            self._steps += 1
            return self.inner(ids, cache, all_logits)
        self._ids.copy_(ids)
        self._numbers.copy_(
            torch.tensor([cache.length, start - bases[0], bases[0], start + 1], dtype=torch.int64)
        )
        if self._replay is None and not self._recorded(cache):
            return self.inner(ids, cache, all_logits)
        assert self._replay is not None
        logits = self._replay().clone()
        cache.length += 1
        return logits[:, None] if all_logits else logits

    def _look(self, ids: Tensor, cache: LayeredCache) -> None:
        """Forget the recorded step if the buffers that it uses are not those of `cache`."""
        held = [tensor for layer in cache.layers for tensor in buffers(layer)]
        pads = 0 if cache.padding is None else cache.padding.data_ptr()
        key = (len(ids), pads, held[0].shape, *(tensor.data_ptr() for tensor in held))
        if key != self._key:
            self._key, self._steps, self._replay = key, 0, None
            self._ids = torch.zeros_like(ids)
            self._numbers = torch.zeros(4, dtype=torch.int64, device=ids.device)

    def _recorded(self, cache: LayeredCache) -> bool:
        place, ids = Place(self._numbers), self._ids
        try:
            self._replay = self.record(lambda: self.inner.step(ids, cache, place))
        except RuntimeError as error:
            self.failure = str(error).partition("\n")[0] or type(error).__name__
        return self._replay is not None


def cuda_graph(step: Step) -> Step:
    """`step` as a CUDA graph. RuntimeError where it does what a graph cannot hold."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # whatever a library sets up at its first call on a stream
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def recordable(decoder: Decoder) -> bool:
    """Whether the host decides and counts nothing within a step: no experts to pick, no angles that
    depend on the length, no weights that are left out."""
    if not isinstance(decoder.blocks, list):  # offloaded: they come and go
        return False
    scaled = any(rope.scaled for rope in decoder.ropes.values())
    return not scaled and all(block.recordable for block in decoder.blocks)
