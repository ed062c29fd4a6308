"""C kernels: compiled once into the cache folder, loaded with ctypes, never required.

A library's file name carries the hash of its sources, compiler, flags and CPU, and it appears by a
rename: two processes at once do no harm, and a moved cache never runs on the wrong machine.
Threads are torch's own OpenMP team, so that two pools never fight over the cores.
OPTIM_NO_C=1 turns C kernels off.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from optim.runtime.storage.demo import cache_folder

FLAGS = (
    "-O3",
    "-fno-tree-reassoc",
    "-fno-tree-ter",
    "-std=gnu11",
    "-fPIC",
    "-shared",
    "-fopenmp-simd",
    "-Wno-psabi",
)
TARGETS = ("-march=native", "-mcpu=native")
SECONDS = 120


class NoKernel(Exception):
    """Why a kernel cannot be used here, in words."""


@cache
def works(check: Callable[[], object]) -> bool:
    """Whether a kernel's `check`, or `load`, goes through on this machine; tried once."""
    try:
        check()
    except NoKernel:
        return False
    return True


@cache
def library(name: str, *others: str) -> ctypes.CDLL:
    """The compiled cpu/`name`.c and what it calls. Raises NoKernel with the reason."""
    if os.environ.get("OPTIM_NO_C", "0") not in ("", "0"):
        raise NoKernel("turned off by OPTIM_NO_C")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NoKernel("no C compiler (cc, gcc or clang) on PATH")
    folder = Path(__file__).parent / "cpu"
    sources = [folder / f"{part}.c" for part in (name, *others)]
    try:
        key = _key([*sources, *sorted(folder.glob("*.h"))], compiler)
        file = cache_folder() / "kernels" / f"{name}-{key}.so"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            _compile(sources, compiler, file)
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise NoKernel(f"{error}") from error


@cache
def team() -> ctypes.c_void_p | None:
    """`GOMP_parallel` of the OpenMP library torch has loaded; None: C kernels use one thread."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "omp" in line}
    for path in sorted(
        p for p in paths if Path(p).name.startswith(("libgomp", "libiomp", "libomp"))
    ):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None


def _key(sources: Sequence[Path], compiler: str) -> str:
    texts = [source.read_text(encoding="utf-8") for source in sources]
    facts = [*texts, os.path.realpath(compiler), *FLAGS, _cpu()]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((x for x in lines if x.startswith(("flags", "Features"))), platform.machine())


def _compile(sources: Sequence[Path], compiler: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        problem = ""
        for flag in TARGETS:
            command = [compiler, *FLAGS, flag, *map(str, sources), "-o", str(built)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            except subprocess.TimeoutExpired:
                raise NoKernel(f"{compiler} took more than {SECONDS} s") from None
            if done.returncode == 0:
                built.replace(target)
                return
            problem = problem or (done.stderr.strip().splitlines() or ["no message"])[0]
        raise NoKernel(f"{compiler} failed: {problem}")
