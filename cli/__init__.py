"""The command line: `main` is the boundary that every error passes.

Exit codes: 0 done, 1 explained failure, 2 bad usage, recipe or input, 3 a check did not hold,
4 this machine lacks something, 130 Ctrl-C. `OPTIM_DEBUG=1` shows the traceback of any error.
"""

import atexit
import errno
import os
import sys
import threading
from typing import NoReturn

from optim.recipes.errors import MACHINE, OptimError

INTERRUPTED = 130
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}
"""How OpenMP's threads wait: they sleep after a fraction of a millisecond, longer than from one
piece of a step to the next. Where cores are shared, a thread that spins takes the time that the one
it waits for needs. OpenMP reads this when torch is imported."""


def command() -> NoReturn:
    """The program: `main`, and out. Python would first take torch apart for a third of a second."""
    code = main()
    threading._shutdown()  # type: ignore[attr-defined]  # what Python does at its end
    atexit._run_exitfuncs()
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except BrokenPipeError:
        code = _reader_left()
    except OSError as problem:
        code = _explain(problem)
    os._exit(code)


def main() -> int:
    """Run the command of `sys.argv`; returns the exit code."""
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first == "run":
        from optim.runtime.system.torch_import import map_library

        map_library()
    from optim.cli.app import program
    from optim.cli.defaults import defaults

    try:
        app = program(first)
        made = defaults(app)
        app(prog_name="optim", **({"default_map": made} if made else {}))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return _reader_left()
    except Exception as problem:
        return _explain(problem)
    return 0


def _explain(problem: Exception) -> int:
    """Show any exception as an error with its fix; the traceback only where it was asked for."""
    from optim.cli import ui

    if os.environ.get("OPTIM_DEBUG", "") not in ("", "0"):
        import traceback

        traceback.print_exception(problem)
    known = problem if isinstance(problem, OptimError) else _translate(problem)
    ui.error(known)
    return known.code


def _translate(problem: Exception) -> OptimError:
    """Say in plain words what Python or torch raised; torch is not imported for it."""
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({problem.filename})" if problem.filename else ""
        return OptimError(f"the disk is full{where}", "free some space, or use -o", MACHINE)
    if isinstance(problem, OSError) and problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        where = problem.filename or "a file"
        fix = "allow it, or choose another place: -o/--output, HF_HOME, XDG_CACHE_HOME"
        return OptimError(f"Cannot write to {where}, or read it: {problem.strerror}", fix, MACHINE)
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        fix = "close other programs, or use a smaller model or `--device cpu`"
        return OptimError("there is not enough memory", fix, MACHINE)
    text = " ".join(str(problem).split()) or "no message"
    short = text if len(text) <= 300 else text[:300] + "..."
    return OptimError(
        f"unexpected {type(problem).__name__}: {short}",
        fix="this is a bug in optim; OPTIM_DEBUG=1 shows where",
    )


def _reader_left() -> int:
    """`optim ... | head`: leave without a word, also when Python flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
