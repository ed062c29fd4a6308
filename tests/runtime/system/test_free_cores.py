"""Free cores, from what the system counts."""

import os
import sys
from pathlib import Path

import pytest

from optim.runtime.system import free_cores

STAT = """cpu  300 0 100 1600 0 0 0 0 0 0
cpu0 200 10 50 700 30 4 3 2 100 0
cpu1 100 0 50 900 0 0 0 0 0 0
intr 12345
ctxt 99
"""


def test_busy_ticks_are_all_but_idle_and_guests() -> None:
    assert free_cores.busy_ticks(STAT, {0}) == 200 + 10 + 50 + 4 + 3 + 2
    assert free_cores.busy_ticks(STAT, {1}) == 150
    assert free_cores.busy_ticks(STAT, {0, 1}) == 269 + 150
    assert free_cores.busy_ticks(STAT, {7}) == 0
    assert free_cores.busy_ticks("", {0}) == 0


@pytest.mark.parametrize(
    ("seconds", "all_busy", "own", "free"),
    [
        (2.0, 2.0, 2.0, 4),  # alone
        (2.0, 4.0, 2.0, 3),  # one other
        (2.0, 8.0, 0.0, 1),  # none is free: one is taken all the same
        (2.0, 3.0, 3.4, 4),  # clocks of different grain
        (0.0, 0.0, 0.0, None),
    ],
)
def test_free_cores(
    seconds: float, all_busy: float, own: float, free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([(10.0, 5.0, 1.0), (10 + seconds, 5 + all_busy, 1 + own)])
    monkeypatch.setattr(free_cores.Meter, "_now", lambda self: next(readings))
    meter = free_cores.Meter()
    meter._cores = {0, 1, 2, 3}
    assert meter.free_cores() == free


def test_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert free_cores.Meter().free_cores() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_here() -> None:
    meter = free_cores.Meter()
    while (free := meter.free_cores()) is None:
        pass
    assert 1 <= free <= len(os.sched_getaffinity(0))
