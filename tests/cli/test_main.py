"""The command as a process: exit codes, help, and what it imports."""

import os
import subprocess
import sys

import pytest

import optim.cli
from optim.cli.app import program
from optim.recipes.errors import MACHINE, OptimError

Captured = pytest.CaptureFixture[str]
COMMANDS = ["quantize", "run", "inspect", "eval", "bench", "doctor", "list", "pull", "rm", "recipe"]
RECIPE_COMMANDS = ["list", "show", "check", "schema"]


def optim_process(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run `optim` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "optim.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", **env},
        timeout=120,
    )


def optim_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `optim` in this process."""
    monkeypatch.setattr(sys, "argv", ["optim", *arguments])
    return optim.cli.main()


def test_bare_optim_prints_help_and_exits_2() -> None:
    ran = optim_process()
    assert ran.returncode == 2
    shown = ran.stdout + ran.stderr
    for panel in ("Compress", "Run", "Look", "Models", "Recipes"):
        assert f"─ {panel} ─" in shown


def test_version() -> None:
    ran = optim_process("-V")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("optim 0.")


@pytest.mark.parametrize(
    "command", [[name] for name in COMMANDS] + [["recipe", name] for name in RECIPE_COMMANDS]
)
def test_every_help_has_an_example(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert optim_main(monkeypatch, *command, "--help") == 0
    assert f"Example: optim {' '.join(command)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "offered"), [("optim qu", "quantize"), ("optim run demo --temp", "--temperature")]
)
def test_the_shell_completes_commands_and_flags(typed: str, offered: str) -> None:
    asked = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = optim_process(_OPTIM_COMPLETE="complete_bash", **asked)
    assert done.stdout.split() == [offered]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from optim.cli.app import program; program(); "
        "import optim.cli.ui, optim.cli.recipe; "
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'prompt_toolkit'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantise"], "Did you mean 'quantize'?"),
        (["quantize", "demo", "--bit", "4"], "--bits"),
        (["quantize", "demo", "--bits", "x"], "--bits"),
        (["inspect"], "MODEL"),
    ],
)
def test_wrong_usage_exits_2(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert optim_main(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and "Traceback" not in err


def raising(monkeypatch: pytest.MonkeyPatch, problem: BaseException) -> int:
    """The exit code where the command raises `problem`."""

    def fail(**_: object) -> None:
        raise problem

    monkeypatch.setattr("optim.cli.app.program", lambda _first: fail)
    return optim.cli.main()


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (OptimError("no", fix="do", code=3), 3, "error: no\n  fix: do\n"),
        (OptimError("no"), 1, "error: no\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            ValueError("a\n b"),
            1,
            "error: unexpected ValueError: a b\n"
            "  fix: this is a bug in optim; OPTIM_DEBUG=1 shows where\n",
        ),
        (
            OSError(28, "No space left on device", "x.safetensors"),
            4,
            "error: the disk is full (x.safetensors)\n  fix: free some space, or use -o\n",
        ),
        (
            MemoryError(),
            4,
            "error: there is not enough memory\n"
            "  fix: close other programs, or use a smaller model or `--device cpu`\n",
        ),
        (SystemExit(2), 2, ""),
        (SystemExit(None), 0, ""),
    ],
)
def test_each_failure_has_its_code_and_no_traceback(
    problem: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    monkeypatch.delenv("OPTIM_DEBUG", raising=False)
    assert raising(monkeypatch, problem) == code
    assert capsys.readouterr() == ("", said)


def test_optim_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("OPTIM_DEBUG", "1")
    assert raising(monkeypatch, OptimError("no", code=2)) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and err.endswith("error: no\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "optim.cli", "recipe", "schema"]
    ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (1, "")


def test_a_full_disk_is_said_at_the_end_too() -> None:
    command = [sys.executable, "-m", "optim.cli", "recipe", "schema"]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ran.returncode == MACHINE and ran.stderr.startswith("error: the disk is full")


def test_what_is_left_for_the_end_is_done() -> None:
    """`command` leaves without taking Python apart, but not without what was registered."""
    code = (
        "import atexit, threading, time, optim.cli; "
        "atexit.register(lambda: print('registered')); "
        "late = threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))); "
        "optim.cli.main = lambda: late.start() or 3; "
        "optim.cli.command()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout.split()) == (3, ["thread", "registered"]), ran.stderr


@pytest.mark.parametrize("first", ["run", "list", "-V", "--version"])
def test_a_command_without_a_recipe_reads_no_schema(first: str) -> None:
    code = "import sys; from optim.cli.app import program; app = program(sys.argv[1]); "
    code += "assert 'pydantic' not in sys.modules; print(len(app.registered_groups))"
    ran = subprocess.run([sys.executable, "-c", code, first], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert len(program("quantize").registered_groups) > int(ran.stdout)


def test_threads_that_wait_sleep_in_every_command() -> None:
    code = "import os, sys; sys.argv = ['optim', '--version']; import optim.cli; optim.cli.main(); "
    code += "assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    free = {key: value for key, value in os.environ.items() if not key.startswith(("OMP", "GOMP"))}
    done = subprocess.run([sys.executable, "-c", code], env=free, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["PASSIVE"], done.stderr
    kept = subprocess.run(
        [sys.executable, "-c", code],
        env=free | {"OMP_WAIT_POLICY": "ACTIVE"},
        capture_output=True,
        text=True,
    )
    assert kept.stdout.splitlines()[-1:] == ["ACTIVE"]
