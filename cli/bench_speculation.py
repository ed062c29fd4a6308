"""`optim bench --speculate` and `--draft`: what guessing ahead gains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optim.cli import ui
from optim.recipes.errors import USAGE, OptimError

if TYPE_CHECKING:
    from optim.cli.options import Timing


def bench(source: str, asked: Timing) -> None:
    """Answer prompts of our own with and without guesses, in turns; print the table.

    Raises OptimError (2) for flags that do not go together, and as `Session` does.
    """
    ui.notes.quiet = asked.quiet
    if asked.against or asked.peer or asked.batch != 1:
        fix = "leave --against, --peer and --batch out"
        raise OptimError("guesses are measured beside the same model without", fix, USAGE)
    from optim.runtime.cache.full import Policy
    from optim.runtime.engine.drafts import lookup
    from optim.runtime.engine.load import load_model
    from optim.runtime.measure.speculation import speculation

    lookup(asked.speculate)
    always = {"policy": Policy(asked.kv_bits, asked.kv_policy), "context": asked.context}
    form: Any = "exact" if asked.exact else "planes"
    threads = asked.threads or 1
    with ui.progress("bench") as told:
        told(0, 1, f"loading {source}")
        model = load_model(source, device=asked.device, threads=threads, form=form)
        ways: dict[str, Any] = {"plain": {**always, "speculate": "off"}}
        if asked.speculate != "off":
            ways[f"look-up, {asked.speculate}"] = {**always, "speculate": asked.speculate}
        if asked.draft is not None:
            told(0, 1, f"loading {asked.draft}")
            draft = load_model(asked.draft, device=asked.device, threads=threads)
            ways[f"draft {draft.checkpoint.name}"] = {**always, "draft": draft}
        rows = list(speculation(model, ways, asked.new_tokens, asked.repeat, told))
    if asked.json:
        ui.emit({"source": source, "place": model.place, "rows": rows})
        return
    names = list(ways)
    heads = ("prompts", "temperature", "plain tok/s", *names[1:])
    ui.table(heads, [_cells(row, names) for row in rows])
    ui.say(f"{model.checkpoint.name}: {model.place} · {asked.new_tokens} tokens a reply")
    ui.say("gain over plain, guesses that were right, replies that are the plain ones; CPU seconds")


def _cells(row: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    plain, *others = (row["ways"][name] for name in names)
    return (
        row["prompts"],
        f"{row['temperature']:g}",
        f"{plain['tokens_per_second']:.1f}",
        *(_gain(one, row["replies"]) for one in others),
    )


def _gain(one: dict[str, Any], replies: int) -> str:
    right = "none" if one["accepted"] is None else f"{one['accepted']:.0%}"
    return f"{one['gain']:.2f}x, {right}, {one['identical']} of {replies}"
