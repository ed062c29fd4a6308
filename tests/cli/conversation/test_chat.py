"""The conversation, with a session that has its answers ready: exact text on both streams."""

import io
import os
import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optim.cli.conversation.chat import Chat
from optim.cli.conversation.commands import COMMANDS, endings
from optim.cli.conversation.input import plain
from optim.cli.conversation.repl import talk
from optim.runtime.engine.sampling import Sampling
from optim.runtime.engine.session import Stats

TINY = SimpleNamespace(checkpoint=SimpleNamespace(name="tiny", source="./tiny"))


@dataclass
class FakeSession:
    """What the conversation uses of a Session; answers come from a queue, word by word."""

    answers: list[str]
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    stats: Stats = field(default_factory=Stats)
    model: Any = field(default_factory=lambda: TINY)
    interrupt_after: int | None = None
    asked: list[str] = field(default_factory=list)

    def reply(self, text: str, reading: Any = None) -> Generator[str, None, None]:
        self.asked.append(text)
        self.messages = [*self.messages, {"role": "user", "content": text}]
        said = ""
        try:
            for count, word in enumerate(self.answers.pop(0).split(" "), 1):
                piece = word if count == 1 else f" {word}"
                said += piece
                if count == self.interrupt_after:
                    os.kill(os.getpid(), signal.SIGINT)
                yield piece
        finally:
            self.messages = [*self.messages, {"role": "assistant", "content": said}]
            self.stats = Stats(prompt_tokens=5, new_tokens=count, decode_seconds=0.5)

    def info(self) -> dict[str, str]:
        return {"model": "tiny", "context": "5 of 64"}

    def save_cache(self, path: Path) -> int:
        return 0

    def load_cache(self, path: Path) -> str:
        return ""


Converse = Callable[..., tuple[str, str]]


@pytest.fixture
def converse(capsys: pytest.CaptureFixture[str]) -> Converse:
    """Type lines; returns what went to standard output and to standard error."""

    def converse(session: FakeSession, *lines: str) -> tuple[str, str]:
        chat = Chat(session)  # type: ignore[arg-type]
        talk(chat, plain(line.encode() + b"\n" for line in lines))
        out, err = capsys.readouterr()
        return out, err

    return converse


def test_replies_go_to_output_and_nothing_else_does(converse: Converse) -> None:
    session = FakeSession(["Paris, of course.", "2 million"])
    out, err = converse(session, "capital of France?", "", "how big?")
    assert out == "Paris, of course.\n2 million\n"
    assert err == ""
    assert session.asked == ["capital of France?", "how big?"]


def test_ctrl_c_keeps_the_partial_reply_and_the_conversation_goes_on(converse: Converse) -> None:
    session = FakeSession(["one two three four", "fine"], interrupt_after=2)
    before = signal.getsignal(signal.SIGINT)
    out, err = converse(session, "count", "/stats on")
    assert out == "one two\n"
    assert err == "[2 tokens · 2.0 tok/s · prompt 5 · stopped]\nstatistics after each reply: on\n"
    assert session.messages[-1] == {"role": "assistant", "content": "one two"}
    assert signal.getsignal(signal.SIGINT) is before
    session.interrupt_after = None
    assert converse(session, "again")[0] == "fine\n"


def test_ctrl_c_twice_does_not_wait_for_the_next_token(converse: Converse) -> None:
    class Stuck(FakeSession):
        def reply(self, text: str, reading: Any = None) -> Generator[str, None, None]:
            self.messages = [{"role": "user", "content": text}]
            yield "a"
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not reached")

    out, err = converse(Stuck([]), "hi", "/quit", "never read")
    assert out == "a\n"
    assert "stopped]" in err


def test_ctrl_c_at_the_prompt_says_how_to_leave(capsys: pytest.CaptureFixture[str]) -> None:
    keys: list[type[BaseException]] = [KeyboardInterrupt, EOFError]

    def read() -> str:
        raise keys.pop(0)

    talk(Chat(FakeSession([])), read)  # type: ignore[arg-type]
    assert capsys.readouterr().err == "Ctrl-D or /quit leaves\n"
    assert not keys


def test_stats_line_after_each_reply_or_on_request(converse: Converse) -> None:
    session = FakeSession(["a b", "c"])
    _, err = converse(session, "/stats", "hi", "/stats", "/stats on", "ho", "/stats perhaps")
    assert err == (
        "no reply yet\n"
        "[2 tokens · 2.0 tok/s · prompt 5]\n"
        "statistics after each reply: on\n"
        "[1 token · prompt 5]\n"
        "error: /stats takes on or off, not 'perhaps'\n"
    )


def test_help_names_every_command(converse: Converse) -> None:
    _, err = converse(FakeSession([]), "/help")
    names = ["/help", "/clear", "/system", "/set", "/stats", "/markdown", "/retry", "/undo"]
    names += ["/save", "/load", "/info", "/quit"]
    assert [command.name for command in COMMANDS] == names
    assert [line.split()[0] for line in err.splitlines()[:-1]] == names


def test_unknown_commands_are_not_sent_to_the_model(converse: Converse) -> None:
    session = FakeSession([])
    _, err = converse(session, "/sats", "/zzzz")
    assert err == (
        "error: unknown command '/sats'\n  fix: did you mean '/stats'?\n"
        "error: unknown command '/zzzz'\n  fix: /help lists them\n"
    )
    assert session.asked == []


def test_a_message_may_open_with_a_path(converse: Converse) -> None:
    session = FakeSession(["a file"])
    assert converse(session, "/etc/passwd is what?")[0] == "a file\n"


