"""`--push REPO` and `optim push`: what was made goes to a repository of the hub, if one agrees."""

import sys
from pathlib import Path

from optim.cli import ui
from optim.recipes.errors import USAGE, OptimError


def push(place: str, repo: str, *, yes: bool, quiet: bool) -> None:
    """Ask, and send a finished artifact or GGUF file."""
    ui.notes.quiet = quiet
    from optim.runtime.storage.hub import pushed_files
    from optim.runtime.system.output import MANIFEST

    files = pushed_files(Path(place))
    if not files:
        fix = f"a folder that optim has made, with its {MANIFEST}, or a .gguf file"
        raise OptimError(f"{place} is nothing that is pushed", fix, USAGE)
    agree(repo, yes, f"{ui.size(sum(file.stat().st_size for file in files))} of {place}")
    send(place, repo)


def agree(repo: str, yes: bool, what: str) -> None:
    """Ask whether `what` is to be sent; OptimError (2) where nobody says yes, or `repo` is none."""
    from optim.runtime.storage.hub import HUB_ID

    if not HUB_ID.fullmatch(repo):
        raise OptimError(f"{repo} is no repository of the hub", "--push OWNER/NAME", USAGE)
    if yes:
        return
    if not sys.stdin.isatty():
        raise OptimError(f"nobody is asked whether {repo} may be written", "add --yes", USAGE)
    question = f"send {what} to {repo}? A new repository is private. [y/N] "
    print(ui.plain(question), end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise OptimError("nothing was sent", "answer y, or add --yes", USAGE)


def send(place: str, repo: str) -> None:
    """Send it, and say where it is."""
    from optim.runtime.storage.hub import push as upload

    ui.note(f"sending {place} to {repo}")
    ui.done(upload(Path(place), repo), following=f"optim run {repo}")
