"""What the commands that compress share: a recipe from flags, then its plan shown, or the work."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from optim.cli import ui
from optim.cli.options import How
from optim.cli.push import agree, send
from optim.recipes.build import build_recipe, to_yaml
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.meetings import sections
from optim.recipes.schema import Recipe

if TYPE_CHECKING:
    from optim.runtime.storage.workspace import Prove

GOES_ON = "the same command goes on where it was"


class Facts(Protocol):
    """A plan or a report."""

    def as_dict(self) -> dict[str, Any]: ...


class Work(Protocol):
    """What a command does: `step` hears how far it is, `prove` measures the finished artifact."""

    def __call__(self, step: ui.Step, /, *, prove: "Prove | None") -> Facts: ...


def recipe_of(
    command: str, file_or_name: str | None, keys: dict[str, Any], sets: Sequence[str], how: How
) -> Recipe | None:
    """The recipe of a command line; None if it was only to be printed.

    Raises OptimError (2) for a recipe that is wrong, or names no model.
    """
    from optim.runtime.system.torchrun import leads

    recipe = build_recipe(file_or_name, keys, list(sets))
    if how.print_recipe:
        ui.say(to_yaml(recipe).rstrip("\n"))
        return None
    if recipe.model is None:
        words = "apply RECIPE" if command == "apply" else command
        raise OptimError("no model is given", f"optim {words} MODEL; `demo` is one", USAGE)
    there = sections(recipe)[0]
    if command not in ("apply", *sections(recipe)):
        what = f"the recipe has no section {command}"
        raise OptimError(what, f"`optim {there}` runs it", USAGE)
    ui.notes.quiet = how.quiet or not leads()
    return recipe


def only_planned(plan: dict[str, Any], how: How, show: Callable[[dict[str, Any]], None]) -> bool:
    """Print what would be done, and what it would replace, if nothing more is asked for."""
    from optim.runtime.system.output import contents

    output = Path(plan["output"])
    plan |= {"replaces": contents(output) if output.exists() else None}
    if how.dry_run and how.json:
        ui.emit(plan)
    elif how.dry_run:
        show(plan)
        for text in plan["notes"]:
            ui.note(text)
        ui.note(f"nothing was written; the output would be {plan['output']}")
        if plan["replaces"]:
            ui.note(f"it would replace what is there: {plan['replaces']}")
    return how.dry_run


def carry_out(
    title: str,
    work: Work,
    how: How,
    facts: Callable[[dict[str, Any]], list[str]],
    when_stopped: str = GOES_ON,
    against: str | None = None,
) -> None:
    """Do the work under a progress bar, and say in one line what came out.

    What changes a model is measured `against` it; None where every byte is proven already.
    """
    if how.push is not None:
        agree(how.push, how.yes, "the result")
    proof: dict[str, Any] = {}
    with ExitStack() as bar:
        prove = prover(against, how, bar, proof)
        try:
            step = bar.enter_context(ui.progress(title))
            report = work(step, prove=prove).as_dict() | proof
        except KeyboardInterrupt:
            ui.note(f"stopped; {when_stopped}")
            raise
    for text in report["notes"]:
        ui.note(text)
    if how.json:
        ui.emit(report)
    line = [report["output"], *facts(report)]
    ui.done(" · ".join(line), following=following(report["output"]))
    if how.push is not None:
        send(report["output"], how.push)


def following(model: str) -> str | None:
    """What to type next: run it. None, after a line that says why, where `optim run` refuses it."""
    from optim.runtime.engine.load import why_not

    if (why := why_not(model)) is None:
        return shlex.join(["optim", "run", model])
    ui.note(f"`optim run` refuses it: {why}")
    return None


def prover(against: str | None, how: How, bar: ExitStack, report: dict[str, Any]) -> "Prove | None":
    """What measures a finished artifact, after `bar` is gone, and puts that into `report` too."""
    if against is None or how.no_eval:
        return None

    def measure(folder: Path) -> dict[str, Any] | None:
        bar.close()
        found = _prove(folder, against, how)
        report.setdefault("evaluation", found)  # an artifact's, where its export is measured too
        return found

    return measure


def _prove(folder: Path, against: str, how: How) -> dict[str, Any] | None:
    """Measure a finished artifact, which has no name yet, and say what it cost.

    None where that cannot be measured. Stopped here, the same command measures again.
    """
    from optim.runtime.measure.proof import prove as measure

    try:
        with ui.progress("measuring") as step:
            found = measure(
                folder,
                against,
                step,
                device=how.device,
                threads=how.threads,
                trust_remote_code=how.trust_remote_code,
            )
    except KeyboardInterrupt:
        ui.note("all is done but the measuring: with --no-eval the same command leaves that out")
        raise
    except OptimError as problem:
        ui.note(f"not measured: {problem.message}")
        return None
    ui.note(in_a_line(found))
    return found


def in_a_line(found: dict[str, Any]) -> str:
    """A comparison with the original, in one line."""
    error = "" if found.get("kl_error") is None else f" ± {found['kl_error']:.4f}"
    return " · ".join(
        (
            f"perplexity {found['base_perplexity']:.3f} -> {found['perplexity']:.3f}"
            f" ({found['ppl_ratio'] - 1:+.2%})",
            f"KL {found['kl']:.4f}{error}",
            f"same likeliest token {found['same_top']:.1%}",
            f"{found['windows']} x {found['window']} tokens of {found['text']}",
        )
    )
