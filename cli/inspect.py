"""`optim inspect`: where the bytes are, how an artifact was made, and whether it is intact."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from optim.cli import ui
from optim.recipes.errors import CHECK_FAILED, OptimError

FLOATS = ("F32", "F16", "BF16")  # types of a GGUF file that are no integers

if TYPE_CHECKING:
    from optim.runtime.storage.checkpoint import Checkpoint
    from optim.runtime.storage.manifest import Manifest


def inspect(source: str, *, verify: bool, as_json: bool, tensors: bool = False) -> None:
    """Print the size table; with `verify`, raise OptimError (3) if a shard has changed.

    Of a model that was packed without loss every tensor is decoded and compared with its hash;
    `tensors` lists its packed tensors beside the entropy limit.
    """
    from optim.runtime.storage.manifest import verify as problems_of
    from optim.runtime.storage.open import open_checkpoint

    checkpoint = open_checkpoint(source, gate=False)
    facts = _facts(checkpoint)
    problems = problems_of(checkpoint.folder) if verify else []
    if verify and checkpoint.layout and not problems:
        problems, facts["proven"] = _disproved(checkpoint)
    if verify:
        facts["verified"] = not problems
    if as_json:
        ui.emit(facts)
    else:
        _show(facts)
        if tensors:
            _show_tensors(facts["packed"])
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        fix = "make it again, or fetch it again"
        raise OptimError(f"{source} is not what its manifest says{lines}", fix, CHECK_FAILED)


def _facts(checkpoint: "Checkpoint") -> dict[str, Any]:
    from optim.runtime.storage.manifest import Manifest, read_manifest
    from optim.runtime.storage.size_table import size_rows, stored

    manifest = read_manifest(checkpoint.folder)
    rows = [asdict(row) for row in size_rows(stored(checkpoint))]
    params, nbytes = (sum(row[key] for row in rows) for key in ("params", "nbytes"))
    return {
        "model": checkpoint.name,
        "source": checkpoint.source,
        "family": checkpoint.family,
        "params": params,
        "nbytes": nbytes,
        "file_bytes": sum(path.stat().st_size for path in checkpoint.store.files),
        "bits_per_weight": 8 * nbytes / params if params else None,
        "groups": rows,
        "types": _types(rows) if _is_gguf(checkpoint) else [],
        "packed": [] if checkpoint.layout is None else _packed(checkpoint, manifest or Manifest()),
        "left_out": list(checkpoint.left_out),
        "manifest": None if manifest is None else manifest.facts(),
    }


def _is_gguf(checkpoint: "Checkpoint") -> bool:
    """Whether the weights are of types that they are turned into floats from."""
    return checkpoint.layout is None and any(map(checkpoint.held, checkpoint.tensors))


def _types(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The size table by type of tensor alone, the largest first."""
    sums: dict[str, dict[str, Any]] = {}
    for row in rows:
        kind = sums.setdefault(row["format"], dict.fromkeys(("tensors", "params", "nbytes"), 0))
        for key in kind:
            kind[key] += row[key]
    found = [{"group": "any", "format": kind, **row} for kind, row in sums.items()]
    return sorted(found, key=lambda row: -row["nbytes"])


