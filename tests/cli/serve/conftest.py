"""One server process for a module, over a tiny model whose tokens are letters."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.cli.conftest import MakeLetters

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")


class Server:
    """A server of its own process; `url` and `port` say where."""

    def __init__(self, process: "subprocess.Popen[str]", told: dict[str, Any]) -> None:
        self.process, self.url = process, told["url"]
        self.port, self.name = int(told["url"].rpartition(":")[2]), told["model"]

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = ""
    ) -> tuple[int, Any, dict[str, str]]:
        """The status, the JSON (or text) and the headers of one request."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        heads = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method or ("GET" if data is None else "POST"), path, data, heads)
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        kind = reply.headers.get("content-type", "")
        return reply.status, json.loads(text) if "json" in kind else text, dict(reply.headers)

    def metric(self, name: str) -> float:
        lines = self.ask("/metrics")[1].splitlines()
        return next((float(x.split()[1]) for x in lines if x.split()[0] == name), 0.0)


@contextmanager
def serving(folder: str, *flags: str, program: str = "") -> Iterator[Server]:
    """`optim serve` on a free port; it is stopped, and has to end well, when the test is over.

    `program`: Python that changes something and then runs the command.
    """
    start = ["-c", program] if program else ["-m", "optim.cli"]
    command = [sys.executable, *start, "serve", folder, "--port", "0", "--json", "--threads", "1"]
    process = subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or lines[-1] != "}\n":
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        lines.append(line)
    try:
        yield Server(process, json.loads("".join(lines)))
    finally:
        process.terminate()
        said = process.communicate(timeout=60)[1]
        assert process.returncode in (0, 130), said
        assert "Traceback" not in said


@pytest.fixture(scope="module")
def server(make_letters: MakeLetters) -> Iterator[Server]:
    with serving(make_letters(4096, None), "--slots", "4", "--queue", "16") as server:
        yield server
