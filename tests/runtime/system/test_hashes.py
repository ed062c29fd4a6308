"""Hashes of files: of every byte, remembered only while the file is what it was."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from optim.recipes.errors import OptimError
from optim.runtime.system import hashes
from optim.runtime.system.hashes import file_sha256, known_sha256


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is old enough and large enough to be remembered."""
    monkeypatch.setenv("OPTIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "WORTH_KEEPING", 4)
    monkeypatch.setattr(hashes, "SETTLED", -(10**12))
    path = tmp_path / "a.bin"
    path.write_bytes(b"12345678")
    return path


def test_a_remembered_file_is_not_read_again(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = known_sha256(large)
    assert found == hashlib.sha256(b"12345678").hexdigest()
    monkeypatch.setattr(hashes, "file_sha256", lambda _: pytest.fail("read again"))
    assert known_sha256(large) == found


def test_one_changed_byte_is_seen_even_with_the_old_time(large: Path) -> None:
    first, old = known_sha256(large), large.stat()
    time.sleep(0.02)
    large.write_bytes(b"12345679")
    os.utime(large, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert large.stat().st_mtime_ns == old.st_mtime_ns
    assert known_sha256(large) == file_sha256(large) != first


def test_a_file_that_is_new_is_not_remembered(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED", 10**15)
    known_sha256(large)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"sha256": "x"}', "\xff"])
def test_a_damaged_memory_is_not_used(large: Path, tmp_path: Path, text: str) -> None:
    known_sha256(large)
    (kept,) = (tmp_path / "cache" / "hashes").iterdir()
    kept.write_text(text, encoding="latin1")
    assert known_sha256(large) == file_sha256(large)


def test_a_file_that_changes_while_it_is_read_is_refused(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reading(path: Path) -> str:
        path.write_bytes(b"another")
        return "0" * 64

    monkeypatch.setattr(hashes, "file_sha256", reading)
    with pytest.raises(OptimError, match="changes while it is read"):
        known_sha256(large)


def test_a_file_that_is_not_there_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(OptimError, match=r"cannot read .*gone"):
        known_sha256(tmp_path / "gone")
