"""How many cores other programs leave free, seen over the time a model takes to load.

Threads that wait for one another are as slow as the slowest: on cores that others keep busy two
threads decode at little more than half the speed of one.
"""

import os
import sys
import time
from collections.abc import Collection
from pathlib import Path

IDLE = (3, 4)  # columns of /proc/stat: idle, and idle while waiting for a disk
COLUMNS = 8  # the rest counts a guest's time twice


def busy_ticks(text: str, cores: Collection[int]) -> int:
    """Ticks that `cores` have worked, from the text of /proc/stat."""
    total = 0
    for line in text.splitlines():
        name, *numbers = line.split() or [""]
        if name.removeprefix("cpu").isdecimal() and int(name[3:]) in cores:
            ticks = [int(number) for number in numbers[:COLUMNS]]
            total += sum(ticks) - sum(ticks[i] for i in IDLE)
    return total


class Meter:
    """Starts when it is made. Knows nothing where the system does not tell."""

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0) if sys.platform == "linux" else frozenset[int]()
        self._start = self._now()

    def free_cores(self) -> int | None:
        """Cores of this process that others left free since the start, at least one."""
        if self._start is None or (now := self._now()) is None:
            return None
        passed, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        if passed <= 0:
            return None
        others = max(0.0, busy - own) / passed
        return max(1, round(len(self._cores) - others))

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds: the clock's, those that all have worked on our cores, and we."""
        try:
            text = Path("/proc/stat").read_text()
            busy = busy_ticks(text, self._cores) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return None
        return time.monotonic(), busy, sum(os.times()[:4])
