"""A user's own defaults: ~/.config/optim/config.yaml, or the file that OPTIM_CONFIG names.

    run:
      temperature: 0.3
      threads: 4
    bench:
      repeat: 5

Options of `run`, `eval` and `bench`, as they are typed, without the dashes. What is typed goes over
them. Compression has recipes, and what replaces files or runs a model's code is typed each time.

    models:
      qwen: Qwen/Qwen3-0.6B

Names that stand for models wherever one is given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMANDS = ("run", "eval", "bench")
MODELS = "models"
NAME = re.compile(r"(?!demo$)[A-Za-z0-9][A-Za-z0-9._:-]*")
EACH_TIME = ("output", "batch", "record", "trust-remote-code", "help")
MOST_BYTES = 64 << 10
FIX = "correct that file, or set OPTIM_CONFIG= to do without it"


def config_file() -> Path | None:
    """The file of defaults; None if there is none. OPTIM_CONFIG must name one that is there."""
    named = os.environ.get("OPTIM_CONFIG")
    if named is not None:
        return Path(named).expanduser() if named else None
    base = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".config"
    file = folder / "optim" / "config.yaml"
    return file if file.exists() else None


def defaults(app: Any) -> dict[str, Any]:
    """What the file says, by command and parameter, as `app` takes its defaults.

    Raises OptimError (2) for a file that cannot be read, or names what is not there.
    """
    file = config_file()
    return {} if file is None else _checked(file, _read(file), app)


def aliases() -> dict[str, str]:
    """The user's names for models. Raises OptimError (2) for a file or a name that is none."""
    file = config_file()
    found = {} if file is None else _read(file).get(MODELS, {})
    return {} if file is None else _names(file, found)


def model(given: Any) -> Any:
    """The model, or models, that were typed: a name of the user's is what it stands for.

    A folder or file of that name goes before.
    """
    if isinstance(given, list):
        return [model(one) for one in given]
    if not isinstance(given, str) or os.path.exists(given):
        return given
    return aliases().get(given, given)


def _names(file: Path, found: Any) -> dict[str, str]:
    if not isinstance(found, dict):
        raise _refuse(file, f"{MODELS} must have names, like `{MODELS}: {{qwen: Qwen/Qwen3-0.6B}}`")
    for name, stands_for in found.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            what = "is no name: letters, digits and . _ : - make one; `demo` is taken"
            raise _refuse(file, f"{MODELS}.{name} {what}")
        if not isinstance(stands_for, str) or not stands_for:
            raise _refuse(file, f"{MODELS}.{name} must be a hub id, a folder or a file")
    return found


def _read(file: Path) -> dict[str, Any]:
    from optim.recipes.errors import USAGE, OptimError
    from optim.recipes.problems import RecipeError
    from optim.recipes.yaml_source import decode, parse_mapping

    try:
        with file.open("rb") as opened:
            text = decode(opened.read(MOST_BYTES + 1), str(file))
        blank = all(line.lstrip()[:1] in ("", "#") for line in text.splitlines())
        return {} if blank else parse_mapping(text, str(file))[0]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptimError(f"cannot read the defaults of {file}: {reason}", FIX, USAGE) from None
    except RecipeError as error:
        lines = "".join(f"\n  {problem}" for problem in error.problems)
        raise OptimError(f"{file} cannot be used{lines}", FIX, USAGE) from None
    except OptimError as error:
        raise OptimError(error.message, FIX, USAGE) from None


def _checked(file: Path, found: dict[str, Any], app: Any) -> dict[str, Any]:
    """The options of each command that is named, by the names of their parameters."""
    from typer.main import get_command

    commands: Any = getattr(get_command(app), "commands", {})
    made = {}
    _names(file, found.pop(MODELS, {}))
    for name, options in found.items():
        if name not in COMMANDS:
            what = f"{name}: defaults are for {', '.join(COMMANDS)}"
            raise _refuse(file, what, name, [*COMMANDS, MODELS])
        if not isinstance(options, dict):
            raise _refuse(file, f"{name} must have options, like `{name}: {{threads: 2}}`")
        made[name] = _options(file, name, options, commands[name])
    return made


def _options(file: Path, name: str, given: dict[str, Any], command: Any) -> dict[str, Any]:
    """The values of one command, each of a kind that its option takes."""
    options = [param for param in command.params if param.param_type_name == "option"]
    known = {_typed(option): option for option in options}
    for word in EACH_TIME:
        known.pop(word, None)
    for word, value in given.items():
        if word not in known:
            raise _refuse(file, f"{name}.{word}: unknown", word, sorted(known))
        try:
            known[word].process_value(command.context_class(command), value)
        except Exception as error:  # typer's own copy of click: its errors have no public name
            why = str(getattr(error, "message", error)).rstrip(".")
            raise _refuse(file, f"{name}.{word}: {why}") from None
    return {known[word].name: value for word, value in given.items()}


def _refuse(file: Path, what: str, word: str = "", choices: Sequence[str] = ()) -> Exception:
    from optim.recipes.errors import USAGE, OptimError
    from optim.recipes.problems import did_you_mean

    return OptimError(f"{file}: {what}{did_you_mean(word, list(choices))}", FIX, USAGE)


def _typed(param: Any) -> str:
    """An option as it is typed, without the dashes."""
    return str(next(text for text in param.opts if text.startswith("--"))).removeprefix("--")
