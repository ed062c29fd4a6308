"""C kernels: compiled once into the cache folder, loaded with ctypes, never required.

A library's file name carries the hash of its sources, compiler, flags and CPU, and that of its own
bytes. It appears by a rename, in a folder that only its owner can write: two processes at once do
no harm, a moved cache never runs on the wrong machine, and what is damaged is built again.
Threads are torch's own OpenMP team, so that two pools never fight over the cores.

OPTIM_NO_C=1 turns C kernels off; OPTIM_ISA names a lower level of instructions (instructions.py);
OPTIM_SANITIZE=1 builds them with the address and undefined-behaviour sanitizers (`make sanitize`).
"""

import ctypes
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from optim.recipes.errors import OptimError
from optim.runtime.kernels.door import Struct
from optim.runtime.system import instructions
from optim.runtime.system.hashes import file_sha256, text_sha256
from optim.runtime.system.paths import cache_folder

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
SANITIZE = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g",
    "-O1",
)
SECONDS = 900  # a compiler that hangs; beside many others one may need minutes


class NoKernel(Exception):
    """Why a kernel cannot be used here, in words."""


REFUSED: dict[str, str] = {}
"""Kernels that were wanted in this process and are not used, and why."""


@cache
def works(check: Callable[[], object]) -> bool:
    """Whether a kernel's `check`, or `load`, goes through on this machine; tried once.

    Whatever is wrong with it, it is not used, and REFUSED says why; OptimError (4) where the user
    asks for what cannot be (OPTIM_ISA).
    """
    try:
        check()
    except OptimError:
        raise
    except Exception as why:
        REFUSED[check.__module__.rpartition(".")[2]] = str(why) or type(why).__name__
        return False
    return True


@cache
def library(name: str, *others: str, structs: Sequence[type[Struct]] = ()) -> ctypes.CDLL:
    """The compiled cpu/`name`.c, and what it calls; `structs`: those it reads.

    Raises NoKernel with the reason, OptimError (4) for an OPTIM_ISA that cannot be.
    """
    if turned_off():
        raise NoKernel("turned off by OPTIM_NO_C")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NoKernel("no C compiler (cc, gcc or clang) on PATH")
    folder = Path(__file__).parent / "cpu"
    sources = [folder / f"{part}.c" for part in (name, *others)]
    targets = instructions.target_flags()
    try:
        key = _key([*sources, *sorted(folder.glob("*.h"))], compiler, targets)
        kept = own_folder(cache_folder() / "kernels")
        file = _whole(kept, f"{name}-{key}") or _compile(sources, compiler, targets, kept, key)
        loaded = ctypes.CDLL(str(file))
        _compare_sizes(loaded, structs)
        return loaded
    except (OSError, AttributeError) as error:
        raise NoKernel(f"{error}") from error


def turned_off() -> bool:
    """Whether OPTIM_NO_C asks for no C kernels."""
    return _on("OPTIM_NO_C")


def own_folder(folder: Path) -> Path:
    """`folder`, which only this user can look into; made if there is none.

    What lies in a folder that others could write to may be theirs: it is thrown away. Raises
    NoKernel for another user's folder.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise NoKernel(f"{folder} is not a folder of this user: remove it, or set OPTIM_CACHE")
    if found.st_mode & 0o022:
        shutil.rmtree(folder)
        folder.mkdir(mode=0o700, exist_ok=True)
    elif found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _whole(folder: Path, stem: str) -> Path | None:
    """The library whose bytes are those its name promises; damaged ones are removed."""
    for file in sorted(folder.glob(f"{stem}-*.so")):
        if not file.is_symlink() and file.stem.removeprefix(f"{stem}-") == file_sha256(file):
            return file
        file.unlink(missing_ok=True)
    return None


def _compare_sizes(loaded: ctypes.CDLL, structs: Sequence[type[Struct]]) -> None:
    for struct in structs:
        size = getattr(loaded, f"optim_sizeof_{struct.NAME}")
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(struct):
            raise NoKernel(f"{struct.NAME} has {size()} bytes in C, {ctypes.sizeof(struct)} here")


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


def _key(sources: Sequence[Path], compiler: str, targets: Sequence[tuple[str, ...]]) -> str:
    texts = [source.read_text(encoding="utf-8") for source in sources]
    flags = [*FLAGS, *(SANITIZE if _on("OPTIM_SANITIZE") else ()), *map(str, targets)]
    cpu = " ".join(sorted(instructions.features())) or platform.machine() + platform.processor()
    facts = [*texts, os.path.realpath(compiler), *flags, cpu]
    return text_sha256("\0".join(facts))[:16]


def _on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def _compile(
    sources: Sequence[Path],
    compiler: str,
    targets: Sequence[tuple[str, ...]],
    kept: Path,
    key: str,
) -> Path:
    with tempfile.TemporaryDirectory(dir=kept) as folder:
        built = Path(folder) / "built.so"
        flags = [*FLAGS, *(SANITIZE if _on("OPTIM_SANITIZE") else ())]
        problem = ""
        for target in targets:
            command = [compiler, *flags, *target, *map(str, sources), "-o", str(built)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            except subprocess.TimeoutExpired:
                raise NoKernel(f"{compiler} took more than {SECONDS} s") from None
            if done.returncode == 0:
                return built.replace(kept / f"{sources[0].stem}-{key}-{file_sha256(built)}.so")
            problem = problem or (done.stderr.strip().splitlines() or ["no message"])[0]
        raise NoKernel(f"{compiler} failed: {problem}")
