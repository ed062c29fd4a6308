"""The artifact's small files (configuration, index, manifest, recipe, card), then its name."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from optim.quant.plan import Plan, mixes_experts, only_ours
from optim.quant.solver import Method, Solver
from optim.recipes.build import to_yaml
from optim.runtime.formats.schemes import Scheme
from optim.runtime.storage.card import Card, card_of
from optim.runtime.storage.manifest import BlockError, Calibration, Manifest, made_here
from optim.runtime.storage.size_table import rounded_before
from optim.runtime.storage.tensors import INDEX, OWN_INDEX, OWN_SINGLE, SINGLES
from optim.runtime.storage.workspace import Workspace, index_of, shards_in, source_of
from optim.runtime.text.windows import described

BITS_OF_OTHERS = {
    4,
    8,
}  # of pack-quantized, that every version of vLLM and transformers reads alike


def finish(
    made: Plan, workspace: Workspace, windows: Tensor | None, solver: Solver
) -> dict[str, Any]:
    """Write what belongs beside the shards; returns the facts of the report."""
    config = _config(made, solver)
    ours = config["quantization_config"]["quant_method"] != "compressed-tensors"
    hidden = ours or mixes_experts(made.schemes)  # others would read weights that are not there
    one = workspace.join(OWN_SINGLE if hidden else SINGLES[0])
    manifest = _manifest(made, workspace, windows)
    recipe = made.recipe.model_copy(update={"output": None})
    workspace.write_text("config.json", json.dumps(config, indent=2) + "\n")
    if hidden or not one:
        workspace.write_text(OWN_INDEX if hidden else INDEX, index_of(workspace.done) + "\n")
    workspace.write_manifest(manifest)
    workspace.write_text("recipe.yaml", to_yaml(recipe))
    workspace.write_text("README.md", _card(made, manifest))
    made.checkpoint.write_sidecars(workspace.files)
    return {
        "bytes": manifest.bytes,
        "bits_per_weight": manifest.bits_per_weight,
        "blocks": [block.model_dump() for block in manifest.blocks],
        "notes": [*manifest.notes, *_held_back(manifest)],
    }


def _held_back(manifest: Manifest) -> Iterator[str]:
    """What guiding was worth on text that it did not see, in one line."""
    costs = [block.held_back for block in manifest.blocks if block.held_back]
    if costs:
        guided, unguided = (sum(c[k] for c in costs) / len(costs) for k in ("guided", "unguided"))
        yield (
            f"guide loss: on held-back text guided blocks cost the end loss {guided:.3f} of what "
            f"plain rounding costs, unguided ones {unguided:.3f} ({len(costs)} compared)"
        )


def _config(made: Plan, solver: Solver) -> dict[str, Any]:
    names = {module: _published(made, module) for module in (*made.schemes, *made.ignored)}
    schemes = {names[module]: scheme for module, scheme in made.schemes.items()}
    config = dict(made.checkpoint.text_config)
    config["architectures"] = [type(made.walk.model).__name__]
    ignored = [names[module] for module in made.ignored]
    config["quantization_config"] = solver.config(schemes, ignored)
    if made.walk.head_name in made.schemes:
        config["tie_word_embeddings"] = False
    return config


def _published(made: Plan, module: str) -> str:
    return made.checkpoint.disk_name(f"{module}.weight").removesuffix(".weight")


def _manifest(made: Plan, workspace: Workspace, windows: Tensor | None) -> Manifest:
    records = workspace.done
    nbytes = sum(size for record in records for size in record["tensors"].values())
    tensors = made.checkpoint.tensors
    params = sum(math.prod(info.shape) for info in tensors.values())
    blocks = [
        BlockError(**{k: record[k] for k in BlockError.model_fields if k in record})
        for record in records
        if record.get("error") is not None
    ]
    calibration = None
    if windows is not None:
        calibration = Calibration(**described(windows, made.checkpoint.tokenizer()))
    return Manifest(
        made=made_here(),
        source=source_of(made.checkpoint),
        recipe=made.recipe.model_dump(mode="json", exclude={"output"}),
        calibration=calibration,
        bytes=nbytes,
        parameters=params,
        bits_per_weight=8 * nbytes / params,
        modules={module: str(scheme) for module, scheme in sorted(made.schemes.items())},
        blocks=blocks,
        notes=alike([note for record in records for note in record["notes"]]),
        shards=shards_in(records),
        original_sha256={k: v for record in records for k, v in record["originals"].items()},
    )


def runs(method: Method, schemes: Mapping[str, Scheme]) -> tuple[tuple[str, ...], str]:
    """The programs that run a quantized folder, and a word on others."""
    if why := only_ours(schemes):
        return ("optim",), f"transformers does not load {why}."
    if not {scheme.bits for scheme in schemes.values()} <= BITS_OF_OTHERS:
        return ("optim",), "The packing of 2 and 3 bits differs between versions of other programs."
    return method.programs, method.remark


def _card(made: Plan, manifest: Manifest) -> str:
    rows = "\n".join(
        f"| {row.group} | {row.format} | {row.tensors} | {row.params:,} | {row.nbytes:,} |"
        for row in made.groups
    )
    held = rounded_before(made.checkpoint)
    before = (
        "" if held is None else f"\nThe source was already {held}: it was de-quantized from that."
    )
    about = f"""{made.checkpoint.name}, compressed with `optim`:
{manifest.bytes:,} bytes of weights, {manifest.bits_per_weight:.2f} bits per weight
(source: {made.source_bytes:,} bytes).{before}

| group | format | tensors | weights | bytes |
|---|---|---:|---:|---:|
{rows}"""
    programs, remark = runs(made.method, made.schemes)
    recipe = to_yaml(made.recipe.model_copy(update={"output": None}))
    again = "optim quantize --recipe recipe.yaml"
    blocks = any(scheme.blocks for scheme in made.schemes.values())
    tags = ("optim",) if blocks else made.method.tags
    card = Card(made.output.name, about, tags, programs, remark, again, recipe)
    return card_of(card, made.checkpoint)


def alike(notes: Iterable[str]) -> list[str]:
    """Notes `block 3: ...` of several blocks that say the same, as one: `blocks 3, 4: ...`."""
    blocks: dict[str, list[str]] = {}
    for note in notes:
        where, _, text = note.partition(": ")
        blocks.setdefault(text, []).append(where.removeprefix("block "))
    return [f"block{'s' * (len(at) > 1)} {', '.join(at)}: {text}" for text, at in blocks.items()]
