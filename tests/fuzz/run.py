"""Fuzz every kind of input: `python tests/fuzz/run.py --cases 10000 --seed 1`.

Each case is a small sound model or file with a lie in it, and is used in a child process: it must
end in an exact result or in an OptimError. Prints a row for each kind, then every case that ended
otherwise with the seed that makes it again: `--kind KIND --only SEED`. Exit code 1 if there is one.
With the sanitizers (`make fuzz-sanitize`) a report of theirs ends a case as a signal does.
"""

import argparse
import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.pop("LD_PRELOAD", None)  # the sanitizers are for this process, not for those it starts

import harness
import torch

HOW = ("cases", "refused", "fine", "wrong", "unexpected", "signal", "hang", "memory")


def one(kind: str, make: Callable[..., Any], seed: int, root: Path) -> dict[str, Any]:
    """Make and run a case; returns how it ended."""
    folder = Path(tempfile.mkdtemp(dir=root))
    try:
        what, case = make(Random(f"{kind} {seed}"), folder)
        ended = harness.run(case)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"kind": kind, "seed": seed, "how": ended.how, "where": ended.where, "what": what}


def overflow() -> None:
    """What the sanitizers must report: a byte beyond a block of memory is written."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.memset(ctypes.c_void_p(libc.malloc(8)), 0, 9)


def main() -> int:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1200, help="in all, the kinds alike")
    parser.add_argument("--kind", action="append", help="one of the kinds; more than once for more")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--only", type=int, help="run the case of this seed alone")
    parser.add_argument("--all", action="store_true", help="a line for the good ones too")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if os.environ.get("OPTIM_SANITIZE") and harness.run(overflow).how != "signal":
        sys.exit("the sanitizers do not report an overflow: start this by `make fuzz-sanitize`")
    with tempfile.TemporaryDirectory(prefix="optim-fuzz-") as folder:
        root = Path(folder)
        os.environ["OPTIM_CACHE"] = os.environ.get("OPTIM_CACHE", str(root / "cache"))
        import bases
        import exchange
        import kinds

        kinds.BASES = root / "bases"
        bases.make_all(kinds.BASES)
        known = kinds.KINDS | exchange.EXCHANGES
        chosen = asked.kind or list(known)
        for base in sorted(kinds.BASES.iterdir()):  # builds kernels, imports what cases need
            kinds.use(next(iter(base.glob("*.gguf")), base))
        counts = {kind: Counter[str]() for kind in chosen}
        bad = []
        for kind in chosen:
            seeds = range(asked.seed, asked.seed + asked.cases // len(chosen))
            for seed in [asked.only] if asked.only is not None else seeds:
                found = one(kind, known[kind], seed, root)
                counts[kind][found["how"]] += 1
                if found["how"] not in harness.GOOD:
                    bad.append(found)
                if found["how"] not in harness.GOOD or asked.only is not None or asked.all:
                    print(json.dumps(found), file=sys.stderr, flush=True)
    _show(counts)
    return int(bool(bad))


def _show(counts: dict[str, Counter[str]]) -> None:
    print("kind".ljust(12) + "".join(name.rjust(12) for name in HOW))
    for kind, found in counts.items():
        row = [found.total(), *(found[name] for name in HOW[1:])]
        print(kind.ljust(12) + "".join(str(n).rjust(12) for n in row))


if __name__ == "__main__":
    sys.exit(main())
