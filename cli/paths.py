"""Every way from a stored kind of model to its logits that this machine has, against torch alone.

A prompt and some steps of a small model of each kind (small_models.py) are decoded by every route
and with every cache. A second process without C kernels does the same: that is the reference. Where
C rounds (the activations of packed weights to 8 bits, a cache to 16) the reference does too.

`python -m optim.cli.paths FOLDER FILE [codes] [half]` decodes what lies in FOLDER into FILE.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from optim.cli.small_models import BOUNDS, NAMES, VOCABULARY, make
from optim.recipes.errors import CHECK_FAILED, OptimError

if TYPE_CHECKING:
    from torch import Tensor

    from optim.runtime.engine.load import Model

PROMPT, STEPS = 21, 5
CACHES = {f"{kind} {bits} bit": (bits, kind) for kind in ("full", "stream") for bits in (16, 8, 4)}
LENGTHS = {"full": 64, "stream": 24}  # a stream of 24 forgets before the last step
ALONE, BATCH = "alone", "in a batch"
SECONDS = 300  # that a process may take
FAR = float("inf")


class _NoCache(Exception):
    """A model of this kind is refused such a cache."""


@dataclass(frozen=True, slots=True)
class Proof:
    """Of one way: the largest difference of a logit, as a share of its row's length, and whether
    that is within the bound; `problem` says why it gave none."""

    model: str
    route: str
    cache: str
    share: float
    bound: float
    problem: str = ""

    @property
    def holds(self) -> bool:
        return self.share <= self.bound  # also not if it is no number

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


def prove(levels: Sequence[str] = ()) -> list[Proof]:
    """Make the models, decode them in every way, and compare with torch.

    For each of `levels` of instructions a process of its own decodes them once more.
    """
    with TemporaryDirectory(prefix="optim-paths-") as name:
        folder = Path(name)
        make(folder)
        reference = _start(folder, "torch", _as_here(), OPTIM_NO_C="1")
        ways = {"": decode_all(folder)}
        wanted = _result(*reference)
        for level in levels:
            ways[level] = _result(*_start(folder, level, [], OPTIM_ISA=level))
        return [proof for level in ways for proof in _compare(ways[level], wanted, level)]


def _as_here() -> list[str]:
    """What the reference must round as C does here: keys and values, activations."""
    import torch

    from optim.runtime.decoder.linears.pack_quantized import choose
    from optim.runtime.formats.schemes import Scheme
    from optim.runtime.kernels.cpu import step, w4a8

    half = step.usable() and step.reads_half()
    codes = choose(Scheme(4, 32, False), torch.device("cpu")) is w4a8
    return ["half"] * half + ["codes"] * codes


def _round_activations() -> None:
    """Let torch multiply packed weights as the C kernel is defined: by activations of 8 bits."""
    from optim.runtime.decoder.linears import pack_quantized
    from optim.runtime.kernels.cpu import w4a8

    class Weight:
        def __init__(self, q: Tensor, scale: Tensor, zero: Any, scheme: Any, bias: Any) -> None:
            self.parts, self.bias, self.nbytes = (q, scale, zero, scheme), bias, q.nbytes

        def __call__(self, x: Tensor) -> Tensor:
            y = w4a8.reference(x.float(), *self.parts).float()
            return y if self.bias is None else y + self.bias.float()

    def check() -> None:
        """It is the reference."""

    reference = SimpleNamespace(supports=w4a8.supports, check=check, Weight=Weight)
    pack_quantized._candidates = lambda _device: [reference]  # type: ignore[assignment]


def _halve_cache() -> None:
    import torch

    from optim.runtime.engine import build

    build._cache_dtype = lambda _loader, _stored: torch.float16  # type: ignore[assignment]


def decode_all(folder: Path) -> dict[str, Tensor]:
    """Logits of every way, by `MODEL/ROUTE/CACHE`; of one that failed, an empty tensor with the
    reason in its name."""
    import torch

    found: dict[str, Tensor] = {}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name, device in ((name, device) for name in NAMES for device in devices):
        for way, logits in _ways(folder / name, device):
            found[f"{name}/{way}"] = logits
    return found


def _ways(folder: Path, device: str) -> Iterator[tuple[str, Tensor]]:
    import torch

    from optim.runtime.engine.load import load_model

    place = "" if device == "cpu" else f" on {device}"
    try:
        model = load_model(str(folder), device=device)
    except Exception as problem:  # whatever is wrong with one kind, the others are still tried
        yield f"{ALONE}{place}/none: {_words(problem)}", torch.empty(0)
        return
    for cache in CACHES:
        for route in (ALONE, BATCH):
            if route == BATCH and cache.startswith("stream"):
                continue  # there is none: a stream is one text
            try:
                yield f"{route}{place}/{cache}", decode(model, cache, route)
            except _NoCache:
                continue
            except Exception as problem:
                yield f"{route}{place}/{cache}: {_words(problem)}", torch.empty(0)


def _words(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".replace("/", "|")[:200]


def decode(model: Model, cache: str, route: str) -> Tensor:
    """fp32 `[1 + STEPS, VOCABULARY]`: after a prompt, then token by token."""
    import torch

    from optim.runtime.cache.full import Policy

    bits, kind = CACHES[cache]
    ids = torch.arange(PROMPT + STEPS)[None] * 37 % (VOCABULARY - 5) + 5
    # Padding, even none, goes block by block; a text alone in one C call where there is one.
    padding = [0] if route == BATCH else None
    try:
        held = model.new_cache(length=LENGTHS[kind], policy=Policy(bits, kind), padding=padding)
    except OptimError as error:
        raise _NoCache from error
    logits = [model.forward(ids[:, :PROMPT], held)]
    logits += [model.forward(ids[:, i : i + 1], held) for i in range(PROMPT, PROMPT + STEPS)]
    return torch.cat(logits).cpu()


def _compare(
    ways: dict[str, Tensor], wanted: dict[str, Tensor], level: str = ""
) -> Iterator[Proof]:
    for way, logits in ways.items():
        model, route, cache = way.split("/", 2)
        cache, _, problem = cache.partition(": ")
        plain = wanted.get(f"{model}/{route.removesuffix(' on cuda')}/{cache}")
        if plain is None or plain.shape != logits.shape:
            problem = problem or "torch alone gives nothing to compare with"
        share = FAR if problem or plain is None else _share(logits, plain)
        where = f"{route}, {level}" if level else route
        yield Proof(model, where, cache, share, BOUNDS[model], problem)


def _share(got: Tensor, wanted: Tensor) -> float:
    """The largest difference of a row, as a share of the row's length."""
    rows = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
    return float(rows.max()) if bool(rows.isfinite().all()) else FAR


def _start(
    folder: Path, name: str, rounded: list[str], **settings: str
) -> tuple[subprocess.Popen[str], Path]:
    """A process that decodes what lies in `folder` under other settings."""
    file = folder / f"{name}.safetensors"
    command = [sys.executable, "-m", "optim.cli.paths", str(folder), str(file), *rounded]
    pipe = subprocess.PIPE
    env = {**os.environ, **settings, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=env
    ), file


def _result(process: subprocess.Popen[str], file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        said = process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        said = f"it took more than {SECONDS} s"
    if process.returncode or not file.exists():
        last = (said.strip().splitlines() or ["no message"])[-1]
        fix = "OPTIM_DEBUG=1 optim doctor"
        raise OptimError(f"a process that decodes failed: {last}", fix, CHECK_FAILED)
    return load_file(file)


def _main(folder: str, file: str, *rounded: str) -> None:
    from safetensors.torch import save_file

    if "codes" in rounded:
        _round_activations()
    if "half" in rounded:
        _halve_cache()
    save_file(decode_all(Path(folder)), file)


if __name__ == "__main__":
    _main(*sys.argv[1:])
