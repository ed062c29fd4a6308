"""C kernels are optional: built once, refused in words, never a traceback."""

import ctypes
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optim.recipes.errors import OptimError
from optim.runtime.kernels import compile
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.cpu import bf16, w4a8
from optim.runtime.kernels.door import Struct
from optim.runtime.system import instructions

LEVELS = instructions.levels()
needs_compiler = pytest.mark.skipif(not bf16.usable(), reason="no C compiler")


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


@needs_compiler
def test_it_is_compiled_once(fresh: Path) -> None:
    compile.library("bf16")
    (built,) = (fresh / "kernels").iterdir()
    stamp = built.stat().st_mtime_ns
    compile.library("bf16")
    assert [file.stat().st_mtime_ns for file in (fresh / "kernels").iterdir()] == [stamp]


@needs_compiler
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b + b"x"])
def test_a_damaged_one_is_built_again(fresh: Path, damage: Callable[[bytes], bytes]) -> None:
    compile.library("bf16")
    (built,) = (fresh / "kernels").iterdir()
    whole = built.read_bytes()
    built.unlink()  # it is mapped: a file that is written to would be seen there
    built.write_bytes(damage(whole))
    compile.library("bf16")
    (again,) = (fresh / "kernels").iterdir()
    assert again.read_bytes() == whole


@needs_compiler
def test_a_planted_library_is_not_loaded(fresh: Path) -> None:
    compile.library("bf16")
    (built,) = (fresh / "kernels").iterdir()
    planted = built.with_name(built.name[: -len("0000.so")] + "0000.so")
    planted.write_bytes(b"another")
    elsewhere = fresh / "elsewhere.so"
    built.rename(elsewhere)
    built.symlink_to(elsewhere)
    compile.library("bf16")
    assert not planted.exists() and not built.is_symlink() and built.exists()


def test_the_folder_is_ones_own(tmp_path: Path) -> None:
    folder = compile.own_folder(tmp_path / "a" / "kernels")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "mine").touch()
    folder.chmod(0o755)  # as older versions made it: others could look, not write
    compile.own_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and (folder / "mine").exists()
    folder.chmod(0o777)
    compile.own_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and not list(folder.iterdir())


def test_another_users_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(compile.own_folder(tmp_path / "kernels"))
    with pytest.raises(NoKernel, match="not a folder of this user"):
        compile.own_folder(tmp_path / "link")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(NoKernel, match="not a folder of this user"):
        compile.own_folder(tmp_path / "kernels")


class _Linear(Struct):
    NAME = "Linear"
    _fields_ = (("inputs", ctypes.c_int64),)


@needs_compiler
def test_a_structure_of_another_size_is_refused(fresh: Path) -> None:
    size = ctypes.sizeof(w4a8.CLinear)
    with pytest.raises(NoKernel, match=f"Linear has {size} bytes in C, 8 here"):
        compile.library("w4a8", structs=(_Linear,))


@needs_compiler
def test_levels_are_kept_apart(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for level in LEVELS:
        monkeypatch.setenv("OPTIM_ISA", level)
        compile.library("bf16")
    assert len(list((fresh / "kernels").iterdir())) == len(LEVELS)
    monkeypatch.setenv("OPTIM_ISA", "mmx")
    with pytest.raises(OptimError, match="mmx"):
        compile.library("bf16")
    with pytest.raises(OptimError, match="mmx"):
        compile.works(lambda: compile.library("bf16"))


@needs_compiler
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 17), (130, 64), (257, 129)])
@pytest.mark.parametrize("threads", [1, 2])
def test_bf16_weights_are_exact(outputs: int, inputs: int, threads: int) -> None:
    torch.set_num_threads(threads)
    weight, x = torch.randn(outputs, inputs).to(torch.bfloat16), torch.randn(3, inputs)
    wanted = bf16.reference(x, weight)
    error = (bf16.linear(x, weight) - wanted).abs().max()
    assert error <= 1e-5 * (x.abs().double() @ weight.abs().double().T).max()


@pytest.mark.parametrize("problem", [NoKernel("it disagrees"), ValueError("it disagrees")])
def test_a_kernel_that_fails_its_check_is_not_used_and_that_is_kept(
    problem: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile, "REFUSED", {})

    def check() -> None:
        raise problem

    check.__module__ = "optim.runtime.kernels.cpu.some"
    assert not compile.works(check)
    assert compile.REFUSED == {"some": "it disagrees"}
