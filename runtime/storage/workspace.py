"""Write an artifact so that it is either complete or visibly unfinished.

While a run goes on everything is in `<output>.partial`: the shards under `artifact/`, and a journal
whose first line says what is being made and every further line what is safely on disk. The same run
started again goes on after the last journalled step; at the end one rename makes the artifact.
Nothing but the day and what `prove` records depends on time or machine, so a resumed run ends with
the same bytes.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from optim.recipes.errors import CHECK_FAILED, MACHINE, USAGE, OptimError
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.join import MOST_BYTES, join
from optim.runtime.storage.manifest import Cost, Manifest, Source
from optim.runtime.storage.record import record as keep
from optim.runtime.storage.tensors import TensorInfo
from optim.runtime.system.files import ordinary_mode, sync
from optim.runtime.system.hashes import file_sha256
from optim.runtime.system.output import (
    MANIFEST,
    cannot_write,
    foreign_workspace,
    refusal,
    workspace_of,
)

SHARD_BYTES = 2**30
Prove = Callable[[Path], dict[str, Any] | None]
"""Measures the finished artifact in a folder; returns the evaluation to keep in it, if any."""
KEPT = "kept"
"""Folder of a workspace: long work that is done before the first step, with its own journal."""


class Workspace:
    """The unfinished artifact at `<output>.partial`, locked for this process.

    `identity` is what the run makes and from what; `done` the records of the steps already on disk,
    `resumed` whether there were some at the start.
    `source` is what is read: it must be at the end what it was at the start.
    """

    def __init__(
        self,
        output: Path,
        identity: Mapping[str, Any],
        force: bool,
        source: Checkpoint | None = None,
    ) -> None:
        self.output, self.source = output, source
        self.folder = workspace_of(output)
        self.files = self.folder / "artifact"
        self.done: list[dict[str, Any]] = []
        self._journal = self.folder / "journal.jsonl"
        self._identity = json.loads(json.dumps(identity))
        self._replace = force
        for problem in (foreign_workspace(self.folder), None if force else refusal(output, force)):
            if problem is not None:
                raise problem
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        self._lock = _lock(self.folder)
        self._restore()
        problem = refusal(output, force)
        if problem is not None:
            self.close() if self._journal.exists() else self.discard()
            raise problem
        self.files.mkdir(exist_ok=True)
        self._resume(force)
        self.resumed = bool(self.done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """After a failure: kept, to be resumed, unless the input is bad or nothing is done yet."""
        if error is None:
            return
        bad_input = isinstance(error, OptimError) and error.code in (USAGE, CHECK_FAILED)
        if bad_input or not (self.done or (self.folder / KEPT).exists()):
            self.discard()
        else:
            self.close()

    def write_shard(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Write one safetensors file, whole or not at all; returns its journal facts."""
        path, unfinished = self.files / name, self.files / (name + ".unfinished")
        try:
            save_file(tensors, unfinished, metadata={"format": "pt"})
            ordinary_mode(unfinished)
            sync(unfinished)
            os.replace(unfinished, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise disk_error(path, error) from error
        sizes = {key: t.numel() * t.element_size() for key, t in tensors.items()}
        return {"file": name, "sha256": file_sha256(path), "tensors": sizes}

    def commit(self, record: dict[str, Any]) -> None:
        """Journal a finished step; after this line is on disk the step is never done again.

        OptimError (2) if another step has written a tensor of the same name.
        """
        record = json.loads(json.dumps(record))
        for earlier in self.done:
            if twice := next(iter(record["tensors"].keys() & earlier["tensors"].keys()), None):
                message = f"two tensors would be written as {twice}"
                raise OptimError(message, "fetch the model again", USAGE)
        append_line(self._journal, record)
        self.done.append(record)

    def join(self, name: str) -> bool:
        """Make one file `name` of all shards, if that is not too large; whether there is one.

        The shards are removed when the journal says that their tensors are in the new file: a run
        that is killed at any instant finds the one or the other.
        """
        if sum(size for record in self.done for size in record["tensors"].values()) > MOST_BYTES:
            return False
        files = {self.files / record["file"]: None for record in self.done}
        if list(files) != [self.files / name]:
            try:
                sha256 = join(list(files), self.files / name)
            except OSError as error:
                raise disk_error(self.files / name, error) from error
            self.done = [record | {"file": name, "sha256": sha256} for record in self.done]
            self._write_journal()
        for path in self.files.glob("*.safetensors"):
            if path.name != name:
                path.unlink()
        return True

    def write_text(self, name: str, text: str) -> None:
        """One of the artifact's small files."""
        try:
            (self.files / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise disk_error(self.files / name, error) from error

    def write_manifest(self, manifest: Manifest) -> None:
        """`optim.json`."""
        self.write_text(MANIFEST, manifest.text())

    def publish(self, prove: Prove | None = None, cost: Cost | None = None) -> None:
        """Make the artifact appear at `output`, then remove the workspace.

        It is measured before, and carries what `prove` found and what making it took: of a resumed
        run only a part is known, which is left out. A run stopped meanwhile measures again.

        What stood there moves into the workspace first, in one rename; a run that is killed before
        the second rename leaves it there, and the next one puts it back. OptimError (1) if
        something has appeared at `output` that may not be replaced: the workspace is kept.
        """
        if prove is not None:
            keep(self.files, prove(self.files), None if self.resumed else cost)
        if self.source is not None:
            self.source.require_unchanged()
        problem = refusal(self.output, self._replace)
        if problem is not None:
            fix = "move it away, and run the same command again: the work is kept"
            raise OptimError(problem.message, fix)
        try:
            if self.output.exists():
                os.replace(self.output, self._replaced)
            os.replace(self.files, self.output)
        except OSError as error:
            self._restore()
            raise disk_error(self.output, error) from error
        self.discard()

    @property
    def _replaced(self) -> Path:
        """Where what stood at the output waits until the new artifact is there."""
        return self.folder / "replaced"

    def _restore(self) -> None:
        """Put back what was moved away, if nothing came in its place."""
        if self._replaced.exists() and not self.output.exists():
            os.replace(self._replaced, self.output)

    def discard(self) -> None:
        """Remove the workspace and all that is in it."""
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Leave the workspace as it is, to be resumed."""
        self._lock.release()

    def _resume(self, force: bool) -> None:
        lines = read_journal(self._journal)
        if lines and lines[0] != self._identity:
            if not force:
                self.close()
                raise _other_run(self.output, lines[0], self._identity)
            lines = []
        if (path := self._damaged(lines[1:])) is not None:
            if not force:
                self.close()
                what = f"{path} is not what the unfinished run has written"
                raise OptimError(what, "start over with --force", MACHINE)
            lines = []
        self.done = lines[1:]
        kept = {record.get("file") for record in self.done}
        for path in self.files.iterdir():  # what is not journalled is written again
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._write_journal()  # without a line that a kill has cut off

    def _write_journal(self) -> None:
        """The journal anew, whole or not at all."""
        text = "".join(json.dumps(line) + "\n" for line in [self._identity, *self.done])
        try:
            new = self._journal.with_suffix(".new")
            new.write_text(text)
            sync(new)
            os.replace(new, self._journal)
        except OSError as error:
            raise disk_error(self._journal, error) from error

    def _damaged(self, records: list[dict[str, Any]]) -> Path | None:
        """Hash again what an earlier run has left: the first file that is not what was written."""
        kept: dict[Path, str] = {
            self.files / r["file"]: r["sha256"] for r in records if "file" in r
        }
        if records:
            states = records[-1].get("states", {})
            kept |= {self.folder / name: known for name, known in states.items()}
        for path, known in kept.items():
            if not path.is_file() or file_sha256(path) != known:
                return path
        return None


def source_of(checkpoint: Checkpoint) -> Source:
    """What a manifest says of the model that was read."""
    return Source(name=checkpoint.name, sha256=checkpoint.fingerprint())


def shards_in(records: list[dict[str, Any]]) -> dict[str, str]:
    """File -> hash, of the journal's records."""
    return {record["file"]: record["sha256"] for record in records}


def index_of(records: list[dict[str, Any]]) -> str:
    """The text of model.safetensors.index.json for these shard records."""
    weights = {name: record["file"] for record in records for name in record["tensors"]}
    total = sum(size for record in records for size in record["tensors"].values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    return json.dumps(index, indent=1)


def shards_of(infos: Mapping[str, TensorInfo]) -> Iterator[list[str]]:
    """The tensors' names in groups of about SHARD_BYTES, a file each."""
    group, size = list[str](), 0
    for name, info in infos.items():
        if group and size + info.nbytes > SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += info.nbytes
    yield group


def identity(
    checkpoint: Checkpoint, recipe: dict[str, Any], calibration: str | None
) -> dict[str, Any]:
    """What a run is a function of: another identity is another run.

    `calibration` is the hash of the tokens.
    """
    return {
        "source": checkpoint.fingerprint(),
        "files": checkpoint.file_hashes(),
        "recipe": recipe,
        "calibration": calibration,
        "versions": {name: version(name) for name in ("optim-llm", "torch", "transformers")},
    }


def _lock(folder: Path) -> FileLock:
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OptimError(
            f"{folder} is being written by another run",
            "wait for it, or choose another -o/--output",
            USAGE,
        ) from None
    return lock


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """A line more in a journal, on the disk when this returns; OptimError (4) if it cannot be."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(path, error) from error


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a line cut off by a kill ends it."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def _other_run(output: Path, there: Any, here: Any) -> OptimError:
    before, now = _flatten(there), _flatten(here)
    changed = [k for k in now if k.startswith("files.") and before.get(k) not in (None, now[k])]
    if changed:
        names = ", ".join(key.removeprefix("files.") for key in changed)
        return OptimError(
            f"{output}.partial was begun with another source: {names} has changed since",
            "--force to start over, or put the old file back",
            USAGE,
        )
    keys = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    changes = ", ".join(f"{k} {before.get(k)} -> {now.get(k)}" for k in keys[:6])
    return OptimError(
        f"{output}.partial is an unfinished run of something else ({changes})",
        "run the old command again to finish it, choose another -o/--output, "
        "or --force to start over",
        USAGE,
    )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def disk_error(path: Path, error: OSError) -> OptimError:
    """What to say when a file cannot be written."""
    return OptimError(
        f"cannot write {path}: {error.strerror or error}",
        "free some disk space and run the same command again: it goes on where it stopped",
        MACHINE,
    )
