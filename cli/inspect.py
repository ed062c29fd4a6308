"""`optim inspect`: where the bytes are, how an artifact was made, and whether it is intact."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from optim.cli import sizes, ui
from optim.recipes.errors import CHECK_FAILED, OptimError

if TYPE_CHECKING:
    from optim.runtime.checkpoint import Checkpoint


def inspect(source: str, *, verify: bool, as_json: bool) -> None:
    """Print the size table; with `verify`, raise OptimError (3) if a shard has changed."""
    from optim.runtime.checkpoint import open_checkpoint
    from optim.runtime.verify import verify as problems_of

    checkpoint = open_checkpoint(source)
    facts = _facts(checkpoint)
    problems = problems_of(checkpoint.folder) if verify else []
    if verify:
        facts["verified"] = not problems
    if as_json:
        ui.emit(facts)
    else:
        _show(facts)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        fix = "make it again, or fetch it again"
        raise OptimError(f"{source} is not what its manifest says{lines}", fix, CHECK_FAILED)


def _facts(checkpoint: "Checkpoint") -> dict[str, Any]:
    from optim.runtime.sizes import size_rows, stored
    from optim.runtime.verify import read_manifest

    rows = [asdict(row) for row in size_rows(stored(checkpoint))]
    params, nbytes = (sum(row[key] for row in rows) for key in ("params", "nbytes"))
    return {
        "model": checkpoint.name,
        "source": checkpoint.source,
        "family": checkpoint.text_config.get("model_type"),
        "params": params,
        "nbytes": nbytes,
        "file_bytes": sum(path.stat().st_size for path in checkpoint.store.files),
        "bits_per_weight": 8 * nbytes / params if params else None,
        "groups": rows,
        "left_out": list(checkpoint.left_out),
        "manifest": read_manifest(checkpoint.folder),
    }


def _show(facts: dict[str, Any]) -> None:
    head = [facts["model"], str(facts["family"]), f"{ui.count(facts['params'])} parameters"]
    if facts["bits_per_weight"]:
        head.append(f"{facts['bits_per_weight']:.2f} bits/weight")
    ui.say(" · ".join([*head, f"{ui.size(facts['file_bytes'])} of files"]))
    sizes.show(facts["groups"])
    if facts["left_out"]:
        ui.note(f"{len(facts['left_out'])} stored tensors are no part of the text model")
    _show_manifest(facts["manifest"])
    if facts.get("verified"):
        ui.say("verified: every shard is as it was written")


def _show_manifest(manifest: dict[str, Any] | None) -> None:
    """What it was made from, how, and how far each block's output moved."""
    source, calibration, recipe = (
        _section(manifest, key) for key in ("source", "calibration", "recipe")
    )
    if source:
        ui.say(f"made from {source.get('name')} (sha256 {str(source.get('sha256'))[:12]})")
    if method := _section(recipe, "quantize"):
        keys = ("method", "bits", "group_size", "sym", "compensate")
        ui.say(", ".join(f"{key} {method[key]}" for key in keys if key in method))
    if calibration:
        dataset = _section(recipe, "calibration").get("dataset")
        size = f"{calibration.get('samples')} x {calibration.get('seq_len')} tokens"
        ui.say(f"calibrated on {dataset}, {size} (sha256 {str(calibration.get('sha256'))[:12]})")
    blocks = (manifest or {}).get("blocks")
    if isinstance(blocks, list) and blocks:
        error, rounding = (_mean(blocks, key) for key in ("error", "rounding_error"))
        ui.say(f"mean error of a block {error:.2e}; plain rounding {rounding:.2e}")
    for text in (manifest or {}).get("notes") or ():
        ui.note(str(text))


def _section(data: dict[str, Any] | None, key: str) -> dict[str, Any]:
    """A mapping inside a manifest, which may come from anywhere: empty if it is not there."""
    value = (data or {}).get(key)
    return value if isinstance(value, dict) else {}


def _mean(blocks: list[Any], key: str) -> float:
    values = [block.get(key) for block in blocks if isinstance(block, dict)]
    numbers = [value for value in values if isinstance(value, int | float)]
    return sum(numbers) / len(numbers) if numbers else float("nan")
