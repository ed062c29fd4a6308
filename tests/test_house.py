"""The rules of the house, read from the source: imports, sizes, and what the wheel carries."""

import ast
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW: dict[str, set[str]] = {
    "recipes": set(),
    "runtime": {"recipes"},
    "quant": {"recipes", "runtime"},
    "prune": {"recipes", "runtime"},
    "export": {"recipes", "runtime"},
    "cli": {"recipes", "runtime", "quant", "prune", "export"},
}
HEAVY = {"torch", "transformers", "datasets", "triton", "numba", "numpy", "prompt_toolkit"}
FILES = [path for folder in BELOW for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module name that is imported under `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: not functions, not TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            yield from at_import(node.body)
            yield from at_import(getattr(node, "orelse", []))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = [name.split(".") for name in imported(tree) if name.startswith("optim.")]
    used = {part[1] for part in parts if len(part) > 1}
    assert used - BELOW[folder] <= {folder}
    relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    assert not relative, "import as optim.<folder>"


LIGHT = [path for path in FILES if path.relative_to(ROOT).parts[0] in ("cli", "recipes")]


@pytest.mark.parametrize("path", LIGHT, ids=name_of)
def test_cli_and_recipes_import_nothing_heavy_at_module_level(path: Path) -> None:
    tops = [
        name
        for statement in at_import(ast.parse(path.read_text(encoding="utf-8")).body)
        for name in imported(statement)
    ]
    assert not {name.split(".")[0] for name in tops} & HEAVY
    # The runtime imports torch, so it is just as heavy.
    below = ("optim.runtime", "optim.quant", "optim.prune", "optim.export")
    assert not [name for name in tops if name.startswith(below)]


def test_the_light_imports_rule_sees_a_violation() -> None:
    source = "if x:\n    import torch.nn\ndef f():\n    import numpy\n"
    tops = [name for node in at_import(ast.parse(source).body) for name in imported(node)]
    assert tops == ["torch.nn"]


def test_files_and_functions_stay_small() -> None:
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    assert statistics.median(count for count in lines.values() if count) <= 150
    lengths = {
        f"{name_of(path)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: count for name, count in lengths.items() if count > 60} == {}
    assert statistics.median(lengths.values()) <= 12


@pytest.mark.slow
def test_the_wheel_carries_exactly_the_mapped_folders(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    names = [name for name in tracked.split("\0") if name and (ROOT / name).is_file()]
    for name in names:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(copy)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert packed == {f"optim/{n}" for n in names if n.split("/")[0] in BELOW}
