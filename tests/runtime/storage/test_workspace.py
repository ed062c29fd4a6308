"""The workspace: whatever instant a run is cut off at, the next one goes on from what is safe."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from optim.recipes.errors import MACHINE, USAGE, OptimError
from optim.runtime.storage import workspace as module
from optim.runtime.storage.manifest import Cost, Manifest, read_manifest, verify
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.workspace import Workspace, index_of, shards_in
from optim.runtime.system.hashes import file_sha256, tensor_sha256

IDENTITY = {"source": "abc", "recipe": {"bits": 4, "sym": False}}
STEPS = 3


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


def _tensors(step: int) -> dict[str, Tensor]:
    return {f"block.{step}.weight": torch.full((4, 4), float(step))}


def _run(output: Path, identity: dict[str, Any] = IDENTITY, force: bool = False) -> list[int]:
    """A whole run of three steps; returns which of them had to be done."""
    workspace = Workspace(output, identity, force)
    worked = list(range(len(workspace.done), STEPS))
    for step in worked:
        record = workspace.write_shard(f"shard-{step}.safetensors", _tensors(step))
        workspace.commit(record | {"step": step})
    workspace.write_text("model.safetensors.index.json", index_of(workspace.done))
    shards = {record["file"]: record["sha256"] for record in workspace.done}
    workspace.write_text("optim.json", json.dumps({"format_version": 1, "shards": shards}))
    workspace.publish()
    return worked


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _leave(workspace: Workspace) -> None:
    """What a killed process leaves: the files, without the lock."""
    workspace.close()


def test_a_run_appears_whole(tmp_path: Path) -> None:
    assert _run(tmp_path / "out") == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    shard = tmp_path / "out" / "shard-1.safetensors"
    assert torch.equal(load_file(shard)["block.1.weight"], _tensors(1)["block.1.weight"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 3 * 64
    assert index["weight_map"]["block.2.weight"] == "shard-2.safetensors"


def test_the_journal_tells_the_shards_hash(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out", IDENTITY, False)
    record = workspace.write_shard("a.safetensors", _tensors(0))
    assert record["sha256"] == file_sha256(workspace.files / "a.safetensors")
    assert record["tensors"] == {"block.0.weight": 64}
    workspace.discard()
    assert list(tmp_path.iterdir()) == []


def _cut_line(text: bytes) -> bytes:
    return text[:-9]


def _cut_character(text: bytes) -> bytes:
    return text[:-2] + "é".encode()[:1]


def _half_zeros(text: bytes) -> bytes:
    """What some file systems leave where a file had grown but not been written."""
    return text[:-20] + bytes(20)


@pytest.mark.parametrize("damage", [_cut_line, _cut_character, _half_zeros])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_journal_cut_off_loses_one_step(
    damage: Callable[[bytes], bytes], steps: int, tmp_path: Path
) -> None:
    _run(tmp_path / "whole")
    workspace = Workspace(tmp_path / "out", IDENTITY, False)
    for step in range(steps):
        record = workspace.write_shard(f"shard-{step}.safetensors", _tensors(step))
        workspace.commit(record | {"step": step})
    _leave(workspace)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.write_bytes(damage(journal.read_bytes()))
    assert _run(tmp_path / "out") == list(range(steps - 1, STEPS))
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_at_every_system_call(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die at the n-th fsync or rename, for every n; then go on; the bytes are always the same."""
    _run(tmp_path / "whole")
    wanted, original = _bytes(tmp_path / "whole"), getattr(os, call)
    for nth in range(1, 12):
        output, left, died = tmp_path / str(nth), [nth], False

        def deadly(*args: Any, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return original(*args)

        monkeypatch.setattr(os, call, deadly)
        try:
            _run(output)
        except Killed:
            died = True
        monkeypatch.setattr(os, call, original)
        if died:
            assert not output.exists()
            _run(output)
        assert _bytes(output) == wanted
    assert not died  # the last n is beyond the end of a run: every call was tried


def test_killed_between_the_two_renames_of_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    _run(output, {"old": 1})
    old, original = _bytes(output), os.replace

    def deadly(source: Path, target: Path) -> None:
        if Path(target) == output:
            raise Killed
        original(source, target)

    monkeypatch.setattr(os, "replace", deadly)
    with pytest.raises(Killed):
        _run(output, force=True)
    monkeypatch.setattr(os, "replace", original)
    assert (tmp_path / "out.partial" / "replaced").is_dir()  # nothing is lost
    with pytest.raises(OptimError, match="exists"):
        _run(output)  # without --force: what stood there is back
    assert _bytes(output) == old and (tmp_path / "out.partial").is_dir()
    assert _run(output, force=True) == []
    _run(tmp_path / "whole")
    assert _bytes(output) == _bytes(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_an_existing_output_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    _run(output)
    before = _bytes(output)
    with pytest.raises(OptimError, match="exists") as caught:
        _run(output, {"other": 1})
    assert caught.value.code == USAGE and "--force" in (caught.value.fix or "")
    assert _bytes(output) == before and [p.name for p in tmp_path.iterdir()] == ["out"]
    _run(output, {"other": 1}, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_appears_while_a_run_goes_on_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "out"
    workspace = Workspace(output, IDENTITY, True)
    workspace.commit(workspace.write_shard("shard-0.safetensors", _tensors(0)))
    output.mkdir()
    (output / "thesis.tex").write_text("keep")
    with pytest.raises(OptimError, match="optim has not made it") as caught, workspace:
        workspace.publish()
    assert "the work is kept" in (caught.value.fix or "")
    assert (output / "thesis.tex").read_text() == "keep"
    (output / "thesis.tex").unlink()
    output.rmdir()
    assert _run(output) == [1, 2]  # the step that was done is not done again


def test_another_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out", IDENTITY, False)
    workspace.commit(workspace.write_shard("shard-0.safetensors", _tensors(0)))
    _leave(workspace)
    before = _bytes(tmp_path / "out.partial" / "artifact")
    other = {"source": "abc", "recipe": {"bits": 3, "sym": False}}
    with pytest.raises(OptimError, match=r"recipe\.bits 4 -> 3") as caught:
        Workspace(tmp_path / "out", other, False)
    assert caught.value.code == USAGE and "sym" not in caught.value.message
    assert _bytes(tmp_path / "out.partial" / "artifact") == before
    assert _run(tmp_path / "out", other, force=True) == [0, 1, 2]  # starts over


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    first = Workspace(tmp_path / "out", IDENTITY, False)
    with pytest.raises(OptimError, match="another run") as caught:
        Workspace(tmp_path / "out", IDENTITY, False)
    assert caught.value.code == USAGE
    first.close()
    assert _run(tmp_path / "out") == [0, 1, 2]


def test_a_full_disk_leaves_the_finished_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    workspace = Workspace(tmp_path / "out", IDENTITY, False)
    workspace.commit(workspace.write_shard("shard-0.safetensors", _tensors(0)))
    with monkeypatch.context() as patch:
        patch.setattr("optim.runtime.storage.workspace.save_file", full)
        with pytest.raises(OptimError, match="No space left") as caught:
            workspace.write_shard("shard-1.safetensors", _tensors(1))
    assert caught.value.code == MACHINE and "same command" in (caught.value.fix or "")
    assert [p.name for p in workspace.files.iterdir()] == ["shard-0.safetensors"]
    workspace.close()
    assert _run(tmp_path / "out") == [1, 2]


def test_tensor_hash_is_of_the_stored_bytes() -> None:
    import hashlib

    tensor = torch.randn(3, 4).bfloat16()
    assert tensor_sha256(tensor.T.contiguous().T) == tensor_sha256(tensor)
    raw = tensor.view(torch.uint8).numpy().tobytes()
    assert tensor_sha256(tensor) == hashlib.sha256(raw).hexdigest()


def _stopped(output: Path) -> Workspace:
    """A run that has done one of its steps."""
    workspace = Workspace(output, IDENTITY, False)
    record = workspace.write_shard("shard-0.safetensors", _tensors(0))
    workspace.commit(record | {"step": 0})
    workspace.close()
    return workspace


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_kept_shard_that_is_not_what_was_written_is_refused(tmp_path: Path, damage: str) -> None:
    shard = _stopped(tmp_path / "out").files / "shard-0.safetensors"
    shard.unlink() if damage == "gone" else shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(OptimError, match=r"shard-0\.safetensors is not what") as caught:
        _run(tmp_path / "out")
    assert caught.value.code == MACHINE
    assert _run(tmp_path / "out", force=True) == [0, 1, 2]


def test_another_source_is_named(tmp_path: Path) -> None:
    identity = {"source": "a", "files": {"model.safetensors": "1", "other.safetensors": "2"}}
    workspace = Workspace(tmp_path / "out", identity, False)
    workspace.commit(workspace.write_shard("a.safetensors", _tensors(0)))
    workspace.close()
    now = {"source": "b", "files": {"model.safetensors": "3", "other.safetensors": "2"}}
    with pytest.raises(OptimError, match=r"another source: model\.safetensors has changed since"):
        Workspace(tmp_path / "out", now, False)


def test_two_steps_do_not_write_one_tensor(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out", IDENTITY, False)
    workspace.commit(workspace.write_shard("a.safetensors", _tensors(0)))
    with pytest.raises(OptimError, match=r"written as block\.0\.weight"):
        workspace.commit(workspace.write_shard("b.safetensors", _tensors(0)))


def test_a_shard_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    path = _stopped(tmp_path / "out").files / "shard-0.safetensors"
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_source_that_changes_while_it_is_read_is_refused(tiny_folder: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_folder))
    workspace = Workspace(tiny_folder.with_name("out"), IDENTITY, False, checkpoint)
    checkpoint.fingerprint()
    path = tiny_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(OptimError, match=r"model\.safetensors has changed while it was read"):
        workspace.publish()
    workspace.close()
    assert not tiny_folder.with_name("out").exists()


def test_what_is_measured_is_kept_before_the_artifact_has_its_name(tmp_path: Path) -> None:
    output, seen = tmp_path / "out", list[Path]()

    def prove(folder: Path) -> dict[str, Any]:
        assert (folder / "optim.json").is_file() and not output.exists()
        seen.append(folder)
        return {"text": "t", "windows": 1, "window": 8, "tokens": 7, "perplexity": 9.0}

    def run() -> None:
        with Workspace(output, IDENTITY, False) as workspace:
            if not workspace.done:
                workspace.commit(workspace.write_shard("a.safetensors", _tensors(0)))
            workspace.write_manifest(Manifest(shards=shards_in(workspace.done)))
            workspace.publish(prove, Cost(seconds=2.0, peak_memory_bytes=3))

    run()
    whole = read_manifest(output)
    assert whole and whole.cost and whole.evaluation and whole.evaluation["perplexity"] == 9.0
    shutil.rmtree(output)
    left = Workspace(output, IDENTITY, False)
    left.commit(left.write_shard("a.safetensors", _tensors(0)))
    (left.files / "optim.json.new").write_text("{")  # killed in the recording
    (left.files / "templates").mkdir()
    left.close()
    run()
    assert sorted(p.name for p in output.iterdir()) == ["README.md", "a.safetensors", "optim.json"]
    again = read_manifest(output)
    assert again and again.cost is None and again.evaluation == whole.evaluation
    assert len(seen) == 2


def _joined(output: Path) -> None:
    """A whole run whose shards become one file."""
    with Workspace(output, IDENTITY, False) as workspace:
        for step in range(len(workspace.done), STEPS):
            tensors = _tensors(step) | {f"{step}.shape": torch.tensor([step, 4])}
            workspace.commit(workspace.write_shard(f"shard-{step}.safetensors", tensors))
        assert workspace.join("model.safetensors")
        text = json.dumps({"format_version": 1, "shards": shards_in(workspace.done)})
        workspace.write_text("optim.json", text)
        workspace.publish()


def test_shards_become_one_file(tmp_path: Path) -> None:
    _joined(tmp_path / "out")
    assert sorted(_bytes(tmp_path / "out")) == ["model.safetensors", "optim.json"]
    held = load_file(tmp_path / "out" / "model.safetensors")
    wanted = {k: v for step in range(STEPS) for k, v in _tensors(step).items()}
    wanted |= {f"{step}.shape": torch.tensor([step, 4]) for step in range(STEPS)}
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[name], wanted[name]) for name in wanted)
    assert verify(tmp_path / "out") == []


def test_a_large_model_stays_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 3 * 64 - 1)
    with Workspace(tmp_path / "out", IDENTITY, False) as workspace:
        for step in range(STEPS):
            workspace.commit(workspace.write_shard(f"shard-{step}.safetensors", _tensors(step)))
        assert not workspace.join("model.safetensors")
        assert len(list(workspace.files.iterdir())) == STEPS
        workspace.discard()


@pytest.mark.parametrize("place", [(os, "fsync"), (os, "replace"), (Path, "unlink")])
def test_killed_at_every_system_call_of_joining(
    place: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _joined(tmp_path / "whole")
    wanted, (owner, call) = _bytes(tmp_path / "whole"), place
    original, deaths = getattr(owner, call), 0
    for n in range(1, 30):
        left = [n]

        def dies(*words: Any, left: list[int] = left, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return original(*words, **named)

        output = tmp_path / f"{n}"
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(owner, call, dies)
            _joined(output)
        deaths += not output.exists()
        if not output.exists():
            _joined(output)
        assert _bytes(output) == wanted
        assert not (tmp_path / f"{n}.partial").exists()
    assert deaths >= STEPS
