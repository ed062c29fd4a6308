"""`optim list`, `pull` and `rm`: the models that were fetched, and what room they take."""

from optim.cli import ui
from optim.cli.compress import following
from optim.cli.defaults import aliases
from optim.recipes.errors import USAGE, OptimError


def list_models(*, as_json: bool) -> None:
    """Print what is in the caches: the demo, and models of the hub; then the user's names."""
    from optim.runtime.storage.demo import kept_demo
    from optim.runtime.storage.hub import cached

    demo, names = kept_demo(), aliases()
    rows: list[tuple[str, list[str], int, str]] = []
    if demo is not None:
        rows.append(("demo", [], demo.stat().st_size, str(demo)))
    rows += [(m.name, list(m.revisions), m.nbytes, str(m.folder)) for m in cached()]
    if as_json:
        keys = ("model", "revisions", "bytes", "path", "aliases")
        own = [[name for name, model in names.items() if model == row[0]] for row in rows]
        ui.emit([dict(zip(keys, (*row, a), strict=True)) for row, a in zip(rows, own, strict=True)])
        return
    if rows:
        shown = [
            (name, "; ".join(revisions), ui.size(nbytes)) for name, revisions, nbytes, _ in rows
        ]
        ui.table(("model", "revisions", "size"), shown, left=2)
    else:
        ui.note("nothing is in the cache; `optim pull demo` fetches a model")
    if names:
        ui.table(("your name", "stands for"), list(names.items()), left=2)


def pull(model: str, revision: str | None, *, quiet: bool) -> None:
    """Fetch a model of the hub, or the demo, and print the folder or file it is in."""
    ui.notes.quiet = quiet
    if model == "demo":
        from optim.runtime.storage.demo import demo_file

        ui.say(str(demo_file()))
    else:
        from optim.runtime.storage.hub import fetch

        name, wanted = _split(model, revision)
        ui.say(str(fetch(name, wanted)))
        model = f"{name}@{wanted}" if wanted else name
    ui.done(f"{model} is in the cache", following=following(model))


def remove(model: str, *, as_json: bool) -> None:
    """Remove a model, or one revision of it, from the cache."""
    if model == "demo":
        from optim.runtime.storage.demo import forget_demo

        freed = forget_demo()
    else:
        from optim.runtime.storage.hub import remove

        freed = remove(*_split(model, None))
    if as_json:
        ui.emit({"model": model, "freed_bytes": freed})
    else:
        ui.done(f"{model} is removed: {ui.size(freed)} are free again")


def _split(model: str, revision: str | None) -> tuple[str, str | None]:
    """A hub id and the revision that is wanted; OptimError (2) if it is none."""
    from optim.runtime.storage.hub import HUB_ID

    name, _, wanted = model.partition("@")
    if not HUB_ID.fullmatch(name):
        raise OptimError(f"{model} is no hub id", "give owner/name, or `demo`", USAGE)
    return name, revision or wanted or None
