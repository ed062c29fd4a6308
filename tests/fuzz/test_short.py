"""A short run of the fuzzers, from a fixed seed: every kind, and nothing but good ends.

`make fuzz` runs ten thousand cases.
"""

import subprocess
import sys
from pathlib import Path

CASES = 120


def test_every_case_ends_well() -> None:
    program = Path(__file__).with_name("run.py")
    command = [sys.executable, str(program), "--cases", str(CASES), "--seed", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert sum(int(line.split()[1]) for line in done.stdout.splitlines()[1:]) == CASES
