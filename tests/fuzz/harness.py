"""Run cases in child processes, and say how each of them ended.

A child is a fork of this process, in which everything is imported already: a case costs some
milliseconds. Its processor time and address space are bounded, so no case can stop the run; the
bound on the clock, which is for cases that wait, grows with what else the machine has to do.
"""

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 5
"""Of the processor, for a case."""
MEMORY = 1 << 30
"""Bytes above what this process holds."""
REFUSED, FINE = "refused", "fine"
GOOD = (REFUSED, FINE)


class WrongError(AssertionError):
    """A case was accepted, and what came out is not what the file says."""


@dataclass(frozen=True, slots=True)
class Ended:
    """`how`: refused, fine, wrong, unexpected, signal, hang, memory; `where`: where it was."""

    how: str
    where: str = ""


def run(case: Callable[[], Any]) -> Ended:
    """Run `case` in a child of this process."""
    reader, writer = os.pipe()
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(case, writer)
    os.close(writer)
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    said = _read(reader, begin + 4 * SECONDS * busy)
    os.close(reader)
    if said is None:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    if said is None:
        return Ended("hang", "on the clock")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        kind = "hang" if number == signal.SIGXCPU else "signal"
        return Ended(kind, signal.Signals(number).name)
    ended = Ended(**json.loads(said)) if said else Ended("signal", f"exit {status >> 8}")
    above = used.ru_maxrss - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if ended.how in GOOD and above * 1024 > MEMORY:
        return Ended("memory", f"{above >> 10} MB")
    return ended


def _read(pipe: int, end: float) -> bytes | None:
    """What the child says; None if it does not in time."""
    found = b""
    while True:
        if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            return None
        if not (piece := os.read(pipe, 1 << 16)):
            return found
        found += piece


def _child(case: Callable[[], Any], writer: int) -> None:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + SECONDS
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 2))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 3 * MEMORY,) * 2)
        os.write(writer, json.dumps(_outcome(case)).encode())
    finally:
        os._exit(0)


def _outcome(case: Callable[[], Any]) -> dict[str, str]:
    from optim.recipes.errors import OptimError

    try:
        case()
    except OptimError as error:
        return {"how": REFUSED, "where": error.message[:200]}
    except WrongError as error:
        return {"how": "wrong", "where": str(error)[:200]}
    except MemoryError:
        return {"how": "memory", "where": _place()}
    except BaseException as error:
        text = f"{type(error).__name__} {_place()}: {str(error)[:120]}"
        kind = "memory" if "allocate memory" in str(error) else "unexpected"
        return {"how": kind, "where": text}
    return {"how": FINE, "where": ""}


def _place() -> str:
    """The last line of the project that an error passed."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [f for f in frames if "/tests/" not in f.filename and "site-packages" not in f.filename]
    last = ours[-1] if ours else frames[-1]
    return f"{'/'.join(Path(last.filename).parts[-3:])}:{last.lineno}"
