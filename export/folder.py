"""Write a model as a folder of safetensors files in the form of another program.

A format gives `Unit`s: tensors that belong together, with their sizes known before anything is
read, and a way to make them piece by piece. Files of up to FILE_BYTES are written one after the
other; a killed run goes on with the next one.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from optim.export.exporter import Plan, Progress, Prove
from optim.recipes.build import to_yaml
from optim.recipes.schema import Recipe
from optim.runtime.storage.card import front_matter
from optim.runtime.storage.manifest import Cost, Manifest, made_here
from optim.runtime.storage.origin import CARD, origin_of
from optim.runtime.storage.tensors import INDEX, SINGLES
from optim.runtime.storage.workspace import (
    Workspace,
    disk_error,
    index_of,
    shards_in,
    source_of,
)
from optim.runtime.storage.writer import Entries, TensorWriter

FILE_BYTES = 5 * 10**9  # what hubs take as one file


@dataclass(frozen=True, slots=True)
class Unit:
    """Tensors that are made together; `entries` are their stored names, dtypes and shapes."""

    entries: Entries
    make: Callable[[], Iterable[tuple[str, Tensor]]]
    """The tensors, or pieces of them one after the other, by stored name."""


def write_folder(
    made: Plan,
    units: Iterable[Unit],
    config: dict[str, Any],
    progress: Progress,
    prove: Prove | None,
) -> int:
    """Write the units, `config` and what belongs beside them; returns the bytes of the weights.

    Raises OptimError (4) where the disk gives out, (2) if the source changes meanwhile.
    """
    start, files = time.monotonic(), list(_files(units))
    workspace = Workspace(made.output, _identity(made), made.force, made.checkpoint)
    with workspace:
        for i in range(len(workspace.done), len(files)):
            name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
            name = SINGLES[0] if len(files) == 1 else name
            workspace.commit(_write(workspace, name, files[i], made, progress))
        if len(files) > 1:
            workspace.write_text(INDEX, index_of(workspace.done) + "\n")
        workspace.write_text("config.json", json.dumps(config, indent=2) + "\n")
        manifest = _manifest(made, workspace)
        workspace.write_manifest(manifest)
        workspace.write_text(CARD, _card(made, manifest))
        made.checkpoint.write_sidecars(workspace.files)
        workspace.publish(prove, Cost.since(start))
    return manifest.bytes or 0


def plain_config(made: Plan) -> dict[str, Any]:
    """config.json of the model without its quantization; `dtype` is the format's to set."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    checkpoint = made.checkpoint
    packed = ("quantization_config", "quantization")
    config = {k: v for k, v in checkpoint.text_config.items() if k not in packed}
    if checkpoint.text_config is not checkpoint.config:  # the text model of a composed one
        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[checkpoint.family]]
    return config


def _files(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    group, size = list[Unit](), 0
    for unit in units:
        nbytes = sum(math.prod(s) * d.itemsize for d, s in unit.entries.values())
        if group and size + nbytes > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(unit)
        size += nbytes
    yield group


def _write(
    workspace: Workspace, name: str, units: list[Unit], made: Plan, progress: Progress
) -> dict[str, Any]:
    entries = {key: entry for unit in units for key, entry in unit.entries.items()}
    path = workspace.files / name
    try:
        with TensorWriter(path, entries, {}) as out:
            for at, unit in enumerate(units, 1):
                for key, tensor in unit.make():
                    assert tensor.dtype == entries[key][0], key
                    out.append(key, tensor.contiguous().view(-1).view(torch.uint8).numpy())
                if at % 8 == 0 or at == len(units):
                    progress(at, len(units), name)
    except OSError as error:
        raise disk_error(path, error) from error
    return out.facts()


def _identity(made: Plan) -> dict[str, Any]:
    return {
        "source": made.checkpoint.fingerprint(),
        "files": made.checkpoint.file_hashes(),
        "export": made.wanted.model_dump(mode="json"),
        "versions": {"optim-llm": version("optim-llm")},
    }


def _recipe(made: Plan) -> Recipe:
    return Recipe(version=1, model=made.checkpoint.source, export=made.wanted)


def _manifest(made: Plan, workspace: Workspace) -> Manifest:
    records = workspace.done
    return Manifest(
        made=made_here(),
        source=source_of(made.checkpoint),
        recipe=_recipe(made).model_dump(mode="json", exclude_none=True),
        bytes=sum(size for record in records for size in record["tensors"].values()),
        parameters=sum(math.prod(held.shape) for held in made.held),
        notes=list(made.notes),
        shards=shards_in(records),
    )


def _card(made: Plan, manifest: Manifest) -> str:
    cells = "".join(
        f"| {row['from']} | {row['to']} | {row['params']:,} | {row['change'] or 'none'} |\n"
        for row in made.as_dict()["weights"]
    )
    top = front_matter(origin_of(made.checkpoint), (made.wanted.format, "optim"))
    return f"""{top}
# {made.output.name}

{made.checkpoint.name} as {made.exporter.title}, written by `optim`:
{manifest.bytes:,} bytes of weights.

| was | is | weights | change |
|---|---|---:|---|
{cells}
`optim inspect --verify` checks the files against `optim.json`. Made with this recipe:

```yaml
{to_yaml(_recipe(made)).strip()}
```
"""
