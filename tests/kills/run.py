"""Kill commands with SIGKILL at random moments: `python tests/kills/run.py --kills 100 --seed 1`.

Each command works on a tiny model in a child process. After every kill it is started again, is
perhaps killed again, and in the end must leave the bytes of a run that nothing disturbed, what was
measured included, and no other file; one killed after its last rename leaves its workspace behind.
Prints a row for each command; exit code 1 if one left anything else.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

import torch

TEXT = ("--calibration", "text.txt", "--num-samples", "4", "--seq-len", "32", "--threads", "1")
PLAIN = ("--threads", "1", "--no-eval")
QUANTIZE = ("quantize", "model", *TEXT)
EXPORT = ("export", "quantized", "--threads", "1")
COMMANDS: dict[str, tuple[str, ...]] = {
    "quantize": (*QUANTIZE, "-m", "awq", "--group-size", "32", "--no-eval"),
    "measured": (*QUANTIZE, "-m", "rtn", "--group-size", "32"),
    "guide": (*QUANTIZE, "-m", "awq", "--guide", "loss", "--sweeps", "1", "--no-eval"),
    "tune": ("tune", "quantized", "--against", "model", *TEXT, "--no-eval"),
    "mergequant": (*QUANTIZE, "-m", "mergequant", "--no-eval"),
    "prune": ("prune", "model", *TEXT, "-m", "threshold"),
    "pack df11": ("pack", "model", "--layout", "df11", *PLAIN),
    "pack bf12": ("pack", "model", "--layout", "bf12", *PLAIN),
    "unpack": ("unpack", "packed", "--threads", "1"),
    "export awq": (*EXPORT, "-f", "awq"),
    "export gguf": (*EXPORT, "-f", "gguf", "-o", "out.gguf"),
}
MADE = {  # what the commands read beside the model: the command that writes it
    "packed": COMMANDS["pack df11"],
    "quantized": ("quantize", "model", "-m", "rtn", "--group-size", "32", "--no-eval"),
}
WORDS = "The harbour lay still in the early light. Boats came home with their nets full. " * 40
HEAVY = (
    "transformers.models.llama.modeling_llama",
    "optim.quant.run",
    "optim.quant.tune.run",
    "optim.prune.run",
    "optim.export.lossless.pack",
    "optim.export.lossless.unpack",
    "optim.export.run",
    "optim.runtime.measure.proof",
    "optim.runtime.engine.load",
)
NAMES = ("out", "out.gguf")
LOG = Path(tempfile.gettempdir()) / f"optim-kills-{os.getpid()}.log"
COST = re.compile(rb"\s*(## What it cost\s+)?Made in .*")
AGAIN = 0.3
"""How often a command that was started again is killed again."""


def start(command: tuple[str, ...], folder: Path) -> int:
    """Run `optim -o out COMMAND` in a child that stands in `folder`; returns its process."""
    child = os.fork()
    if child:
        return child
    with LOG.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        os.chdir(folder)
        sys.argv = ["optim", command[0], "-o", "out", *command[1:]]
        from optim.cli import main

        os._exit(main())


def killed_after(child: int, seconds: float) -> bool:
    """Kill `child` after `seconds`; returns whether it had not come to its end."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def must_end(child: int) -> None:
    """Wait for a command that has to end well."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise AssertionError(f"exit code {code}: {LOG.read_text()[-500:]}")


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file that a command made."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(p.relative_to(folder)): hashlib.sha256(lasting(p)).hexdigest() for p in files}


def lasting(path: Path) -> bytes:
    """A file's bytes without the time and memory that making it took.

    No two runs share those, and a run killed after its last rename has not written them.
    """
    data = path.read_bytes()
    if path.name == "optim.json":
        return json.dumps(json.loads(data) | {"cost": None}).encode()
    return COST.sub(b"", data).strip() if path.name == "README.md" else data


def remove(path: Path | None) -> None:
    """Remove a file or a folder, if there is one."""
    if path is not None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def made(folder: Path) -> Path | None:
    """What a command has made in `folder`, under its name."""
    return next((path for name in NAMES if (path := folder / name).exists()), None)


def place(root: Path, name: str) -> Path:
    """A folder with what the commands read."""
    folder = root / name
    folder.mkdir()
    for given in ("model", "text.txt", *MADE):
        (folder / given).symlink_to(root / given)
    return folder


def one(
    command: tuple[str, ...], whole: dict[str, str], lasts: float, root: Path, draw: Random
) -> tuple[int, str]:
    """Kill `command` at least once, let it end, and compare; returns kills and what is wrong."""
    folder, kills = place(root, "broken"), 0
    try:
        while not kills or draw.random() < AGAIN:
            remove(made(folder))
            kills += killed_after(start(command, folder), draw.random() * lasts)
        if made(folder):  # killed after its last rename: it has not tidied up
            shutil.rmtree(folder / "out.partial", ignore_errors=True)
        else:
            must_end(start(command, folder))
        found = hashes(folder)
        differ = [name for name in whole | found if whole.get(name) != found.get(name)]
        return kills, f"differ: {', '.join(differ)}" if differ else ""
    except AssertionError as error:
        return kills, str(error)
    finally:
        shutil.rmtree(folder)


def main() -> int:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="in all, the commands alike")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    import bases

    for module in HEAVY:  # once, and not in every child
        importlib.import_module(module)
    bad = Counter[str]()
    with tempfile.TemporaryDirectory(prefix="optim-kills-") as name:
        root = Path(name)
        os.environ["OPTIM_CACHE"] = os.environ.get("OPTIM_CACHE", str(root / "cache"))
        bases.make_plain(root / "model")
        (root / "text.txt").write_text(WORDS)
        for given, command in MADE.items():
            must_end(start(command, place(root, f"{given}-made")))
            (root / given).symlink_to(root / f"{given}-made" / "out")
        for title in asked.only:
            command = COMMANDS[title]
            draw = Random(f"{title} {asked.seed}")
            undisturbed = place(root, "whole")
            must_end(start(command, undisturbed))  # compiles kernels
            remove(made(undisturbed))
            begin = time.monotonic()
            must_end(start(command, undisturbed))
            lasts, whole = time.monotonic() - begin, hashes(undisturbed)
            shutil.rmtree(undisturbed)
            kills = 0
            while kills < asked.kills / len(asked.only):
                more, wrong = one(command, whole, lasts, root, draw)
                kills += more
                bad[title] += bool(wrong)
                if wrong:
                    print(f"{title}: {wrong}", file=sys.stderr, flush=True)
            print(
                f"{title:<12} {lasts:.2f} s, killed {kills} times, {bad[title]} not the same",
                flush=True,
            )
    return int(bool(bad.total()))


if __name__ == "__main__":
    sys.exit(main())
