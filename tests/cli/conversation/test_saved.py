"""Saved conversations: round trip, never over another file, hostile files refused."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim.cli.conversation.saved import Message, SavedChat, load, save
from optim.recipes.errors import OptimError

TURNS = [Message(role="user", content="hi"), Message(role="assistant", content="hello\n…")]
CHAT = SavedChat(model="demo", system="be kind", parameters={"top_k": 3}, messages=TURNS)
WORDS = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.tuples(WORDS, WORDS), max_size=3), st.none() | WORDS)
def test_json_round_trip(pairs: list[tuple[str, str]], system: str | None) -> None:
    messages = [
        Message(role=role, content=text)
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    chat = SavedChat(model="demo", system=system, parameters={"stop": ["a"]}, messages=messages)
    assert SavedChat.model_validate_json(chat.model_dump_json()) == chat


def test_saved_is_loaded_and_saved_over(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    save(path, CHAT)
    assert load(path) == CHAT
    save(path, SavedChat(model="other"))
    assert load(path).model == "other"
    assert os.listdir(tmp_path) == ["chat.json"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    save(tmp_path / "real.json", CHAT)
    (tmp_path / "link.json").symlink_to("real.json")
    save(tmp_path / "link.json", SavedChat(model="other"))
    assert (tmp_path / "link.json").is_symlink()
    assert load(tmp_path / "real.json").model == "other"


@pytest.mark.parametrize("content", [b"precious", b"", b'{"model": "demo", "mine": 1}', b"\xff"])
def test_another_file_is_not_written_over(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.json"
    path.write_bytes(content)
    with pytest.raises(OptimError, match="is not a saved conversation") as caught:
        save(path, CHAT)
    assert caught.value.code == 2
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["notes.json"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chat.json"
    save(path, CHAT)

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OptimError, match="No space left on device"):
        save(path, SavedChat(model="other"))
    monkeypatch.undo()
    assert load(path) == CHAT
    assert os.listdir(tmp_path) == ["chat.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        b'{"model": 3}',
        b'{"model": "demo", "version": 2}',
        b'{"model": "demo", "extra": true}',
        b'{"model": "demo", "messages": [{"role": "system", "content": "x"}]}',
        b'{"model": "demo", "messages": [{"role": "assistant", "content": "x"}]}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "demo", "messages": [{"role": "user", "content": {"a": 1}}]}',
        b'{"model": "demo", "messages": ' + b"[" * 100_000,
        b"\x80\x04cos\nsystem\n",
        b'{"model": "\xff"}',
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(OptimError, match="is not a saved conversation") as caught:
        load(path)
    assert caught.value.code == 2


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing", "", "a" * 300):
        with pytest.raises(OptimError) as caught:
            load(tmp_path / name)
        assert caught.value.code == 2
    with pytest.raises(OptimError, match="cannot save to"):
        save(tmp_path / "no" / "folder.json", CHAT)
    with pytest.raises(OptimError):
        save(tmp_path / "nul\0.json", CHAT)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OptimError, match="too large"):
        load(path)


def test_only_the_owner_reads_a_saved_chat(tmp_path: Path) -> None:
    save(tmp_path / "chat.json", CHAT)
    assert stat.S_IMODE((tmp_path / "chat.json").stat().st_mode) == 0o600
