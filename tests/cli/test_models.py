"""`optim list`, `pull` and `rm` against a small hub on this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

TOKEN = "hf_stand_in"
COMMITS = {"main": "1" * 40, "v1": "2" * 40}
PUSHED: dict[str, Any] = {}
Make = Callable[..., str]
Optim = Callable[..., "subprocess.CompletedProcess[str]"]


class Hub(BaseHTTPRequestHandler):
    """`me/tiny` for everyone, `me/private` with TOKEN; each has two revisions of one file set."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder = folder
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """Creates `me/new`, or takes a commit to it: lines of JSON, files in base 64."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, b"{}", {})
        if self.path == "/api/repos/create":
            PUSHED["made"] = json.loads(body)
            return self._answer({"url": f"http://{self.headers['Host']}/me/new", "id": "1"})
        if self.path == "/api/validate-yaml":  # of the card
            return self._answer({})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return self._answer({"files": [{"path": name} | plain for name in names]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                PUSHED[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        address = f"http://{self.headers['Host']}/me/new/commit/{'3' * 40}"
        self._answer({"commitUrl": address, "commitOid": "3" * 40, "success": True})

    def _answer(self, facts: dict[str, object]) -> None:
        self._send(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        about = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if about else parts
        if name == "private" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if name not in ("tiny", "private"):
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if about and rest[0] == "tree":
            listing = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
                for path in self.folder.iterdir()
            ]
            return self._send(200, json.dumps(listing).encode(), {"X-Repo-Commit": commit})
        if about:
            files = sorted(path.name for path in self.folder.iterdir())
            facts = {"id": f"{owner}/{name}", "sha": commit, "siblings": []}
            facts["siblings"] = [{"rfilename": file} for file in files]  # type: ignore[assignment]
            return self._send(200, json.dumps(facts).encode(), {"X-Repo-Commit": commit})
        data = (self.folder / rest[2]).read_bytes()
        etag = hashlib.sha256(data + commit.encode()).hexdigest()
        return self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(make_letters: Callable[..., str]) -> Iterator[str]:
    folder = Path(make_letters(64, None))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def optim(hub: str, tmp_path: Path) -> Optim:
    """`optim ARGUMENTS` in a process whose hub is the small one and whose caches are empty."""

    def run(*arguments: str, token: str = "") -> "subprocess.CompletedProcess[str]":
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "OPTIM_CACHE": str(tmp_path / "own")}
        env |= {"HF_TOKEN": token} if token else {}
        command = [sys.executable, "-m", "optim.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)

    return run


def test_a_model_is_pulled_run_listed_and_removed(optim: Optim) -> None:
    pulled = optim("pull", "me/tiny")
    assert pulled.returncode == 0, pulled.stderr
    assert (Path(pulled.stdout.strip()) / "model.safetensors").is_file()
    assert pulled.stderr.endswith("next: optim run me/tiny\n")
    assert optim("pull", "me/tiny", "--revision", "v1").returncode == 0
    answer = optim("run", "me/tiny@v1", "hi", "--temperature", "0", "--max-tokens", "2", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["model"] == "me/tiny@v1"
    (row,) = json.loads(optim("list", "--json").stdout)
    assert (row["model"], sorted(row["revisions"])) == ("me/tiny", ["main 11111111", "v1 22222222"])
    assert optim("rm", "me/tiny@v1").returncode == 0
    (row,) = json.loads(optim("list", "--json").stdout)
    assert row["revisions"] == ["main 11111111"]
    assert optim("rm", "me/tiny").returncode == 0
    assert json.loads(optim("list", "--json").stdout) == []
    gone = optim("rm", "me/tiny")
    assert (gone.returncode, gone.stderr.splitlines()[0]) == (
        2,
        "error: me/tiny is not in the cache",
    )


def test_a_private_model_needs_the_token(optim: Optim) -> None:
    refused = optim("pull", "me/private")
    assert refused.returncode == 2
    assert "the hub has no such repository: me/private" in refused.stderr
    assert "HF_TOKEN" in refused.stderr
    assert optim("pull", "me/private", token=TOKEN).returncode == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [("me/tiny@v9", "no such revision"), ("me/none", "no such repository"), ("tiny", "no hub id")],
)
def test_what_is_not_there_is_said(optim: Optim, name: str, said: str) -> None:
    pulled = optim("pull", name)
    assert pulled.returncode == 2
    assert said in pulled.stderr and "Traceback" not in pulled.stderr
    assert json.loads(optim("list", "--json").stdout) == []


def test_what_was_made_is_pushed(optim: Optim, make_letters: Make, tmp_path: Path) -> None:
    model, out = make_letters(64, None), tmp_path / "out"
    words = ("quantize", model, "-m", "rtn", "-o", str(out), "--no-eval", "--push", "me/new")
    asked = optim(*words, token=TOKEN)
    assert asked.returncode == 2 and "add --yes" in asked.stderr
    assert not out.exists() and not PUSHED
    sent = optim(*words, "--yes", token=TOKEN)
    assert sent.returncode == 0, sent.stderr
    made = PUSHED.pop("made")  # `private` until hub 1, then `visibility`
    assert made.get("private") or made["visibility"] == "private"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == PUSHED
    assert "/me/new/commit/333" in sent.stderr
    PUSHED.clear()
    assert optim("push", str(out), "me/new", "--yes", token=TOKEN).returncode == 0
    assert set(PUSHED) == {"made", *(path.name for path in out.iterdir())}
    refused = optim("push", str(out), "me/new", "--yes")
    assert refused.returncode == 2 and "HF_TOKEN" in refused.stderr
    assert optim("push", str(model), "me/new", "--yes").returncode == 2
    assert "no repository" in optim("push", str(out), "new", "--yes").stderr
