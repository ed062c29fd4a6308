"""A tokenizer.json that came from anywhere: tried out before this process works with it.

The Rust library behind it panics on some files, aborts on others, and has expressions that match
for minutes or steps that double a text twenty times. The steps around the vocabulary, where all of
that can be, are tried once in a process of their own (tokenizer_probe.py); those that held are
remembered by their hash. Every later call goes through `guarded`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer as Backend

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.system.hashes import bytes_sha256
from optim.runtime.system.paths import cache_folder
from optim.runtime.text import tokenizer_probe

LARGEST = 40 << 20
PATIENCE = 60.0  # seconds on the clock; the processor's time is bounded by the probe itself
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
AGAIN = "fetch the model's tokenizer.json again"
T = TypeVar("T")


def guarded(work: Callable[[], T], what: str, fix: str = AGAIN) -> T:
    """`work()`, where the Rust library may raise or panic: OptimError (2) that begins with `what`.

    A panic is a BaseException and no Exception, so nothing else catches it.
    """
    try:
        return work()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, OptimError):
        raise
    except BaseException as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise OptimError(f"{what}: {reason}", fix, USAGE) from None


def read_backend(path: Path) -> Backend:
    """The tokenizer at `path`. OptimError (2) for a file that is none, or that could do harm."""
    what = f"{path} cannot be used"
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST >> 20} MB")
        data = path.read_bytes()
        reason = _harm(data)
    except (OSError, ValueError, RecursionError) as error:
        raise OptimError(f"{what}: {error}", AGAIN, USAGE) from None
    if reason:
        raise OptimError(f"{what}: {reason}", AGAIN, USAGE)
    backend: Backend = guarded(lambda: Backend.from_buffer(data), what)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _harm(data: bytes) -> str | None:
    """What is wrong with a file's steps; None if they held, today or before."""
    version = f"{tokenizer_probe.SECONDS} {tokenizer_probe.TEXTS}".encode()
    known = cache_folder() / "tokenizers" / bytes_sha256([version, data])
    if known.is_file():
        return None
    parts = json.loads(data)
    if not isinstance(parts, dict):
        raise ValueError("it must hold a JSON object")
    reason = _probe(json.dumps({part: parts.get(part) for part in STEPS}))
    if reason is None:
        try:
            known.parent.mkdir(parents=True, exist_ok=True)
            known.touch()
        except OSError:
            pass  # it is tried again the next time
    return reason


def _probe(steps: str) -> str | None:
    command = [sys.executable, "-I", "-S", tokenizer_probe.__file__, json.dumps(sys.path)]
    environment = os.environ | {"RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command,
            input=steps.encode(),
            capture_output=True,
            timeout=PATIENCE,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return "its steps take too long on ordinary text"
    if done.returncode:
        return "its steps take too long on ordinary text, or too much memory"
    reason = done.stdout.decode(errors="replace").partition("\n")[0]
    return f"its steps fail on ordinary text ({reason})" if reason else None
