"""The rules of the house, read from the source: imports, sizes, and what the wheel carries."""

import ast
import os
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
# Inside runtime/ a folder imports what stands to its left; those side by side not each other.
FLOORS = (
    ("system",),
    ("architecture",),
    ("formats",),
    ("cache", "text"),
    ("kernels",),
    ("storage",),
    ("decoder",),
    ("walk",),
    ("sparsity",),
    ("engine",),
    ("measure",),
)
RANK = {folder: rank for rank, row in enumerate(FLOORS) for folder in row}
# What may be imported inside a function, and why it does not stand at the top of its file.
LATER = {
    "transformers": "takes a second or more; families of the table run without it",
    "huggingface_hub": "takes most of a second; only models of the hub need it",
    "datasets": "takes seconds; only data sets need it",
    "pyarrow": "takes most of a second; only parquet files need it",
    "jinja2": "the worker is a script that is told where modules are when it starts",
    "tokenizers": "the probe is a script that is told where modules are when it starts",
    "matplotlib": "may be missing: plots of a training are drawn where it is there",
    "llguidance": "may be missing: only answers that follow a schema need it",
    "pydantic": "a model that runs starts a tenth of a second sooner without it",
    "optim.recipes.schema": "needs pydantic; of models that run only pruned ones need it",
    "optim.runtime.storage.manifest": "needs pydantic; of models that run only packed ones need it",
    "optim.runtime.storage.gguf": "gguf takes a tenth of a second; only its files need it",
    "optim.runtime.kernels.triton": "triton may be missing, and needs a GPU",
    "optim.runtime.kernels.cpu.numba_bf12": "numba takes most of a second; C has the same",
    "optim.runtime.kernels.cpu.numba_df11": "numba takes most of a second; C has the same",
}
LINEARS = ROOT / "runtime" / "decoder" / "linears"
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


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("optim", *(part for part in parts if part != "__init__")))


MODULES = {module_of(path) for path in FILES}
TREES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def named(statement: ast.AST) -> set[str]:
    """The modules that an import statement names; of ours down to the file."""
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}
    if not isinstance(statement, ast.ImportFrom):
        return set()
    base = str(statement.module)
    inside = (f"{base}.{alias.name}" for alias in statement.names)
    return {name if name in MODULES else base for name in inside}


def everywhere(tree: ast.AST) -> set[str]:
    """The modules that are imported anywhere: at the top, in functions, for types alone."""
    return {name for node in ast.walk(tree) for name in named(node)}


def inside_functions(tree: ast.AST) -> set[str]:
    """The modules that are imported later than the module itself, or for types alone."""
    waits = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    found: set[str] = set()
    for node in ast.walk(tree):
        types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, waits) or types:
            found |= everywhere(node)
    return found


def wrong_floors(module: str, imports: set[str]) -> list[str]:
    """The imports of a module of runtime/ that do not stand on a floor to the left of its own."""
    own = module.split(".")[2]
    others = {name.split(".")[2]: name for name in imports if name.startswith("optim.runtime.")}
    return [name for f, name in others.items() if f != own and RANK[f] >= RANK[own]]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, over any number of steps: take away what imports nothing."""
    left = {module: {name for name in names if name in graph} for module, names in graph.items()}
    while leaves := {module for module, names in left.items() if not names - {module}}:
        left = {m: names - leaves for m, names in left.items() if m not in leaves}
    return [sorted(left)] if left else []


RUNTIME = sorted(name for name in TREES if name.startswith("optim.runtime."))


@pytest.mark.parametrize("module", RUNTIME)
def test_floors_of_the_runtime(module: str) -> None:
    assert module.split(".")[2] in RANK, "a folder of runtime/ without a floor"
    assert wrong_floors(module, everywhere(TREES[module])) == []


def test_no_import_goes_round_in_a_circle() -> None:
    assert circles({module: everywhere(tree) for module, tree in TREES.items()}) == []


# cli imports what is below it in functions: `optim --help` must not wait for torch.
WAITING = sorted(name for name in TREES if not name.startswith("optim.cli"))


@pytest.mark.parametrize("module", WAITING)
def test_imports_inside_functions_have_a_reason(module: str) -> None:
    found = inside_functions(TREES[module])
    roots = tuple(LATER)
    assert {n for n in found if not any(n == r or n.startswith(f"{r}.") for r in roots)} == set()


def test_every_reason_is_used() -> None:
    used = {name for module in WAITING for name in inside_functions(TREES[module])}
    assert [r for r in LATER if not any(n == r or n.startswith(f"{r}.") for n in used)] == []


def asked_kinds(tree: ast.AST, kinds: set[str]) -> list[str]:
    """The classes among `kinds` that `isinstance` is asked about."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    asks = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "isinstance"]
    parts = [node for call in asks for node in ast.walk(call.args[1])]
    names = [getattr(node, "id", getattr(node, "attr", "")) for node in parts]
    return [name for name in names if name in kinds]


def linear_kinds() -> set[str]:
    """The classes of decoder/linears that derive from its `Linear`, at any distance."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in LINEARS.glob("*.py")]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    bases = {c.name: {ast.unparse(base) for base in c.bases} for c in classes}
    found: set[str] = set()
    while more := {c for c, own in bases.items() if own & (found | {"Linear"})} - found:
        found |= more
    return found


def test_nobody_asks_what_kind_a_linear_is() -> None:
    """General code asks the linear itself (decoder/linears/base.py); its own folder may know."""
    kinds = linear_kinds()
    assert {"DenseLinear", "PackedLinear", "PlaneLinear", "StepLinear", "MaskedLinear"} <= kinds
    makers = (LINEARS, ROOT / "quant" / "mergequant")  # its solver stores the linears it made
    outside = [path for path in FILES if path.parent not in makers]
    asked = {name_of(p): asked_kinds(TREES[module_of(p)], kinds) for p in outside}
    assert {name: found for name, found in asked.items() if found} == {}


def test_the_rules_of_imports_see_a_violation() -> None:
    source = (
        "import torch\ndef f():\n    from optim.runtime.engine.load import load_model\n"
        "if TYPE_CHECKING:\n    import numpy\nisinstance(x, a.DenseLinear | int)\n"
    )
    tree = ast.parse(source)
    assert inside_functions(tree) == {"optim.runtime.engine.load", "numpy"}
    assert wrong_floors("optim.runtime.text.x", everywhere(tree)) == ["optim.runtime.engine.load"]
    assert wrong_floors("optim.runtime.text.x", {"optim.runtime.cache.full"}) != []
    assert wrong_floors("optim.runtime.text.x", {"optim.runtime.system.paths"}) == []
    assert asked_kinds(tree, {"DenseLinear"}) == ["DenseLinear"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "a"}, "b": {"x"}}) == []


def test_one_place_hashes() -> None:
    users = [
        name_of(path) for path in FILES if "hashlib" in set(imported(ast.parse(path.read_text())))
    ]
    assert users == ["runtime/system/hashes.py"]


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
    folders = {f"optim/{n}" for n in names if n.split("/")[0] in BELOW}
    assert packed == folders | {"optim/__main__.py"}
    unpacked = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    zipfile.ZipFile(wheel).extractall(unpacked["PYTHONPATH"])
    for command in (["--version"], ["recipe", "show", "awq-w4"]):
        subprocess.run([sys.executable, "-m", "optim", *command], env=unpacked, check=True)