def _packed(checkpoint: "Checkpoint", manifest: "Manifest") -> list[dict[str, Any]]:
    """Each tensor that is packed without loss: its bits a weight, and the entropy limit."""
    found = []
    for name, info in checkpoint.tensors.items():
        if (held := checkpoint.held(name)) is not None:
            bits = manifest.packed_bits.get(name, 16 * held[1] / info.nbytes)
            facts = {"name": name, "format": held[0], "weights": info.nbytes // 2, "bits": bits}
            found.append(facts | {"limit": manifest.limits.get(name)})
    return found


def _disproved(checkpoint: "Checkpoint") -> tuple[list[str], int]:
    """Tensors that do not decode to what was packed, and how many do."""
    from optim.runtime.storage.lossless.store import disproved

    with ui.progress("decode") as step:
        return disproved(checkpoint.store, checkpoint.folder, step)


def _show_tensors(packed: list[dict[str, Any]]) -> None:
    rows = (
        (
            tensor["name"],
            tensor["format"],
            ui.count(tensor["weights"]),
            f"{tensor['bits']:.3f}",
            "" if tensor["limit"] is None else f"{tensor['limit']:.3f}",
        )
        for tensor in packed
    )
    ui.table(("tensor", "format", "weights", "bits/w", "limit"), rows, left=2)


def _show(facts: dict[str, Any]) -> None:
    head = [facts["model"], str(facts["family"]), f"{ui.count(facts['params'])} parameters"]
    if facts["bits_per_weight"]:
        head.append(f"{facts['bits_per_weight']:.2f} bits/weight")
    ui.say(" · ".join([*head, f"{ui.size(facts['file_bytes'])} of files"]))
    ui.size_table(facts["groups"])
    if facts["types"]:
        ui.say("by type:")
        ui.size_table(facts["types"])
        ui.note(_how_run(facts["types"]))
    if facts["left_out"]:
        ui.note(f"{len(facts['left_out'])} stored tensors are no part of the text model")
    _show_manifest(facts["manifest"])
    if facts["packed"]:
        ui.say(_against_limit(facts["packed"]))
    if facts.get("verified"):
        ui.say("verified: every shard is as it was written")
    if facts.get("proven"):
        ui.say(f"proven: {facts['proven']} tensors decode to what was packed, bit for bit")


def _how_run(types: list[dict[str, Any]]) -> str:
    """Which types of a GGUF file are run as the integers they are."""
    from optim.runtime.storage.gguf.packed import KINDS

    kinds = {kind.name for kind in KINDS}
    floats = [row["format"] for row in types if row["format"] not in {*kinds, *FLOATS}]
    if not floats:
        return "its integers are run as they are"
    return f"{', '.join(floats)}: run as floats, de-quantized; other integers as they are"


def _against_limit(packed: list[dict[str, Any]]) -> str:
    """The packed weights' size in bits, and the least that a code of single weights can reach."""
    total = sum(tensor["weights"] for tensor in packed)
    bits = sum(tensor["bits"] * tensor["weights"] for tensor in packed) / total
    text = f"packed without loss: {bits:.3f} bits/weight"
    if any(tensor["limit"] is None for tensor in packed):
        return text
    limit = sum(tensor["limit"] * tensor["weights"] for tensor in packed) / total
    return f"{text}; the entropy of single weights is {limit:.3f}"


def _show_manifest(manifest: dict[str, Any] | None) -> None:
    """What it was made from, how, and how far each block's output moved."""
    source, calibration, recipe = (
        _section(manifest, key) for key in ("source", "calibration", "recipe")
    )
    if source:
        ui.say(f"made from {source.get('name')} (sha256 {str(source.get('sha256'))[:12]})")
    if method := _section(recipe, "quantize"):
        grid = ("bits", "group_size", "sym") if method.get("grid") is None else ("grid",)
        keys = ("method", *grid, "compensate")
        ui.say(", ".join(f"{key} {method[key]}" for key in keys if key in method))
    if method := _section(recipe, "prune"):
        ui.say(", ".join(f"{key} {value}" for key, value in method.items()))
    if calibration:
        dataset = _section(recipe, "calibration").get("dataset")
        size = f"{calibration.get('samples')} x {calibration.get('seq_len')} tokens"
        ui.say(f"calibrated on {dataset}, {size} (sha256 {str(calibration.get('sha256'))[:12]})")
    _show_sparsity(_section(manifest, "sparsity").get("blocks"))
    blocks = (manifest or {}).get("blocks")
    if isinstance(blocks, list) and blocks:
        error, rounding = (_mean(blocks, key) for key in ("error", "rounding_error"))
        ui.say(f"mean error of a block {error:.2e}; plain rounding {rounding:.2e}")
    for text in (manifest or {}).get("notes") or ():
        ui.note(str(text))


def _show_sparsity(blocks: Any) -> None:
    """The budget of each block: sparsities of its sites, neurons kept, or zeros found."""
    rows = []
    for block in blocks if isinstance(blocks, list) else ():
        facts = _section({"block": block}, "block")
        facts = facts | _section(facts, "sparsity")
        rows.append({key: value for key, value in facts.items() if isinstance(value, float)})
    keys = list(rows[0]) if rows else []
    if keys:
        lines = ((str(i), *(f"{row.get(k, 0):.3g}" for k in keys)) for i, row in enumerate(rows))
        ui.table(("block", *keys), lines)


def _section(data: dict[str, Any] | None, key: str) -> dict[str, Any]:
    """A mapping inside a manifest, which may come from anywhere: empty if it is not there."""
    value = (data or {}).get(key)
    return value if isinstance(value, dict) else {}


def _mean(blocks: list[Any], key: str) -> float:
    values = [block.get(key) for block in blocks if isinstance(block, dict)]
    numbers = [value for value in values if isinstance(value, int | float)]
    return sum(numbers) / len(numbers) if numbers else float("nan")
