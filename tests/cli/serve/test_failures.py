"""When things go wrong: memory runs short, a client does not read, a stop is asked for twice."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import pytest

from optim.cli import main
from tests.cli.conftest import Captured, MakeLetters
from tests.cli.serve.conftest import Server, serving
from tests.cli.serve.test_serve import chat, eventually, left_open

# Memory does for two texts in a step, and for prompts of 600 tokens. It runs short when lengths
# have grown already, in Python's words or in torch's.
SHORT_OF_MEMORY = """
import sys
from optim.cli import main
from optim.runtime.engine.load import Model

step_many, read = Model.step_many, Model.read

def short(self, work, *more):
    rows = step_many(self, work, *more)
    if len(work) > 2:
        raise MemoryError
    return rows

def short_read(self, ids, cache):
    yield from read(self, ids[:600], cache)
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

Model.step_many = short
Model.read = lambda self, ids, cache: (short_read if len(ids) > 600 else read)(self, ids, cache)
sys.exit(main())
"""


def test_memory_that_runs_short(make_letters: MakeLetters) -> None:
    with serving(make_letters(4096, None), "--slots", "4", program=SHORT_OF_MEMORY) as server:
        texts = [chat(server, f"text {i}", max_tokens=120, temperature=1, seed=i) for i in range(4)]
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda body: server.ask("/v1/chat/completions", body), texts))
        done = [said["choices"][0]["message"] for code, said, _ in replies if code == 200]
        short = [(code, said["error"]["code"], heads["retry-after"])
                 for code, said, heads in replies if code != 200]  # fmt: skip
        assert len(done) >= 2 and set(short) == {(503, "out_of_memory", "5")}
        for stream in (True, False):
            told = server.ask("/v1/chat/completions", chat(server, "x" * 700, stream=stream))
            assert (told[0], told[1]["error"]["code"]) == (503, "out_of_memory")
        assert server.ask("/health")[0] == 200
        alone = [server.ask("/v1/chat/completions", body)[1]["choices"][0] for body in texts]
        assert all(said in [one["message"] for one in alone] for said in done)


def unread(server: Server) -> socket.socket:
    """A stream of megabytes that nobody reads."""
    slow = {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 3500}
    return left_open(server, chat(server, "Tell me all", **slow))


def test_a_reader_that_does_not_read(make_letters: MakeLetters) -> None:
    flags = ("--slots", "2", "--send-timeout", "1")
    with serving(make_letters(4096, None), *flags) as server, unread(server) as slow:
        eventually(server, "optim_live_texts", 1)
        assert server.ask("/v1/chat/completions", chat(server, "Hi"))[0] == 200
        eventually(server, 'optim_texts_total{reason="cancelled"}', 1)
        # What was held for it is bounded, and it is told by the connection's end.
        got = 0
        try:
            while piece := slow.recv(1 << 16):
                got += len(piece)
        except ConnectionResetError:
            pass
        assert server.metric("optim_busy_slots") == 0
        assert server.metric("optim_new_tokens_total") < 3000 and got < 6 << 20


def test_the_address_answers_while_the_model_is_loaded(make_letters: MakeLetters) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "optim.cli", "serve", make_letters(512, None)]
    process = subprocess.Popen([*command, "--port", str(port), "--quiet"], stdout=subprocess.PIPE)
    told: list[tuple[int, str]] = []
    while not told or told[-1][0] != 200:
        assert process.poll() is None
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("GET", "/health")
            reply = connection.getresponse()
            told.append((reply.status, json.loads(reply.read())["status"]))
        except ConnectionRefusedError:
            pass
        time.sleep(0.01)
    assert told[0] == (503, "loading") and set(told) == {(503, "loading"), (200, "ok")}
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and out.endswith(f"http://127.0.0.1:{port}\n".encode())


SITE = "https://chat.example"


@pytest.fixture(scope="module")
def narrow(make_letters: MakeLetters) -> Iterator[Server]:
    """One text at a time; the last test of this file stops it."""
    flags = ("--slots", "1", "--queue-timeout", "0.1", "--grace", "600", "--cors", SITE)
    with serving(make_letters(4096, None), *flags) as server:
        yield server


def test_pages_of_one_other_site_may_ask(narrow: Server) -> None:
    path, method, names = "/v1/chat/completions", "Access-Control-Request-Method", "authorization"
    asked = {"Origin": SITE, method: "POST", "Access-Control-Request-Headers": names}
    code, _, heads = narrow.ask(path, headers=asked, method="OPTIONS")
    assert (code, heads["access-control-allow-origin"]) == (200, SITE)
    assert heads["access-control-allow-headers"] == names
    assert "access-control-allow-credentials" not in heads
    for body, status in ((chat(narrow, "Hi"), 200), ({"messages": []}, 400)):
        code, _, heads = narrow.ask(path, body, headers={"Origin": SITE})
        assert (code, heads["access-control-allow-origin"]) == (status, SITE)
    code, _, heads = narrow.ask(path, headers={**asked, "Origin": "https://a.b"}, method="OPTIONS")
    assert code == 400 and "access-control-allow-origin" not in heads


@pytest.mark.parametrize("origin", ["*", "chat.example", "https://a.example/path", "null"])
def test_any_site_is_none(origin: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["optim", "serve", "x", "--cors", origin])
    assert main() == 2
    assert "--cors cannot be" in capsys.readouterr().err


def test_a_text_that_waits_too_long(narrow: Server) -> None:
    with unread(narrow):
        eventually(narrow, "optim_busy_slots", 1)
        for stream in (True, False):
            body = chat(narrow, "Hi", stream=stream)
            code, said, heads = narrow.ask("/v1/chat/completions", body)
            told = (code, said["error"]["code"], heads["retry-after"])
            assert told == (503, "queue_timeout", "5")
    eventually(narrow, "optim_live_texts", 0)


def test_a_second_signal_does_not_wait(narrow: Server) -> None:
    with unread(narrow):
        eventually(narrow, "optim_live_texts", 1)
        narrow.process.send_signal(signal.SIGTERM)
        while (health := narrow.ask("/health"))[0] == 200:
            time.sleep(0.01)
        assert (health[0], health[1]["status"], health[1]["error"]["code"]) == (
            503, "draining", "draining",
        )  # fmt: skip
        code, said, heads = narrow.ask("/v1/chat/completions", chat(narrow, "Hi"))
        assert (code, said["error"]["code"], heads["retry-after"]) == (503, "stopping", "5")
        narrow.process.send_signal(signal.SIGTERM)
        assert narrow.process.wait(timeout=30) == 0
