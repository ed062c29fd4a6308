"""`optim prune -m prosparse`: the plan, the training as it goes on, what came out."""

import os
from dataclasses import replace
from typing import Any

from optim.cli import prune_prosparse as training
from optim.cli import ui
from optim.cli.compress import How, only_planned
from optim.recipes.schema import Recipe


def work(recipe: Recipe, how: How) -> None:
    """Plan, train and write; all processes of torchrun do this, the first one speaks."""
    ui.notes.quiet = how.quiet or os.environ.get("RANK", "0") != "0"
    from optim.prune import plan
    from optim.prune.prosparse import run as prosparse

    made = plan.plan(recipe, **replace(how, device=_own_device(how.device)).given)
    prosparse.check(made)
    if only_planned(made.as_dict() | prosparse.needs(made), how, show_plan):
        return
    try:
        with training.watch("prosparse") as (report, progress):
            outcome = prosparse.prune(made, report, progress)
    except KeyboardInterrupt:
        ui.note("stopped; the same command goes on from the last saved state")
        raise
    if os.environ.get("RANK", "0") == "0":
        show(outcome.as_dict(), recipe.model or "", how.as_json)


def _own_device(asked: str) -> str:
    """Under torchrun each process has its own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or asked not in ("auto", "cuda"):
        return asked
    import torch

    return f"cuda:{rank}" if torch.cuda.is_available() else asked


def show_plan(plan: dict[str, Any]) -> None:
    """Print what would be done."""
    section = plan["recipe"]["prune"]
    length = plan["recipe"]["calibration"]["seq_len"]
    tokens = section["steps"] * section["batch"] * length
    ui.say(f"{plan['model']} · {plan['blocks']} blocks of {plan['neurons']} neurons")
    ui.say(f"text {plan['calibration']}")
    ui.say(f"{section['steps']} steps of {section['batch']} windows: {ui.count(tokens)} tokens")
    stages = " -> ".join(f"{peak:g}" for peak in section["l1"]) or "none"
    ui.say(f"ReLU over {100 * section['substitution']:.0f} % of the steps, then lambda {stages}")
    ui.say(f"trained: {section['train']}")
    ui.say(f"memory about {ui.size(plan['memory'])} · disk {ui.size(plan['disk'])}")


def show(outcome: dict[str, Any], source: str, as_json: bool) -> None:
    """Say what came out."""
    for text in outcome["notes"]:
        ui.note(text)
    if as_json:
        ui.emit(outcome)
        return
    found = outcome["held_back"]
    rows = [
        ("perplexity", f"{found['perplexity']:.3f}", f"{found['base_perplexity']:.3f}"),
        ("ratio", f"{found['ppl_ratio']:.3f}", "1"),
        ("zeros in gate * up", f"{100 * found['sparsity']:.1f} %", "0 %"),
    ]
    ui.table(("on held-back text", "sparse", source), rows)
    facts = [outcome["output"], f"{outcome['steps']} steps", ui.seconds(outcome["seconds"])]
    ui.done(" · ".join(facts), following=f"optim prune {outcome['output']} -m relu-exact")
