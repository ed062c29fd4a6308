"""`optim doctor`: the machine and the self-tests."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import optim.cli
from optim.cli import doctor
from optim.cli.paths import FAR, Proof

Captured = pytest.CaptureFixture[str]


PROOF = Proof("awq 4 bit", "alone", "full 16 bit", 1e-6, 0.05)


def kernel(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """Add a module to optim.runtime.kernels for the time of a test."""
    module = ModuleType(name)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, f"optim.runtime.kernels.{name}", module)


def test_every_outcome_of_a_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise RuntimeError("no compiler")

    kernel(monkeypatch, "good", check=lambda: "AVX2")
    kernel(monkeypatch, "bad", check=refuse)
    kernel(monkeypatch, "helper")
    assert doctor._check("good") == {"name": "good", "works": True, "detail": "AVX2"}
    assert doctor._check("bad") == {"name": "bad", "works": False, "detail": "no compiler"}
    assert doctor._check("helper") is None
    missing = doctor._check("not_there")
    assert missing is not None and not missing["works"] and "not_there" in missing["detail"]


def test_fields_keeps_the_first_of_a_key(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: A: B\n\nprocessor\t: 1\nmodel name\t: C\n")
    assert doctor._fields(str(path))["model name"] == "A: B"
    assert doctor._fields(str(tmp_path / "nothing")) == {}


def test_json_and_table(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(doctor, "_kernels", lambda: ["good", "bad"])
    monkeypatch.setattr(doctor, "prove", lambda _levels: [PROOF])
    kernel(monkeypatch, "good", check=lambda: "AVX2")
    kernel(monkeypatch, "bad", check=None)
    monkeypatch.setattr(sys, "argv", ["optim", "doctor", "--json"])
    assert optim.cli.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == [{"name": "good", "works": True, "detail": "AVX2"}]
    assert found["cpu"]["cores"] >= 1 and found["packages"]["torch"]
    assert found["paths"][0]["holds"] and found["paths"][0]["model"] == "awq 4 bit"
    monkeypatch.setattr(sys, "argv", ["optim", "doctor"])
    assert optim.cli.main() == 0
    out = capsys.readouterr().out
    assert any(
        line.split()[:5] == ["awq", "4", "bit", "alone", "holds"] for line in out.splitlines()
    )
    assert any(line.split() == ["good", "works", "AVX2"] for line in out.splitlines())


def test_every_kernel_of_the_package_says_in_words_how_its_check_went() -> None:
    found = [doctor._check(name) for name in doctor._kernels()]
    kernels = [entry for entry in found if entry is not None]
    assert {entry["name"] for entry in kernels} >= {"cpu.w4a8", "cpu.step", "triton.w4a16"}
    assert all(isinstance(entry["detail"], str) and entry["detail"] for entry in kernels)


@pytest.mark.parametrize("share", [0.06, FAR, float("nan")])
def test_a_path_that_does_not_hold_is_exit_3(
    share: float, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    wrong = Proof("bf12", "in a batch", "full 8 bit", share, 0.05)
    monkeypatch.setattr(doctor, "_kernels", lambda: [])
    monkeypatch.setattr(doctor, "prove", lambda _levels: [PROOF, wrong])
    monkeypatch.setattr(sys, "argv", ["optim", "doctor"])
    assert optim.cli.main() == 3
    assert "1 of 2 paths do not hold, such as bf12 in a batch" in capsys.readouterr().err
