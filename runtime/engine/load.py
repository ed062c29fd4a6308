"""A runnable model: an artifact or a plain checkpoint behind one small interface."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.table import FAMILIES
from optim.runtime.cache.full import Cache, LayeredCache, Policy, StaticCache
from optim.runtime.cache.streaming import StreamCache
from optim.runtime.decoder.cuda_graph import GraphDecoder, cuda_graph, recordable
from optim.runtime.decoder.decoder import CHUNK, Decoder, Work
from optim.runtime.decoder.linears.bf12 import prospect
from optim.runtime.decoder.linears.source import Form
from optim.runtime.decoder.linears.static_int import fast_product
from optim.runtime.engine.build import build
from optim.runtime.engine.transformers_model import build_foreign, skeleton
from optim.runtime.formats.static_int import read_config
from optim.runtime.kernels.compile import REFUSED, turned_off
from optim.runtime.sparsity.core_decoder import CoreDecoder
from optim.runtime.sparsity.side_file import SIDE
from optim.runtime.storage.checkpoint import Checkpoint, schemes_of
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.system.devices import compute_dtype, pick_device
from optim.runtime.system.memory import release_memory
from optim.runtime.text.tokenizer import Tokenizer


class Runner(Protocol):
    """A Decoder, or transformers' modules behind the same calls."""

    @property
    def max_context(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def skipped_bytes(self) -> float: ...
    def new_cache(
        self,
        batch: int,
        limit: int,
        device: torch.device,
        padding: Tensor | None,
        policy: Policy,
    ) -> Any: ...
    def __call__(self, ids: Tensor, cache: Any, all_logits: bool) -> Tensor: ...


@dataclass(slots=True)
class Model:
    """`forward` and `new_cache` are all that generation needs."""

    checkpoint: Checkpoint
    decoder: Runner
    device: torch.device
    weight_bytes: int
    """Bytes of weights that one decoded token reads."""
    _tokenizer: Tokenizer | None = field(default=None, repr=False)

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.text_config

    @property
    def max_context(self) -> int:
        return self.decoder.max_context

    @property
    def advice(self) -> str | None:
        """What to know about this model on this machine, if another form would run faster."""
        if self.checkpoint.layout is not None:
            gains, words = prospect(self.device)
            return None if gains else f"weights packed without loss: {words}"
        if read_config(self.checkpoint.quantization) is None or self.device.type != "cpu":
            return None
        if fast_product("cpu") is None:
            return "static integers have no kernel here (see `optim doctor`): torch computes them"
        return "static integers are made for GPUs: on a CPU, 4-bit AWQ weights decode faster"

    @property
    def refused(self) -> str | None:
        """Which kernels are not used though they were wanted, and why; None if that was asked."""
        if not REFUSED or turned_off():
            return None
        reasons: dict[str, list[str]] = {}
        for kernel, why in REFUSED.items():
            reasons.setdefault(why, []).append(kernel)
        said = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
        return f"not used here: {said}. torch computes instead, slower: `optim doctor` says more"

    @property
    def place(self) -> str:
        """Where and in what it computes: `cpu, 2 threads, fp32`."""
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.decoder.dtype]
        if self.device.type == "cpu":
            return f"cpu, {torch.get_num_threads()} threads, {dtype}"
        steps = (
            self.decoder.state if isinstance(self.decoder, GraphDecoder) else "steps not recorded"
        )
        return f"{torch.cuda.get_device_name(self.device)}, {dtype}, {steps}"

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = self.checkpoint.tokenizer()
        return self._tokenizer

    @property
    def token_bytes(self) -> float:
        """Bytes of weights read for a token: `weight_bytes` less what was skipped so far."""
        return self.weight_bytes - self.decoder.skipped_bytes

    def context(self, asked: int | None) -> int:
        """`asked`, or the model's own. Raises OptimError (2) if that is more than it has."""
        if asked and asked > self.max_context:
            raise OptimError(
                f"a context of {asked} is more than the model's {self.max_context}",
                f"--context {self.max_context} at most",
                USAGE,
            )
        return asked or self.max_context

    def more_room(self, context: int) -> str:
        """What to do about a text that does not fit a `context`."""
        larger = f", or give a larger --context ({self.max_context} at most)"
        return f"shorten it{larger if context < self.max_context else ''}"

    def new_cache(
        self,
        batch: int = 1,
        length: int | None = None,
        padding: Sequence[int] | None = None,
        policy: Policy | None = None,
    ) -> Cache:
        """An empty cache for at most `length` positions (default: the model's context).

        `padding` counts the pad tokens at the left of each row of a batch. Raises OptimError (2)
        where the model, or a batch, cannot have such a `policy`.
        """
        pads = None if padding is None else torch.tensor(padding, device=self.device)
        limit = length or self.max_context
        kind = policy or Policy()
        cache: Cache = self.decoder.new_cache(batch, limit, self.device, pads, kind)
        return cache

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: Cache, *, all_logits: bool = False) -> Tensor:
        """Logits after `ids` (int64 `[B, T]`), which go on from what `cache` holds.

        fp32 `[B, vocab]` of the last position, or `[B, T, vocab]` with `all_logits`.
        Raises OptimError (2) where the cache's limit would be passed.
        """
        self._check_room(cache, ids.shape[1])
        return self.decoder(ids.to(self.device), cache, all_logits)

    @property
    def one_at_a_time(self) -> bool:
        """Whether texts cannot be written side by side: core neurons are chosen for one text."""
        return isinstance(self.decoder, CoreDecoder)

    @property
    def piece(self) -> int:
        """Tokens of a prompt that are read at a time: texts that share some share whole pieces."""
        return 128 if self.device.type == "cpu" else CHUNK

    @torch.inference_mode()
    def read(self, ids: Sequence[int], cache: Cache) -> Generator[None, None, Tensor]:
        """Logits `[1, vocab]` after a prompt, read in pieces from where `cache` is.

        With pauses in which other caches may go on, but for models that read a prompt at once.
        Raises OptimError (2) where the cache's limit would be passed.
        """
        self._check_room(cache, len(ids))
        tokens = torch.tensor([ids], device=self.device)
        if isinstance(self.decoder, Decoder):
            blocks = self.decoder.read(tokens, cast(LayeredCache, cache), self.piece)
            return (yield from blocks)
        yield
        return self.decoder(tokens, cache, False)

    @torch.inference_mode()
    def step_many(self, work: Sequence[tuple[Cache, Sequence[int]]], best: int = 0) -> list[Tensor]:
        """Logits after every token of several texts: their caches, and the few tokens that follow.

        fp32 `[k, vocab]` a text, in every bit what `forward` gives for one token after the other,
        whatever else is in `work`; so are the caches. `truncate` takes tokens back. A cache, of one
        row, stands in `work` once. Prompts are for `forward`: this computes logits for every token.
        If only the `best` largest of a row matter, smaller ones may be minus infinity; 0: all do.
        Raises OptimError (2), and changes nothing, where the limit of a cache would be passed.
        """
        for cache, tokens in work:
            self._check_room(cache, len(tokens))
        if isinstance(self.decoder, Decoder):
            return self.decoder.step_many(cast(Sequence[Work], work), best)
        return [torch.cat([self._one(token, cache) for token in ids]) for cache, ids in work]

    @torch.inference_mode()
    def undoable(self, cache: Cache, count: int) -> int:
        """How many of `count` tokens that follow `cache` one step computes together, and `truncate`
        takes back without a trace; 1 where this model, or cache, goes on a token at a time."""
        decoder = self.decoder
        if not isinstance(decoder, Decoder) or not isinstance(cache, StaticCache | StreamCache):
            return 1
        return cache.place_run(count)[1] if decoder.steps_at_once(cache) else 1

    def _one(self, token: int, cache: Cache) -> Tensor:
        return self.decoder(torch.tensor([[token]], device=self.device), cache, False)

    def _check_room(self, cache: Cache, count: int) -> None:
        if cache.length + count > cache.limit:
            raise OptimError(
                f"{cache.length + count} tokens do not fit a context of {cache.limit}",
                self.more_room(cache.limit),
                USAGE,
            )


