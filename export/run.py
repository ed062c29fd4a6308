"""`optim export`: open a model, say what a format makes of it, write it."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from optim.export.exporter import Exporter, Held, Plan, Progress, Prove, rows
from optim.export.formats import FORMATS
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.schema import Export
from optim.runtime.formats import static_int
from optim.runtime.sparsity.side_file import SIDE
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.size_table import rounded_before
from optim.runtime.system.memory import peak_bytes
from optim.runtime.system.output import check_file, check_output

WHOLE = ("F32", "F16", "BF16")  # types of GGUF that are read as they are


@dataclass(frozen=True, slots=True)
class Report:
    """What was made: for the screen and `--json`."""

    output: str
    format: str
    source_bytes: int
    output_bytes: int
    weights: list[dict[str, Any]]
    seconds: float
    peak_memory_bytes: int
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def plan(
    source: str | Checkpoint,
    wanted: Export,
    output: str | None = None,
    *,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """Open a model and decide what becomes of each weight; nothing is written.

    Raises OptimError: 2 for a model or an output that will not do, 4 for the disk.
    """
    if isinstance(source, str):
        source = open_checkpoint(source, trust_remote_code=trust_remote_code)
    exporter = FORMATS[wanted.format]
    refuse(source, wanted, exporter)
    model = PlainView(source).with_integers()
    held = [_as_read(source, item) for item in exporter.hold(model, wanted)]
    name = f"./{source.name}-{wanted.format}" if not exporter.suffix else f"./{source.name}"
    place = Path(output or f"{name}{exporter.suffix}")
    nbytes = sum(item.nbytes for item in held)
    inputs = source.store.files if exporter.suffix else source.inputs()
    if (source.folder / "tokenizer.json").is_file():
        source.tokenizer()  # one that cannot be read is not handed on
    check_place(place, exporter, force, nbytes, inputs)
    notes = tuple(_notes(source, model))
    return Plan(source, model, wanted, exporter, place, force, held, notes)


def check_place(
    place: Path, exporter: Exporter, force: bool, need: int, inputs: Iterable[Path] = ()
) -> None:
    """Raise OptimError, 2 or 4, for a place where an export of `need` bytes cannot stand."""
    if exporter.suffix:
        check_file(place, exporter.suffix, force, need, inputs)
    else:
        check_output(place, force, need, inputs)


def export(made: Plan, progress: Progress, prove: Prove | None = None) -> Report:
    """Carry out a plan; `prove` measures the result before it gets its name.

    Raises OptimError: 2 for input that turns out to be bad, 4 for the disk.
    """
    start = time.monotonic()
    nbytes = made.exporter.write(made, progress, prove)
    facts = made.as_dict()
    return Report(
        output=str(made.output),
        format=made.wanted.format,
        source_bytes=facts["source_bytes"],
        output_bytes=nbytes,
        weights=rows(made.held),
        seconds=time.monotonic() - start,
        peak_memory_bytes=peak_bytes(),
        notes=list(made.notes),
    )


def _as_read(checkpoint: Checkpoint, item: Held) -> Held:
    """The blocks of a GGUF source are widened to floats as they are read, and that rounds them."""
    if item.moved is not None:
        return item  # as integers
    stored = checkpoint.held(item.name) if item.name in checkpoint.tensors else None
    if checkpoint.store.files[0].suffix != ".gguf" or stored is None or stored[0] in WHOLE:
        return item
    read = str(checkpoint.tensors[item.name].dtype).removeprefix("torch.")
    change = ", then ".join(filter(None, (f"rounded to {read} as it is read", item.change)))
    return replace(item, source=stored[0], change=change)


def refuse(checkpoint: Checkpoint, wanted: Export, exporter: Exporter) -> None:
    """Keys that the format does not read, and models that no format of others holds."""
    given = wanted.model_fields_set - {"format"}
    for key in sorted(given - exporter.keys):
        if getattr(wanted, key):
            readers = [name for name, other in FORMATS.items() if key in other.keys]
            fix = f"leave it out, or choose --format {' or '.join(readers)}"
            raise OptimError(f"--{key} means nothing to the format {wanted.format}", fix, USAGE)
    if (checkpoint.quantization or {}).get("quant_method") == static_int.METHOD:
        what = f"{checkpoint.source} has static integer activations, which no other format holds"
        fix = "quantize the original with `optim quantize -m awq`, and export that"
        raise OptimError(what, fix, USAGE)
    if not checkpoint.quantization_is_ours:
        method = (checkpoint.quantization or {}).get("quant_method")
        what = f"{checkpoint.source} is stored by the method {method!r}, which is not known here"
        raise OptimError(what, "export the original 16-bit model", USAGE)


def _notes(checkpoint: Checkpoint, model: PlainView) -> list[str]:
    notes = []
    if (checkpoint.folder / SIDE).is_file():
        notes.append("what pruning skips as the model runs is not carried over: all weights are")
    if checkpoint.left_out:
        notes.append(f"{len(checkpoint.left_out)} tensors that are no part of the text model stay")
    before = rounded_before(checkpoint)
    if before is not None and not any(model.scheme(name) for name in model.tensors):
        notes.append(f"the source is {before}")
    return notes
