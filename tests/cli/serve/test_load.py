"""Short forms of the load script and of the server's bench, each against a server of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optim.cli import main
from tests.cli.conftest import Captured, MakeLetters

pytest.importorskip("uvicorn")
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "serve_load.py"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_a_short_load(make_letters: MakeLetters) -> None:
    flags = ("--seconds", "2", "--clients", "24", "--texts", "8", "--rounds", "1")
    command = [sys.executable, str(SCRIPT), make_letters(4096, None), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        told |= json.loads(line)
    assert told["wrong"] == [] and told["burst"] == {"200": 20, "429": 44}
    assert {"200", "left", "vanished", "refused"} <= set(told["soak"]["done"])
    assert told["gap"]["gaps"] > 0 and told["soak"]["resident"]["growth"] < 0.2
    assert told["soak"]["open files"]["after"] <= told["soak"]["open files"]["before"]


def test_the_bench_of_a_server(
    make_letters: MakeLetters, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--clients", "1,3", "--repeat", "1", "--prompt-tokens", "4", "--new-tokens", "8"]
    command = ["optim", "bench", make_letters(512, None), "--serve", *flags, "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    assert main() == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["clients"] for row in rows] == [1, 3]
    for row in rows:
        told = row["servers"]["optim"]
        assert told["tokens_per_second"] > 0
        for times in (told["first_ms"], told["between_ms"]):
            assert 0 < times["p50"] <= times["p95"] <= times["p99"]
    for wrong in (["--batch", "2"], ["--peer", "transformers"], ["--clients", "65"]):
        monkeypatch.setattr(sys, "argv", [*command, *wrong])
        assert main() == 2
        assert "--serve" in capsys.readouterr().err
