"""The memory of this process: the most it held, and what the allocator keeps."""

import ctypes
import resource
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT_BLOCK, KEPT_HEAP = 32 << 20, 64 << 20  # 32 MB is the most glibc takes


def peak_bytes() -> int:
    """The most memory this process has held: on the GPU if it used one, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_memory_error(problem: BaseException) -> bool:
    """Whether it says that memory could not be had, in Python's words or in torch's."""
    if isinstance(problem, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(problem, RuntimeError) and "allocate memory" in str(problem)


def available_bytes() -> int | None:
    """Memory that programs may still take without others giving theirs up; None where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = {name: text for name, _, text in (line.partition(":") for line in lines)}
        return 1024 * int(found["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return None


def release_memory() -> None:
    """Give freed memory back to the system, which glibc otherwise keeps for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def reuse_memory() -> None:
    """Keep freed memory for the next temporary: page faults are a fifth of a walk's time.

    glibc otherwise gives each block above some size back and gets it again as new, zeroed pages.
    Blocks above 32 MB still go back at once.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if option is not None:
        option(M_MMAP_THRESHOLD, KEPT_BLOCK)
        option(M_TRIM_THRESHOLD, KEPT_HEAP)