def test_system_clear_undo_and_retry(converse: Converse) -> None:
    session = FakeSession(["one", "two", "three"])
    _, err = converse(session, "/system be brief", "first", "second", "/undo", "/retry")
    assert session.asked == ["first", "second", "first"]
    assert session.messages == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "three"},
    ]
    assert err == (
        "system: be brief\ntaken back: second\n"
        "temperature 0 gives the same reply; /set temperature 0.7 varies it\n"
    )
    _, err = converse(session, "/clear", "/undo", "/system", '/system ""')
    assert err == (
        "the conversation is empty; the system prompt stays\n"
        "error: there is no question yet\n"
        "system: be brief\nsystem: (none)\n"
    )
    assert session.messages == []


def test_set_changes_one_parameter(converse: Converse) -> None:
    session = FakeSession([])
    lines = ["/set temperature 0.5", "/set top_k 7", "/set seed 3", "/set seed none"]
    _, err = converse(session, *lines, r'/set stop "\n\n" END')
    assert err == ("temperature = 0.5\ntop_k = 7\nseed = 3\nseed = none\nstop = '\\n\\n' 'END'\n")
    assert session.sampling.stop == ("\n\n", "END")
    assert (session.sampling.temperature, session.sampling.top_k) == (0.5, 7)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set temprature 1", "error: unknown parameter 'temprature'\n  fix: did you mean 'temp"),
        ("/set top_k many", "error: top_k: "),
        ("/set temperature -1", "error: "),
        ("/set temperature nan", "error: "),
        ("/set top_p 1.5", "error: "),
        ("/set top_k", "error: /set top_k needs a value"),
        ('/set stop "open', "error: stop: No closing quotation"),
    ],
)
def test_set_refuses(converse: Converse, line: str, said: str) -> None:
    session = FakeSession([])
    _, err = converse(session, line)
    assert err.startswith(said)
    assert session.sampling == Sampling()


def test_save_and_load(converse: Converse, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    session = FakeSession(["hello"])
    _, err = converse(session, "/system be kind", "/set top_k 9", "hi", f"/save {path}")
    assert err.endswith(f"saved {path} (2 messages)\n")
    other = FakeSession(["again"])
    _, err = converse(other, f"/load {path}", "/save")
    assert err == f"loaded {path} (2 messages)\nsaved {path} (2 messages)\n"
    assert (other.system, other.messages) == ("be kind", session.messages)
    assert other.sampling == session.sampling


def test_a_bad_file_changes_nothing(converse: Converse, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    session = FakeSession(["hello"])
    converse(session, "hi")
    kept = list(session.messages)
    for content in ["{", '{"model": "m", "parameters": {"top_k": -3}}']:
        path.write_text(content)
        assert converse(session, f"/load {path}")[1].startswith("error: ")
    path.write_text('{"model": "m", "parameters": {"device": 1}}')
    assert converse(session, f"/load {path}")[1].startswith("error: unknown parameter 'device'")
    assert converse(session, "/load")[1].startswith("error: /load needs a file")
    assert session.messages == kept


def test_another_model_is_named(converse: Converse, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text('{"model": "evil\\u001b[2J", "messages": []}')
    _, err = converse(FakeSession([]), f"/load {path}")
    assert err == f"loaded {path} (0 messages)\nnote: it was saved with evil[2J\n"


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    talk(Chat(FakeSession(["a\x1b[2Jb\tc\nd\x9b"])), plain([b"hi\n"]))  # type: ignore[arg-type]
    assert out.getvalue() == "a[2Jb\tc\nd\n"


def test_info_and_quit(converse: Converse) -> None:
    _, err = converse(FakeSession([]), "/info", "/exit", "/help")
    assert err == (
        "model      tiny\ncontext    5 of 64\nsampling   greedy\nsystem     (none)\nmessages   0\n"
    )


def test_endings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.json").touch()
    (tmp_path / "one.txt").touch()
    (tmp_path / "onward").mkdir()
    monkeypatch.chdir(tmp_path)
    complete = partial(endings, Chat(FakeSession([])))  # type: ignore[arg-type]
    assert complete("/s") == ["/system", "/set", "/stats", "/save"]
    assert complete("/set top") == ["top_k", "top_p"]
    assert complete("/stats o") == ["on", "off"]
    assert complete("/load on") == ["one.json", "onward/"]
    assert complete("/load nowhere/x") == []
    assert complete("hello") == []


def test_ctrl_c_while_a_prompt_is_read_leaves_the_question_out(converse: Converse) -> None:
    class Reading(FakeSession):
        def reply(self, text: str, reading: Any = None) -> Generator[str, None, None]:
            reading(0, 6000)
            os.kill(os.getpid(), signal.SIGINT)
            reading(512, 6000)
            raise AssertionError("not reached")
            yield ""

    session = Reading([])
    out, err = converse(session, "a long one")
    assert out == "\n"
    assert err == "stopped before the question was read; it is not part of the conversation\n"
    assert session.messages == []


def test_a_loop_is_said_once(converse: Converse) -> None:
    class Looping(FakeSession):
        def reply(self, text: str, reading: Any = None) -> Generator[str, None, None]:
            self.messages = [{"role": "user", "content": text}]
            for _ in range(4):
                self.stats = Stats(new_tokens=1, repeats=True)
                yield "ha "

    out, err = converse(Looping([]), "laugh")
    assert out == "ha ha ha ha \n"
    assert err.count("the reply repeats itself: Ctrl-C stops it") == 1
