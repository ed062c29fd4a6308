"""The wheel: what is installed has the program, and the files that it reads."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("cli", "program", "quant", "prune", "export", "runtime", "recipes")
BUILD = "from setuptools.build_meta import build_wheel; print(build_wheel('made'))"


def test_a_wheel_runs_as_a_module(tmp_path: Path) -> None:
    for name in CODE:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    built = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    wheel = tmp_path / "made" / built.stdout.splitlines()[-1]
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert {path.name for path in (installed / "optim").iterdir()} == {
        *(set(CODE) - {"program"}),
        "__main__.py",
    }
    for kind in ("recipes/*.yaml", "runtime/text/data/*", "runtime/kernels/cpu/*.[ch]"):
        assert [path.name for path in sorted(ROOT.glob(kind))] == [
            path.name for path in sorted((installed / "optim").glob(kind))
        ]
    for arguments, said in ((["--version"], "optim "), (["recipe", "list"], "awq-w4")):
        ran = subprocess.run(
            [sys.executable, "-m", "optim", *arguments],
            cwd=installed,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0 and said in ran.stdout, ran.stderr
