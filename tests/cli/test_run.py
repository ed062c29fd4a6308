"""`optim run` with a prompt or a pipe: one answer, alone on standard output."""

import io
import json
import os
import signal
import sys
from collections.abc import Generator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

import optim.cli.run as module
from optim.cli.options import Asking
from optim.cli.run import run
from optim.recipes.errors import OptimError
from optim.runtime.engine.sampling import Sampling
from optim.runtime.engine.session import Stats
from optim.runtime.system.free_cores import Meter


class FakeSession:
    """Answers with the question itself, in two pieces; `complete` answers in capitals."""

    def __init__(self) -> None:
        self.stats, self.sampling, self.limit = Stats(), Sampling(temperature=0.7), 64
        self.messages: list[dict[str, str]] = []
        self.tokenizer = SimpleNamespace(has_chat_template=True)
        checkpoint = SimpleNamespace(name="tiny", source="./tiny")
        self.model = SimpleNamespace(checkpoint=checkpoint, tokenizer=self.tokenizer)
        self.interrupt = False

    def reply(self, text: str, reading: Any = None) -> Generator[str, None, None]:
        self.stats = Stats(
            prompt_tokens=3,
            new_tokens=2,
            prefill_seconds=0.1,
            decode_seconds=0.5,
            stop_reason="eos",
            drafted_tokens=4,
            accepted_tokens=1,
        )
        yield "You said: "
        if self.interrupt:
            os.kill(os.getpid(), signal.SIGINT)
        yield text
        yield "" if not self.interrupt else "never shown"

    def complete(self, text: str, reading: Any = None) -> Generator[str, None, None]:
        yield from map(str.upper, self.reply(text))

    def info(self) -> dict[str, str]:
        return {"weights": "none", "device": "cpu"}


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    fake = FakeSession()
    monkeypatch.setattr(module, "_open", lambda *_: fake)
    return fake


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the model was loaded before the input was checked")

    monkeypatch.setattr(module, "_open", refuse)


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Make `data` the whole of standard input, as a pipe."""
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading, encoding="utf-8"))


Captured = pytest.CaptureFixture[str]


def test_a_prompt_is_answered_once(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    pipe(monkeypatch, b"")
    assert run("tiny", "hello", Asking()) == 0
    assert capsys.readouterr() == ("You said: hello\n", "")


def test_a_pipe_is_one_question(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    pipe(monkeypatch, "two\nlines: é\n".encode())
    assert run("tiny", None, Asking()) == 0
    assert capsys.readouterr().out == "You said: two\nlines: é\n"


def test_a_pipe_comes_before_the_prompt(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    pipe(monkeypatch, b"some text\n")
    assert run("tiny", "sum it up", Asking()) == 0
    assert capsys.readouterr().out == "You said: some text\n\nsum it up\n"


def test_a_dash_is_standard_input(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    pipe(monkeypatch, b"some text")
    assert run("tiny", "-", Asking()) == 0
    assert capsys.readouterr().out == "You said: some text\n"


def test_an_open_silent_pipe_does_not_block_a_prompt(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr(module, "SILENCE", 0.01)
    with os.fdopen(reading) as stdin, os.fdopen(writing):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run("tiny", "hello", Asking()) == 0
    captured = capsys.readouterr()
    assert captured.out == "You said: hello\n"
    assert "answering the prompt alone" in captured.err


def test_no_standard_input_at_all(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert run("tiny", "hello", Asking(stats=True)) == 0
    assert capsys.readouterr().err == "[2 tokens · 2.0 tok/s · prompt 3 · 1 of 4 guesses right]\n"


def test_raw_completes(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    pipe(monkeypatch, b"")
    assert run("tiny", "hello", Asking(raw=True)) == 0
    assert capsys.readouterr().out == "YOU SAID: HELLO\n"


def test_a_base_model_continues_the_text_and_does_not_talk(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    session.tokenizer.has_chat_template = False
    pipe(monkeypatch, b"")
    assert run("tiny", "hello", Asking()) == 0
    captured = capsys.readouterr()
    assert captured.out == "YOU SAID: HELLO\n"
    assert captured.err == "no chat template: the text is continued as it is\n"
    with pytest.raises(OptimError, match="cannot talk"):
        run("tiny", None, Asking(chat=True))


def test_json_is_one_object(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    pipe(monkeypatch, b"")
    assert run("tiny", "hello", Asking(json=True)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert json.loads(captured.out) == {
        "text": "You said: hello",
        "tokens": 2,
        "tokens_per_second": 2.0,
        "stop_reason": "eos",
        "repeats": False,
        "prompt_tokens": 3,
        "prefill_seconds": 0.1,
        "decode_seconds": 0.5,
        "drafted_tokens": 4,
        "accepted_tokens": 1,
        "model": "./tiny",
        "sampling": json.loads(json.dumps(asdict(Sampling(temperature=0.7)))),
    }


def test_ctrl_c_keeps_what_came_and_exits_130(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    session.interrupt = True
    for options in (Asking(), Asking(json=True)):
        pipe(monkeypatch, b"")
        assert run("tiny", "hello", options) == 130
        out = capsys.readouterr().out
        assert "You said: hello" in out and "never" not in out
    assert json.loads(out)["stop_reason"] == "interrupted"


def test_chat_reads_a_pipe_line_by_line(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    pipe(monkeypatch, b"one\n/quit\nnever read\n")
    assert run("tiny", None, Asking(chat=True)) == 0
    captured = capsys.readouterr()
    assert captured.out == "You said: one\n"
    assert (
        captured.err
        == "tiny · none · cpu · temperature 0.7 · /help, Ctrl-C stops a reply, Ctrl-D leaves\n"
    )


@pytest.mark.parametrize(
    ("prompt", "data", "options", "said"),
    [
        (None, b"", Asking(), "the prompt is empty"),
        ("", b"", Asking(), "the prompt is empty"),
        ("  ", b"\n \n", Asking(), "the prompt is empty"),
        (None, b"caf\xe9", Asking(), "standard input is not UTF-8"),
        (b"caf\xe9".decode(errors="surrogateescape"), b"", Asking(), "the prompt is not UTF-8"),
        (None, b"", Asking(chat=True, json=True), "--json needs a prompt"),
        (None, b"", Asking(chat=True, raw=True), "--raw needs a prompt"),
        ("hi", b"", Asking(system="be kind", raw=True), "no place for a --system prompt"),
        ("hi", b"", Asking(draft="d", speculate="lookup"), "--draft guesses by itself"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_bad_input_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    prompt: str | None,
    data: bytes,
    options: Asking,
    said: str,
) -> None:
    pipe(monkeypatch, data)
    with pytest.raises(OptimError) as caught:
        run("tiny", prompt, options)
    assert caught.value.code == 2
    assert said in caught.value.message
    assert isinstance(sys.stdin, io.TextIOWrapper)


@pytest.mark.parametrize(
    ("seen", "free"), [([None], None), ([4], 4), ([1, 3], 3), ([2, 1], 2), ([1, None], 1)]
)
def test_busy_cores_are_looked_at_again(
    seen: list[int | None], free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command that just ended was busy while the model was loaded."""

    class Fake(Meter):
        def free_cores(self) -> int | None:
            return seen.pop(0)

    monkeypatch.setattr(module, "LOOK_AGAIN", 0)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    assert module._free_cores(Fake()) == free
    assert not seen
