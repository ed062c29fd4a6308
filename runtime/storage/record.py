"""Keep an evaluation with the artifact it is of: in its manifest and in its model card."""

from pathlib import Path
from typing import Any

from optim.recipes.errors import USAGE, OptimError
from optim.recipes.units import seconds, size
from optim.runtime.storage.manifest import Cost, Manifest, read_manifest
from optim.runtime.storage.origin import CARD
from optim.runtime.system.files import replace_text
from optim.runtime.system.output import MANIFEST

HEADING = "## What it cost"
MEASURES = (
    ("perplexity", "perplexity", ".3f"),
    ("base_perplexity", "perplexity of the original", ".3f"),
    ("ppl_ratio", "perplexity beside the original's", ".4f"),
    ("kl", "KL divergence from the original, nats a token", ".4f"),
    ("kl_error", "its standard error", ".4f"),
    ("same_top", "same likeliest token", ".1%"),
    ("tokens", "tokens predicted", ",d"),
)
"""What the card shows of an evaluation: its key, what it is called, how it is written."""


def recordable(source: str) -> Path:
    """The artifact's folder; OptimError (2) if `source` is none that can be written to."""
    folder = Path(source)
    if not (folder / MANIFEST).is_file():
        fix = "give a folder that `optim quantize` wrote, or leave --record out"
        raise OptimError(f"{source} has no {MANIFEST} to record in", fix, USAGE)
    return folder


def record(
    folder: Path, evaluation: dict[str, Any] | None = None, cost: Cost | None = None
) -> None:
    """Put what is given into the manifest and the card, each replaced whole or not at all."""
    news: dict[str, Any] = {} if cost is None else {"cost": cost}
    if evaluation is not None:
        news["evaluation"] = {k: v for k, v in evaluation.items() if v is not None}
    manifest = (read_manifest(folder) or Manifest()).model_copy(update=news)
    replace_text(folder / MANIFEST, manifest.text())
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, found, after = text.partition(HEADING)
    rest = after.partition("\n## ") if found else ("", "", "")
    parts = [HEADING, "" if manifest.evaluation is None else _table(manifest.evaluation).strip()]
    section = "\n\n".join(part for part in (*parts, _made(manifest)) if part)
    replace_text(card, f"{before.rstrip()}\n\n{section}\n{''.join(rest[1:])}".rstrip() + "\n")


def _made(manifest: Manifest) -> str:
    """What making it took, and on which machine."""
    if manifest.cost is None:
        return ""
    peak = size(manifest.cost.peak_memory_bytes)
    where = f" on {manifest.made.cpu}" if manifest.made else ""
    return f"Made in {seconds(manifest.cost.seconds)}, with at most {peak} of memory{where}."


def _table(evaluation: dict[str, Any]) -> str:
    found = {key: (name, form) for key, name, form in MEASURES if evaluation.get(key) is not None}
    rows = [f"| {name} | {evaluation[key]:{form}} |" for key, (name, form) in found.items()]
    lines = ["| measure | value |", "|---|---:|", *rows]
    plural = "s" * (evaluation["windows"] != 1)
    windows = f"{evaluation['windows']} window{plural} of {evaluation['window']} tokens"
    windows += ", each after BOS" if evaluation.get("begin") else ""
    return "\n".join([*lines, "", f"On {evaluation['text']}, {windows} (`optim eval`).", ""])
