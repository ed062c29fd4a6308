"""Memory given back must leave everything working."""

import re
import sys
from pathlib import Path

import pytest
import torch

from optim.runtime.system.machine import release_code, use_huge_pages


def resident_code() -> int:
    """Kilobytes of torch's code that are resident."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counted = "/libtorch" in line and " r-xp " in line
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts it")
def test_code_leaves_memory_and_comes_back() -> None:
    x = torch.randn(40, 40)
    wanted = x @ x
    before = resident_code()
    release_code()
    assert resident_code() < before / 2
    assert torch.equal(x @ x, wanted)
    assert torch.linalg.svdvals(x).isfinite().all()


@pytest.mark.parametrize("count", [0, 10, 3 << 20])
def test_huge_pages_keep_what_is_there(count: int) -> None:
    x = torch.arange(count, dtype=torch.int32)
    use_huge_pages(x)
    assert torch.equal(x, torch.arange(count, dtype=torch.int32))
