"""Levels of instructions: what a machine has, what OPTIM_ISA may ask for."""

import pytest

from optim.recipes.errors import MACHINE, OptimError
from optim.runtime.system import instructions

HASWELL = frozenset(instructions.needs("avx2"))
SKYLAKE = frozenset(instructions.needs("avx512"))
GENOA = frozenset(instructions.needs("avx512-bf16"))


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("OPTIM_ISA", raising=False)
    return monkeypatch


def has(patch: pytest.MonkeyPatch, features: frozenset[str]) -> None:
    patch.setattr(instructions, "features", lambda: features)


def test_levels_that_a_machine_has(cpu: pytest.MonkeyPatch) -> None:
    has(cpu, HASWELL)
    assert instructions.levels() == ["avx2"]
    has(cpu, SKYLAKE)
    assert instructions.levels() == ["avx2", "avx512"]
    has(cpu, GENOA)
    assert instructions.levels() == list(instructions.ADDED)
    has(cpu, frozenset({"asimd", "asimddp"}))
    assert instructions.levels() == []


def test_without_a_wish_the_compiler_takes_what_is_there(cpu: pytest.MonkeyPatch) -> None:
    assert instructions.level() is None
    assert instructions.target_flags()[0] == ("-march=native",)


def test_a_level_is_its_flags_and_those_below(cpu: pytest.MonkeyPatch) -> None:
    has(cpu, GENOA)
    cpu.setenv("OPTIM_ISA", "avx512")
    (flags,) = instructions.target_flags()
    assert {"-mavx2", "-mfma", "-mavx512bw"} <= set(flags) and "-mavx512vnni" not in flags


@pytest.mark.parametrize(
    ("asked", "words"), [("avx1024", "there is no 'avx1024'"), ("avx512-vnni", "no avx512f")]
)
def test_a_level_that_cannot_be(cpu: pytest.MonkeyPatch, asked: str, words: str) -> None:
    has(cpu, HASWELL)
    cpu.setenv("OPTIM_ISA", asked)
    with pytest.raises(OptimError, match=words) as caught:
        instructions.level()
    assert caught.value.code == MACHINE and "avx2" in str(caught.value.fix)


def test_a_lower_level_has_no_bf16_units(cpu: pytest.MonkeyPatch) -> None:
    has(cpu, GENOA)
    assert instructions.has_bf16_units()
    cpu.setenv("OPTIM_ISA", "avx512-vnni")
    assert not instructions.has_bf16_units()
    has(cpu, HASWELL)
    cpu.delenv("OPTIM_ISA")
    assert not instructions.has_bf16_units()
