"""What a wheel must have beside the Python files."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_file_that_the_program_reads_is_in_the_wheel() -> None:
    for package, folder in PROJECT["package-dir"].items():
        patterns = PROJECT["package-data"].get(package, [])
        for path in (ROOT / folder).rglob("*"):
            name = str(path.relative_to(ROOT / folder))
            if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
                assert any(fnmatch(name, pattern) for pattern in patterns), path
