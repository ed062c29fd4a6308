"""The CPU's instruction sets: what this one has, and which level kernels are compiled for.

`OPTIM_ISA` names a level below what the machine has, for comparing them; without it kernels are
compiled for this very CPU.
"""

import os
import platform
from functools import cache
from pathlib import Path

from optim.recipes.errors import MACHINE, OptimError

ADDED = {
    "avx2": ("avx2", "fma", "f16c", "bmi2"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512-vnni": ("avx512_vnni",),
    "avx512-bf16": ("avx512_bf16",),
}
"""Of each level, what it adds to the one before; names as in /proc/cpuinfo."""
SHOWN = (*(name for names in ADDED.values() for name in names), "avx_vnni", "amx_tile", "amx_bf16",
         "amx_int8", "asimd", "asimddp", "fphp", "asimdhp", "i8mm", "bf16", "sve")  # fmt: skip
"""What is worth naming of a CPU."""


def level() -> str | None:
    """The level that OPTIM_ISA asks for; None: all that this CPU has.

    Raises OptimError (4) for a level that is not known, or that this machine lacks.
    """
    asked = os.environ.get("OPTIM_ISA", "")
    if not asked:
        return None
    if asked not in ADDED:
        raise OptimError(f"OPTIM_ISA: there is no {asked!r}", f"use {', '.join(ADDED)}", MACHINE)
    missing = [name for name in needs(asked) if name not in features()]
    if missing:
        why = f"OPTIM_ISA={asked}: this CPU has no {', '.join(missing)}"
        here = ", ".join(levels()) or "none of its levels: unset it"
        raise OptimError(why, f"this machine has {here}", MACHINE)
    return asked


def needs(name: str) -> list[str]:
    """All that a level is made of."""
    until = list(ADDED).index(name)
    return [part for parts in list(ADDED.values())[: until + 1] for part in parts]


def levels() -> list[str]:
    """The levels that this machine has, lowest first."""
    return [name for name in ADDED if features().issuperset(needs(name))]


def target_flags() -> list[tuple[str, ...]]:
    """The compiler's flags for `level`; where there are several, the first that it takes."""
    name = level()
    if name is None:
        return [("-march=native",), ("-mcpu=native",)]
    return [tuple(f"-m{part.replace('_', '')}" for part in needs(name))]


def has_bf16_units() -> bool:
    """Whether products may use bf16 units; without, torch is ten times slower in bf16."""
    return bool(features() & {"avx512_bf16", "amx_bf16"}) and level() in (None, "avx512-bf16")


@cache
def features() -> frozenset[str]:
    """This CPU's instruction sets, as Linux names them; empty where it does not say."""
    return frozenset(_fact("flags", "Features").split())


@cache
def cpu_name() -> str:
    """What the CPU calls itself."""
    return _fact("model name") or platform.processor() or platform.machine()


def described() -> str:
    """The CPU's name and its instruction sets, in one line."""
    found = [name for name in SHOWN if name in features()]
    return f"{cpu_name()}: {' '.join(found) or 'instruction sets unknown'}"


def _fact(*names: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""
