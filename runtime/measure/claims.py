"""The numbers of an artifact's manifest, each measured again: which of them hold.

What is compared exactly: files, sizes, the tokens of the text. A measured quality may differ a
little on another machine, whose sums round otherwise; TOLERANCE says by how much.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.measure.quality import Progress, evaluate
from optim.runtime.sparsity.side_file import SIDE
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.lossless.store import disproved
from optim.runtime.storage.manifest import Manifest, read_manifest, verify
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.size_table import stored
from optim.runtime.storage.tensors import SafetensorsFiles

TOLERANCE: dict[str, tuple[float, float]] = {
    "tokens": (0, 0),
    "perplexity": (1e-3, 0),
    "base_perplexity": (1e-3, 0),
    "ppl_ratio": (1e-3, 0),
    "nll": (1e-3, 0),
    "nll_error": (2e-2, 1e-5),
    "delta_nll": (1e-2, 1e-3),
    "delta_nll_error": (2e-2, 1e-4),
    "kl": (1e-2, 1e-5),
    "kl_error": (2e-2, 1e-5),
    "same_top": (0, 5e-3),
}
"""A measure -> the share of it, and the value, by which it may differ; the larger counts."""
MOST_WINDOW = 1 << 20


@dataclass(frozen=True, slots=True)
class Claim:
    """One number of the manifest, and what was found; `holds` is None where nothing was measured.

    `why` says then what kept it from being measured.
    """

    name: str
    stated: Any
    found: Any
    holds: bool | None
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary, for `--json`."""
        return asdict(self)


def claims(
    source: str,
    against: str | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = lambda at, total, text: None,
) -> list[Claim]:
    """Measure again what the manifest of `source` states.

    `against` is the model it was made from, where it is no longer called what the manifest says.
    Raises OptimError (2) for a model without manifest, or one that cannot be opened.
    """
    model = open_checkpoint(source, gate=False)
    manifest = read_manifest(model.folder)
    if manifest is None or not manifest.shards:
        fix = "give a folder that optim wrote; `optim eval` measures any model"
        raise OptimError(f"{source} states no numbers: it has no optim.json", fix, USAGE)
    found = list(_files(model, manifest, progress))
    if any(claim.holds is False for claim in found):
        return found  # of other bytes nothing else can be said
    made_from, judge = _bases(manifest)
    found += _source(manifest, against or made_from)
    return [*found, *_quality(source, manifest, against or judge, (device, threads), progress)]


def _files(model: Checkpoint, manifest: Manifest, progress: Progress) -> Iterator[Claim]:
    """What the folder itself shows: hashes, bytes, bits per weight, tensors that decode."""
    problems = verify(model.folder)
    yield Claim("files", len(manifest.shards), "; ".join(problems) or "as written", not problems)
    if problems:
        return
    shards = [model.folder / name for name in manifest.shards if name != SIDE]
    held = SafetensorsFiles(shards).infos
    nbytes = sum(info.nbytes for info in held.values())
    if manifest.bytes is not None:
        yield Claim("bytes of weights", manifest.bytes, nbytes, manifest.bytes == nbytes)
    if manifest.bits_per_weight is not None:
        stated, bits = manifest.bits_per_weight, 8 * nbytes / (manifest.parameters or math.nan)
        yield Claim("bits per weight", stated, bits, math.isclose(stated, bits, rel_tol=1e-9))
    if manifest.side_bytes is not None:
        size = (model.folder / SIDE).stat().st_size
        yield Claim(
            "bytes of the side file", manifest.side_bytes, size, size == manifest.side_bytes
        )
    if model.layout is not None:
        wrong, proven = disproved(model.store, model.folder, progress)
        told = "; ".join(wrong) or f"{proven} decode to the original's bytes"
        coded = sum(info.nbytes for name, info in held.items() if name not in model.store.infos)
        weights = sum(math.prod(shape) for shape in manifest.shapes.values())
        packed, bits = manifest.packed_bits_per_weight, 8 * coded / (weights or math.nan)
        yield Claim("packed bits per weight", packed, bits, packed == bits)
        yield Claim("packed tensors", len(manifest.shapes), told, not wrong)


def _bases(manifest: Manifest) -> tuple[str | None, str | None]:
    """What the manifest calls the model that it was made from, and the one it was measured against.

    An export of an artifact may be measured against what that was made from.
    """
    model, judge = (manifest.recipe or {}).get("model"), (manifest.evaluation or {}).get("against")
    names = model or judge, judge or model
    made_from, against = (name if isinstance(name, str) else None for name in names)
    return made_from, against


def _source(manifest: Manifest, base: str | None) -> Iterator[Claim]:
    """Whether the base is the model that the manifest names, by the hash of every byte."""
    if manifest.source is None:
        return
    known = manifest.source.sha256
    try:
        model = None if base is None else open_checkpoint(base)
    except OptimError as problem:
        yield Claim("source", known, None, None, f"{problem.message} (give --against BASE)")
        return
    if model is None:
        yield Claim("source", known, None, None, "the manifest does not name it: --against BASE")
        return
    found = model.fingerprint()
    yield Claim("source", known, found, found == known)
    if manifest.parameters is not None:
        count = sum(tensor.params for tensor in stored(model))
        yield Claim("parameters", manifest.parameters, count, count == manifest.parameters)


def _quality(
    source: str,
    manifest: Manifest,
    base: str | None,
    place: tuple[str, int | None],
    progress: Progress,
) -> Iterator[Claim]:
    stated = manifest.evaluation
    if not stated:
        why = "it was not measured: `optim eval --record` does"
        yield Claim("quality", None, None, None, why)
        return
    known = {key: stated[key] for key in ("text_sha256", *TOLERANCE) if stated.get(key) is not None}
    compared = any(key in known for key in ("kl", "base_perplexity"))
    try:
        text, window, windows = _asked(stated)
        found = evaluate(
            source,
            against=base if compared else None,
            text=text,
            window=window,
            max_windows=windows,
            device=place[0],
            threads=place[1],
            progress=progress,
        ).as_dict()
    except OptimError as problem:
        yield from (Claim(k, value, None, None, problem.message) for k, value in known.items())
        return
    for key, value in known.items():
        yield Claim(key, value, found[key], _alike(key, value, found[key]))


def _asked(stated: dict[str, Any]) -> tuple[str, int, int]:
    """Text, window and windows of a stated evaluation. A stranger's manifest opens no file here."""
    text, window, windows = (stated.get(key) for key in ("text", "window", "windows"))
    if not isinstance(text, str) or not text.startswith("builtin:"):
        raise OptimError(f"measured on {text}, which is no built-in text: `optim eval --text`")
    if type(window) is not int or type(windows) is not int:
        raise OptimError("the manifest does not say on which windows")
    if not (2 <= window <= MOST_WINDOW and 1 <= windows <= MOST_WINDOW):
        raise OptimError(f"{windows} windows of {window} tokens cannot be measured")
    return text, window, windows


def _alike(key: str, stated: Any, found: Any) -> bool:
    if key not in TOLERANCE:
        return bool(stated == found)
    if isinstance(stated, bool) or not isinstance(stated, int | float) or found is None:
        return False
    share, value = TOLERANCE[key]
    return bool(abs(stated - found) <= max(share * abs(found), value))
