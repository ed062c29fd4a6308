"""The small files of an artifact that several steps have made: they speak of all of them.

Each step has said what it made of the folder before it. Put together, the manifest names the
original model and the whole recipe, and keeps every fact that still holds.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optim.recipes.build import to_yaml

if TYPE_CHECKING:
    from optim.cli.apply.plan import Job
    from optim.runtime.storage.checkpoint import Checkpoint
    from optim.runtime.storage.manifest import Manifest

OWN = ("source", "recipe", "notes", "bits_per_weight", "evaluation", "cost")  # said anew


def restate(folder: Path, steps: Iterable[Path], job: "Job") -> None:
    """Write manifest, recipe and model card of `folder`, the last of the `steps`, anew."""
    from optim.runtime.storage.card import card_of
    from optim.runtime.storage.manifest import read_manifest
    from optim.runtime.storage.open import open_checkpoint
    from optim.runtime.storage.origin import CARD
    from optim.runtime.system.files import replace_text
    from optim.runtime.system.output import MANIFEST

    told = [found for step in steps if (found := read_manifest(step)) is not None]
    manifest = _manifest(told, job)
    recipe = to_yaml(job.recipe.model_copy(update={"output": None}))
    made = open_checkpoint(str(folder), trust_remote_code=job.how.trust_remote_code)
    replace_text(folder / MANIFEST, manifest.text())
    replace_text(folder / "recipe.yaml", recipe)
    replace_text(folder / CARD, card_of(_card(made, manifest, recipe, job), job.original))


def _manifest(told: "list[Manifest]", job: "Job") -> "Manifest":
    from optim.runtime.storage.manifest import Manifest
    from optim.runtime.storage.workspace import source_of

    facts: dict[str, Any] = {}
    for one in told:
        facts |= {key: getattr(one, key) for key in one.model_fields_set if key not in OWN}
    notes = list(dict.fromkeys(note for one in told for note in one.notes))
    if facts.get("bytes") and facts.get("parameters"):
        facts["bits_per_weight"] = 8 * facts["bytes"] / facts["parameters"]
    return Manifest(**facts, source=source_of(job.original), recipe=job.stated, notes=notes)


def _card(made: "Checkpoint", manifest: "Manifest", recipe: str, job: "Job") -> Any:
    from optim.runtime.storage.card import Card
    from optim.runtime.storage.size_table import size_rows, stored

    rows = "\n".join(
        f"| {row.group} | {row.format} | {row.tensors} | {row.params:,} | {row.nbytes:,} |"
        for row in size_rows(stored(made))
    )
    done = ", then ".join(_done(step, job) for step in job.steps)
    bits = f", {manifest.bits_per_weight:.2f} bits per weight" if manifest.bits_per_weight else ""
    about = f"""{job.original.name}, {done} by `optim`: {manifest.bytes or 0:,} bytes of
weights{bits}.

| group | format | tensors | weights | bytes |
|---|---|---:|---:|---:|
{rows}"""
    programs, remark = _programs(job)
    name, again = job.output.name, "optim apply recipe.yaml"
    return Card(name, about, _tags(job), programs, remark, again, recipe)


def _done(step: str, job: "Job") -> str:
    recipe = job.recipe
    if step == "pack":
        assert recipe.pack is not None
        return f"what stayed bf16 packed without loss ({recipe.pack.layout})"
    if step == "tune":
        return "its scales and norms tuned"
    section = getattr(recipe, step)
    return f"{step}d ({section.method})"


def _tags(job: "Job") -> tuple[str, ...]:
    from optim.quant.methods import METHODS

    quantize, pack = job.recipe.quantize, job.recipe.pack
    tags = METHODS[quantize.method].tags if quantize is not None else ("optim",)
    tags += ("sparsity",) if job.recipe.prune is not None else ()
    return tags if pack is None else (*tags, pack.layout)


def _programs(job: "Job") -> tuple[tuple[str, ...], str]:
    """What runs the artifact, and a word on what does not."""
    from optim.quant.finish import runs
    from optim.quant.methods import METHODS

    if job.recipe.pack is not None:
        command = f"`optim unpack {job.output.name} -o PLAIN`"
        return ("optim",), f"Other programs load what {command} writes, not this folder."
    assert job.recipe.quantize is not None
    return runs(METHODS[job.recipe.quantize.method], job.schemes)
