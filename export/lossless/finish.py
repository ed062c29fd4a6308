"""A packed folder's small files (configuration, manifest, recipe, card), then its name."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from optim.export.lossless.plan import Plan
from optim.recipes.build import to_yaml
from optim.recipes.schema import Pack, Recipe
from optim.runtime.engine.load import why_not
from optim.runtime.sparsity.side_file import SIDE, carry_side
from optim.runtime.storage.card import Card, card_of
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.lossless.layouts import LAYOUTS, without_layout
from optim.runtime.storage.manifest import Manifest, made_here, read_manifest
from optim.runtime.storage.workspace import Workspace, shards_in, source_of
from optim.runtime.system.hashes import file_sha256

# Of the manifest of a quantized model: facts that hold after packing too.
KEPT = ("calibration", "parameters", "modules", "blocks", "source_sha256")
DTYPE_KEYS = ("dtype", "torch_dtype")


def packed_config(pack: Pack, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What config.json gets: which units there are, and what each stands for."""
    layout = LAYOUTS[pack.layout]
    units = {unit: names for record in records for unit, names in record["units"].items()}
    return {layout.key: layout.config(units)}


def finish(made: Plan, workspace: Workspace) -> dict[str, Any]:
    """Write what belongs beside the shards; returns the facts of the report."""
    manifest = _manifest(made, workspace)
    workspace.write_text("config.json", json.dumps(_config(made, workspace), indent=2) + "\n")
    write_manifest(made.checkpoint, workspace, manifest)
    workspace.write_text("recipe.yaml", to_yaml(_recipe(made, manifest)))
    workspace.write_text("README.md", _card(made, manifest))
    made.checkpoint.write_sidecars(workspace.files)
    keys = ("packed_weights", "packed_bits_per_weight", "limit_bits_per_weight", "notes")
    return {key: getattr(manifest, key) for key in keys} | {"output_bytes": manifest.bytes}


def write_manifest(source: Checkpoint, workspace: Workspace, manifest: Manifest) -> None:
    """The manifest, and the side file of a pruned `source`, made to fit the new files."""
    workspace.write_manifest(manifest)
    if (source.folder / SIDE).is_file():
        nbytes = carry_side(source, workspace.files)
        shards = manifest.shards | {SIDE: file_sha256(workspace.files / SIDE)}
        news = {"shards": shards, "side_bytes": nbytes}
        workspace.write_manifest(manifest.model_copy(update=news))


def _config(made: Plan, workspace: Workspace) -> dict[str, Any]:
    """The model's own, and one key."""
    config = without_layout(made.checkpoint.config)
    if made.pack.cast:
        config |= {key: "bfloat16" for key in DTYPE_KEYS if key in config}
    return config | packed_config(made.pack, workspace.done)


def _manifest(made: Plan, workspace: Workspace) -> Manifest:
    records = workspace.done
    limits = {name: bits for record in records for name, bits in record["limits"].items()}
    shapes = {name: shape for record in records for name, shape in record["shapes"].items()}
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    sizes = {name: size for record in records for name, size in record["tensors"].items()}
    plain = made.checkpoint.store.infos
    coded = sum(size for name, size in sizes.items() if name not in plain)
    total = sum(weights.values())
    limit = sum(limits[name] * count for name, count in weights.items())
    before = _before(made)
    assert before.recipe is not None
    return Manifest(
        **{key: getattr(before, key) for key in KEPT if key in before.model_fields_set},
        made=made_here(),
        source=before.source,
        recipe=before.recipe | {"pack": made.pack.model_dump(mode="json")},
        bytes=sum(sizes.values()),
        packed_weights=total,
        packed_bits_per_weight=8 * coded / total if total else 0.0,
        limit_bits_per_weight=limit / total if total else 0.0,
        notes=[*before.notes, *made.notes, *(n for r in records for n in r["notes"])],
        shards=shards_in(records),
        shapes=shapes,
        packed_bits={k: v for record in records for k, v in record["packed_bits"].items()},
        limits=limits,
        original_sha256={k: v for r in records for k, v in r["original_sha256"].items()},
    )


def _before(made: Plan) -> Manifest:
    """What the manifest of a model that optim itself has quantized says, else the model's name."""
    checkpoint = made.checkpoint
    found = read_manifest(checkpoint.folder)
    if found and checkpoint.quantization is not None and found.source and found.recipe:
        return found.model_copy(update={"source_sha256": found.original_sha256})
    recipe = {"version": 1, "model": checkpoint.source}
    return Manifest(source=source_of(checkpoint), recipe=recipe)


def _recipe(made: Plan, manifest: Manifest) -> Recipe:
    """What makes this folder again: quantization too, if that came first."""
    given = {key: value for key, value in (manifest.recipe or {}).items() if value is not None}
    try:
        return Recipe.model_validate(given)
    except ValueError:  # the manifest of another version
        return Recipe(version=1, model=made.checkpoint.source, pack=made.pack)


def _card(made: Plan, manifest: Manifest) -> str:
    name, recipe = made.output.name, _recipe(made, manifest)
    layout = LAYOUTS[made.pack.layout].title
    base = manifest.source.name if manifest.source else made.checkpoint.name
    method = "" if recipe.quantize is None else f"quantized ({recipe.quantize.method}), the rest "
    about = f"""{base}, {method}packed without loss by `optim` as {layout}:
{manifest.bytes:,} bytes of weights (before packing {made.source_bytes:,}).
{manifest.packed_bits_per_weight:.3f} bits for each packed weight; no code of single weights goes
below {manifest.limit_bits_per_weight:.3f}."""
    remark = f"""`optim unpack {name} -o ORIGINAL` writes the original tensors, byte for
byte. transformers finds no weights in this folder and says so; it loads what
`optim unpack` writes."""
    programs: tuple[str, ...] = ("optim",)
    if why := why_not(made.checkpoint.source):
        programs = ()
        remark = f"`optim run` refuses it: {why}.\n\n{remark}"
    command = "pack" if recipe.quantize is None else "quantize"
    again, tags = f"optim {command} --recipe recipe.yaml", (made.pack.layout, "lossless", "optim")
    text = to_yaml(recipe.model_copy(update={"output": None}))
    return card_of(Card(name, about, tags, programs, remark, again, text, base), made.checkpoint)