def load_model(
    source: "str | Checkpoint",
    *,
    device: str = "auto",
    threads: int | None = None,
    form: Form = "planes",
    offload: bool = False,
) -> Model:
    """Make `source` runnable on `device` ("auto": a GPU if there is one), with `threads` on a CPU.

    `form` says how weights that were packed without loss are held: see linears/source.Form;
    `offload` leaves the blocks in the host's memory (runtime/decoder/offload.py).
    Raises OptimError: 2 for a source that cannot be read, 4 for a device that is not there.
    """
    if threads:
        torch.set_num_threads(threads)
    place = pick_device(device)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if form == "planes" and checkpoint.store.files[0].suffix == ".gguf":
        from optim.runtime.storage.gguf.packed import with_integers

        checkpoint = with_integers(checkpoint)
    known = checkpoint.family in FAMILIES
    if offload:
        _check_offload(checkpoint, place, known)
    ours = partial(build, form=form, offload=offload)
    make: Callable[..., tuple[Runner, int]] = ours if known else build_foreign
    # Parsing a vocabulary takes 50 MB for a moment: before the weights are there.
    tokenizer = checkpoint.tokenizer() if _has_tokenizer(checkpoint) else None
    release_memory()
    decoder, weight_bytes = make(checkpoint, place, compute_dtype(place))
    if place.type == "cuda" and isinstance(decoder, Decoder) and recordable(decoder):
        decoder = GraphDecoder(decoder, cuda_graph)
    release_memory()
    return Model(checkpoint, decoder, place, weight_bytes, tokenizer)


def why_not(source: str) -> str | None:
    """Why `load_model` refuses `source`, as far as its configuration and headers say; else None."""
    try:
        checkpoint = open_checkpoint(source)
        schemes_of(checkpoint)
        if checkpoint.family not in FAMILIES:
            skeleton(checkpoint, torch.float32)
    except OptimError as problem:
        return problem.message
    return None


def _check_offload(checkpoint: Checkpoint, place: torch.device, known: bool) -> None:
    """Whether blocks can come from the host's memory, one after the other."""
    why = None
    if place.type == "cpu":
        why = "there is nothing to offload: this runs on the CPU, whose memory holds all blocks"
    elif not known or (checkpoint.folder / SIDE).is_file():
        why = "blocks of a pruned model, or of a family that is not in the table, stay in one place"
    if why is not None:
        raise OptimError(why, "leave --offload out", USAGE)


def _has_tokenizer(checkpoint: Checkpoint) -> bool:
    return (checkpoint.folder / "tokenizer.json").is_file()
