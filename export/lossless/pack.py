"""`optim pack`: a model's bf16 weights in fewer bytes, without loss, shard by shard.

Each shard is counted, encoded, written, then decoded again *from the file* and compared with the
sha256 of the original before it is journalled; a killed run goes on with the next one.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from optim.export.lossless.finish import finish, packed_config
from optim.export.lossless.plan import Plan, Shard, stored_dtype
from optim.recipes.errors import CHECK_FAILED, OptimError
from optim.runtime.storage.lossless.layout import Encoder, Tally
from optim.runtime.storage.lossless.layouts import LAYOUTS
from optim.runtime.storage.lossless.store import LosslessStore, pieces
from optim.runtime.storage.manifest import Cost, Manifest
from optim.runtime.storage.workspace import Prove, Workspace, disk_error
from optim.runtime.storage.writer import TensorWriter
from optim.runtime.system.hashes import tensors_sha256

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Report:
    """What was made: for the screen and `--json`. Bits per weight are those of packed tensors."""

    output: str
    layout: str
    source_bytes: int
    output_bytes: int
    packed_weights: int
    packed_bits_per_weight: float
    limit_bits_per_weight: float
    seconds: float
    peak_memory_bytes: int
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def pack(made: Plan, progress: Progress, prove: Prove | None = None) -> Report:
    """Carry out a plan; resumes an unfinished run of the same plan.

    `prove` measures the result before it gets its name.

    Raises OptimError: 2 for input that turns out to be bad, 3 if a shard does not decode to what
    went in, 4 where the machine gave out.
    """
    start = time.monotonic()
    workspace = Workspace(made.output, _identity(made), made.force, made.checkpoint)
    with workspace:
        _Job(made, workspace, progress).run()
        facts = finish(made, workspace)
        cost = Cost.since(start)
        workspace.publish(prove, cost)
    return Report(
        output=str(made.output),
        layout=made.pack.layout,
        source_bytes=made.source_bytes,
        seconds=cost.seconds,
        peak_memory_bytes=cost.peak_memory_bytes,
        notes=facts.pop("notes"),
        **facts,
    )


def _identity(made: Plan) -> dict[str, Any]:
    """What a run is a function of; another identity is another run."""
    return {
        "source": made.checkpoint.fingerprint(),
        "files": made.checkpoint.file_hashes(),
        "pack": made.pack.model_dump(mode="json"),
        "versions": {"optim-llm": version("optim-llm")},
    }


class _Job:
    """The shards, one after the other."""

    def __init__(self, made: Plan, workspace: Workspace, progress: Progress) -> None:
        self.made, self.workspace, self.progress = made, workspace, progress
        self.store, self.layout = made.checkpoint.store, LAYOUTS[made.pack.layout]

    def run(self) -> None:
        """Do every shard that is not journalled yet."""
        begun, done = time.monotonic(), 0
        shards = self.made.shards
        for i in range(len(self.workspace.done), len(shards)):
            record = self._shard(shards[i])
            self._prove(record)
            self.workspace.commit(record)
            done += sum(self.store.infos[name].nbytes for name in record["original_sha256"])
            rate = done / max(time.monotonic() - begun, 1e-9) / 1e9
            self.progress(i + 1, len(shards), f"{shards[i].file} · {rate:.2f} GB/s")

    def _pieces(self, name: str) -> Iterator[Tensor]:
        dtype = stored_dtype(self.store.infos[name], self.made.pack)
        return (tensor.to(dtype) for tensor in pieces(self.store, name))

    def _shard(self, shard: Shard) -> dict[str, Any]:
        """Write one file; returns its journal record."""
        tallies = {name: self.layout.tally() for names in shard.units.values() for name in names}
        found = [*shard.raw, *tallies]
        hashes = {name: tensors_sha256(self._counted(name, tallies.get(name))) for name in found}
        unfit = {name: why for name, tally in tallies.items() if (why := tally.unfit)}
        units = {
            unit: kept
            for unit, names in shard.units.items()
            if (kept := [name for name in names if name not in unfit])
        }
        infos = self.store.infos
        coders = {
            unit: self.layout.encoder([tallies[n] for n in names], [infos[n].shape for n in names])
            for unit, names in units.items()
        }
        packed = {name: coders[unit] for unit, names in units.items() for name in names}
        bits = {name: coder.bits(tallies[name]) for name, coder in packed.items()}
        raw = [*shard.raw, *unfit]
        return self._write(shard.file, units, raw, hashes, coders) | {
            "units": units,
            "notes": [f"{name} stays bf16: {why}" for name, why in unfit.items()],
            "original_sha256": hashes,
            "shapes": {name: list(infos[name].shape) for name in packed},
            "packed_bits": bits,
            "limits": {name: tallies[name].limit() for name in packed},
        }

    def _counted(self, name: str, tally: Tally | None) -> Iterator[Tensor]:
        for tensor in self._pieces(name):
            if tally is not None:
                tally.add(tensor)
            yield tensor

    def _write(
        self,
        file: str,
        units: dict[str, list[str]],
        raw: list[str],
        hashes: dict[str, str],
        coders: dict[str, Encoder],
    ) -> dict[str, Any]:
        prefix, infos = self.layout.prefix, self.store.infos
        sizes = {n: (stored_dtype(infos[n], self.made.pack), infos[n].shape) for n in raw}
        for unit, coder in coders.items():
            sizes |= {f"{unit}.{prefix}{piece}": size for piece, size in coder.sizes().items()}
        metadata = {"optim.sha256": json.dumps(hashes)}
        try:
            with TensorWriter(self.workspace.files / file, sizes, metadata) as out:
                for unit, names in units.items():
                    for made in self._coded(coders.pop(unit), names):
                        for piece, data in made.items():
                            out.append(f"{unit}.{prefix}{piece}", data)
                for name in raw:
                    for tensor in self._pieces(name):
                        out.append(name, tensor.contiguous().view(-1).view(torch.uint8).numpy())
        except OSError as error:
            raise disk_error(self.workspace.files / file, error) from error
        return out.facts()

    def _coded(self, coder: Encoder, names: list[str]) -> Iterator[dict[str, Any]]:
        for name in names:
            for tensor in self._pieces(name):
                yield coder.push(tensor)
        yield coder.finish()

    def _prove(self, record: dict[str, Any]) -> None:
        """Decode the file that was written and compare with the originals' hashes."""
        path = self.workspace.files / record["file"]
        config = packed_config(self.made.pack, [record])
        store = LosslessStore([path], config, Manifest(shapes=record["shapes"]))
        for name, sha256 in record["original_sha256"].items():
            if tensors_sha256(pieces(store, name)) != sha256:
                raise OptimError(
                    f"{name} does not decode to what it was: {path.name} is not kept",
                    "the memory or the disk of this machine may be at fault; run it again",
                    CHECK_FAILED,
                )
