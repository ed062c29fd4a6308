"""C kernels are optional: built once, refused in words, never a traceback."""

from pathlib import Path

import pytest
import torch

from optim.runtime.kernels import compile
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.cpu import bf16


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a `library` that has loaded nothing yet."""
    monkeypatch.setenv("OPTIM_CACHE", str(tmp_path))
    monkeypatch.delenv("OPTIM_NO_C", raising=False)
    monkeypatch.setattr(compile, "library", compile.library.__wrapped__)
    return tmp_path


def fake_compiler(folder: Path, script: str) -> str:
    folder.mkdir()
    (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "cc").chmod(0o755)
    return str(folder)


def test_the_switch_turns_it_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIM_NO_C", "1")
    with pytest.raises(NoKernel, match="OPTIM_NO_C"):
        compile.library("bf16")


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh / "empty"))
    with pytest.raises(NoKernel, match="no C compiler"):
        compile.library("bf16")


def test_a_compiler_that_fails(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_compiler(fresh / "bin", "echo 'no AVX here' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{path}:/usr/bin:/bin")
    with pytest.raises(NoKernel, match="no AVX here"):
        compile.library("bf16")
    assert not list((fresh / "kernels").iterdir())


def test_a_compiler_that_makes_nonsense(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'for last; do :; done; echo nonsense > "$last"'
    monkeypatch.setenv("PATH", f"{fake_compiler(fresh / 'bin', script)}:/usr/bin:/bin")
    with pytest.raises(NoKernel):
        compile.library("bf16")


def test_a_cache_that_cannot_be_written(fresh: Path) -> None:
    (fresh / "kernels").write_text("a file where a folder should be")
    with pytest.raises(NoKernel):
        compile.library("bf16")


@pytest.mark.skipif(not bf16.usable(), reason="no C compiler")
def test_it_is_compiled_once(fresh: Path) -> None:
    compile.library("bf16")
    (built,) = (fresh / "kernels").iterdir()
    stamp = built.stat().st_mtime_ns
    compile.library("bf16")
    assert [file.stat().st_mtime_ns for file in (fresh / "kernels").iterdir()] == [stamp]


@pytest.mark.skipif(not bf16.usable(), reason="no C compiler")
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 17), (130, 64), (257, 129)])
@pytest.mark.parametrize("threads", [1, 2])
def test_bf16_weights_are_exact(outputs: int, inputs: int, threads: int) -> None:
    torch.set_num_threads(threads)
    weight, x = torch.randn(outputs, inputs).to(torch.bfloat16), torch.randn(3, inputs)
    wanted = bf16.reference(x, weight)
    error = (bf16.linear(x, weight) - wanted).abs().max()
    assert error <= 1e-5 * (x.abs().double() @ weight.abs().double().T).max()
