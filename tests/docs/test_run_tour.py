"""The script that runs the tour finds commands, and notices when they do not do what is written."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tour() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_tour", ROOT / "docs" / "run_tour.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["run_tour"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def page(tmp_path: Path, block: str) -> str:
    path = tmp_path / "page.md"
    path.write_text(f"text\n$ not a command\n```console\n{block}\n```\n```\n$ nor this\n```\n")
    return str(path)


def test_commands_are_found_with_their_output_and_code(tour: ModuleType) -> None:
    text = "```console\n$ echo a \\\n  b\na b\n\n$ false\nexit 1\n```\n"
    first, second = tour.steps(text)
    assert (first.command, first.shown, first.code) == ("echo a \\\n  b", ["a b"], 0)
    assert (second.command, second.shown, second.code, second.line) == ("false", [], 1, 6)


def test_commands_share_a_folder_and_must_do_as_stated(tour: ModuleType, tmp_path: Path) -> None:
    block = "$ echo one two three > f\n$ cat f\none … three\n$ exit 3\nexit 3"
    assert tour.main([page(tmp_path, block)]) == 0


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("$ exit 3", "page.md:4: exit code 3, the document says 0"),
        ("$ true\nexit 1", "exit code 0, the document says 1"),
        ("$ printf 'b\\na\\n'\na\nb", "not printed: b"),
        ("$ false | true", "exit code 1, the document says 0"),
        ("no command", "no command found"),
    ],
)
def test_what_does_not_hold_is_reported(
    tour: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    block: str,
    said: str,
) -> None:
    assert tour.main([page(tmp_path, block)]) == 1
    assert said in capsys.readouterr().err


def test_python_blocks_are_one_program(tour: ModuleType, tmp_path: Path) -> None:
    text = "```python\na = 1\n```\ntext\n```python\nassert a == {}\n```\n"
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text(text.format(1))
    bad.write_text(text.format(2))
    assert tour.main([str(good)]) == 0
    assert tour.main([str(bad)]) == 1
