"""How long `optim run MODEL hi` takes from the command to its first token, and where the time goes.

    python benchmarks/startup.py [MODEL] [--runs 5]

Each run is a process of its own, after one that warms the caches. On a busy machine seconds of the
CPU, those of the processes it starts included, say more than the clock.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

PHASES = """
import os
marks = [sum(os.times()[:4])]
from optim.runtime.system.torch_import import import_torch
import_torch()
marks.append(sum(os.times()[:4]))
from optim.runtime.engine.load import load_model
from optim.runtime.engine.session import Sampling, Session
marks.append(sum(os.times()[:4]))
session = Session(load_model({model!r}, device="cpu"), sampling=Sampling(max_tokens=1))
marks.append(sum(os.times()[:4]))
"".join(session.reply("hi"))
marks.append(sum(os.times()[:4]))
print(*(after - before for before, after in zip(marks, marks[1:])))
"""
NAMES = ("import torch", "import optim", "load", "first token")


def timed(command: list[str]) -> tuple[float, float, str]:
    """Seconds by the clock and of the CPU, and what was printed."""
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, after = time.perf_counter() - start, os.times()
    cpu = (after.children_user + after.children_system) - (
        before.children_user + before.children_system
    )
    return seconds, cpu, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    command = [sys.executable, "-m", "optim.cli", "run", asked.model, "hi"]
    command += ["--temperature", "0", "--max-tokens", "1", "--quiet"]
    timed(command)
    whole = [timed(command)[:2] for _ in range(asked.runs)]
    clock, cpu = (statistics.median(column) for column in zip(*whole, strict=True))
    print(f"optim run {asked.model} hi: {clock:.2f} s by the clock, {cpu:.2f} s of the CPU")
    lines = [timed([sys.executable, "-c", PHASES.format(model=asked.model)])[2] for _ in whole]
    for name, *seconds in zip(NAMES, *([float(x) for x in x.split()] for x in lines), strict=True):
        print(f"  {name:<14} {statistics.median(seconds):.2f} s of the CPU")
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores; medians of {asked.runs}")


if __name__ == "__main__":
    main()
