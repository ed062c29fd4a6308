"""`optim.json`, the manifest of an artifact: what it was made from, how, and what it cost.

It is read and written here alone. A manifest may come from anyone: `read_manifest` refuses one
whose facts have the wrong form, so that nobody after it has to look again. The form is version 1
since the first artifact; later versions of optim add facts, and facts that are not known here are
kept as they are. The JSON schema is in docs/artifact.md.
"""

import json
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.system.files import load_json
from optim.runtime.system.hashes import file_sha256
from optim.runtime.system.memory import peak_bytes
from optim.runtime.system.output import MANIFEST

VERSION: Final = 1
PACKAGES = {"optim": "optim-llm", "torch": "torch", "transformers": "transformers"}
AGAIN = "make the artifact again, or fetch it again"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[^/\\\x00-\x1f]{1,255}$")]
Count = Annotated[int, Field(ge=0)]
Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Part(BaseModel):
    """A part of the manifest: strict in what it knows, silent on the rest."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class Source(Part):
    """The model that an artifact was made from: its name, and the hash of every byte of it."""

    name: str
    sha256: Sha256


class Made(Part):
    """With what it was made, and when: versions of packages, the day, the processor."""

    optim: str
    torch: str
    transformers: str
    date: str
    cpu: str


class Calibration(Part):
    """The text that guided it: windows of tokens, what each begins with, and their hash."""

    samples: Count
    seq_len: Count
    begin: list[Count] = []
    sha256: Sha256


class BlockError(Part):
    """How far a block's output moved, in mean squares, and how far plain rounding moves it."""

    error: float | None = None
    rounding_error: float | None = None
    held_back: dict[str, Measure] | None = None
    """Of `guide loss`: what the guided and the unguided block cost the end loss on held-back text,
    relative to plain rounding; and the standard error of the logarithm of their ratio."""


class Sparsity(Part):
    """What a pruned model leaves out: bytes of the side file's parts, and facts for each block."""

    sizes: dict[str, Any] | None = None
    blocks: list[dict[str, Any]] = []


class Cost(Part):
    """What making it took: seconds, and the most memory that the process held."""

    seconds: Measure
    peak_memory_bytes: Count

    @classmethod
    def since(cls, start: float) -> "Cost":
        """What this process has taken since the monotonic time `start`."""
        return cls(seconds=time.monotonic() - start, peak_memory_bytes=peak_bytes())


class Manifest(Part):
    """All that `optim.json` says. Only `format_version` and `shards` are in every artifact."""

    format_version: Literal[1] = VERSION
    made: Made | None = None
    source: Source | None = None
    recipe: dict[str, Any] | None = None
    calibration: Calibration | None = None
    bytes: Count | None = None
    parameters: Count | None = None
    bits_per_weight: Measure | None = None
    modules: dict[str, str] = {}
    """Linear -> how it is stored, in words."""
    blocks: list[BlockError] = []
    sparsity: Sparsity | None = None
    side_bytes: Count | None = None
    held_back: dict[str, Any] | None = None
    """What training measured on text that it did not see."""
    notes: list[str] = []
    shards: dict[FileName, Sha256] = {}
    """File -> its hash."""
    original_sha256: dict[str, Sha256] = {}
    """Tensor of the source -> the hash of its bytes."""
    source_sha256: dict[str, Sha256] | None = None
    """`original_sha256` of the quantized model that was packed."""
    packed_weights: Count | None = None
    packed_bits_per_weight: Measure | None = None
    limit_bits_per_weight: Measure | None = None
    shapes: dict[str, list[Annotated[int, Field(ge=1)]]] = {}
    """Tensor that is packed without loss -> its shape."""
    packed_bits: dict[str, Measure] = {}
    limits: dict[str, Measure] = {}
    """Tensor that is packed without loss -> the entropy of its weights."""
    evaluation: dict[str, Any] | None = None
    """What was measured at the end, or by `optim eval --record`."""
    cost: Cost | None = None

    def facts(self) -> dict[str, Any]:
        """As a plain dictionary. A fact that is not given is not there."""
        return {"format_version": VERSION} | self.model_dump(mode="json", exclude_unset=True)

    def text(self) -> str:
        """The file's content."""
        return json.dumps(self.facts(), indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an artifact folder; None where there is none.

    Raises OptimError (2) for one that is damaged, naming the fact, or that is of a later version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    found = load_json(path)
    stated = found.get("format_version")
    if type(stated) is int and stated > VERSION:
        fix = "install a newer optim"
        raise OptimError(f"{path} has the format version {stated}, newer than known", fix, USAGE)
    try:
        return Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))[:200]
        must = first["msg"].partition(" or instance of")[0].replace("Input should", "must")
        raise OptimError(f"{path} is damaged: {place} {must}", AGAIN, USAGE) from None


def made_here() -> Made:
    """What is making an artifact now. The day, not the hour: a run that goes on makes the same."""
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    versions = {name: version(package) for name, package in PACKAGES.items()}
    return Made(**versions, date=day, cpu=_cpu())


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def verify(folder: Path) -> list[str]:
    """Hash every shard again; returns what does not hold, nothing if all is well.

    Raises OptimError (2) if the folder has no manifest with shards to compare with.
    """
    manifest = read_manifest(folder)
    if manifest is None or not manifest.shards:
        fix = "only artifacts that optim wrote carry hashes"
        raise OptimError(f"there is no {MANIFEST} with hashes to verify", fix, USAGE)
    shards = manifest.shards
    present = {path.name for path in folder.glob("*.safetensors")}
    problems = [f"{name} is not in the manifest" for name in sorted(present - set(shards))]
    for name, expected in shards.items():
        if name not in present:
            problems.append(f"{name} is missing")
        elif file_sha256(folder / name) != expected:
            problems.append(f"{name} has changed since it was written")
    return problems
