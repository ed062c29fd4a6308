"""`optim plan`: a width for each linear that meets a budget, as a recipe."""

from pathlib import Path
from typing import Any

from optim.cli import ui
from optim.cli.options import Planning
from optim.cli.plots import axes_for
from optim.recipes.build import build_recipe, to_yaml
from optim.recipes.errors import USAGE, OptimError
from optim.recipes.units import parse_size

METHODS = ("awq", "gptq", "rtn")
COLUMNS = (("bits", 2), ("predicted", 4), ("kl", 4))


def plan(model: str, output: str | None, asked: Planning) -> None:
    """Measure what each width of each linear costs, choose, and write the recipe."""
    given = (asked.fit, asked.bits, asked.max_kl, asked.device)
    if sum(value is not None for value in given) != 1:
        fix = "one of --fit 6GB, --bits 3.5, --max-kl 0.05, --device 24GB"
        raise OptimError("a plan needs one budget", fix, USAGE)
    if asked.method not in METHODS:
        fix = f"one of {', '.join(METHODS)}"
        raise OptimError(f"--method {asked.method} has one width for all", fix, USAGE)
    ui.notes.quiet = asked.quiet
    place = Path(output or f"./{Path(model).stem}-plan.yaml")
    if place.exists() and not asked.force:
        raise OptimError(f"{place} exists", "choose another -o/--output, or --force", USAGE)
    if not place.absolute().parent.is_dir():
        raise OptimError(f"{place.parent} is no folder", "choose another -o/--output", USAGE)
    keys = {
        "quantize.method": asked.method,
        "quantize.group_size": asked.group_size,
        "calibration.dataset": asked.calibration,
        "calibration.num_samples": asked.num_samples,
        "calibration.seq_len": asked.seq_len,
        "calibration.seed": asked.seed,
    }
    text = build_recipe(None, keys).calibration
    draw = None if asked.plot is None else axes_for(asked.plot)
    from optim.quant.mixed.run import Budget, Form, make
    from optim.runtime.system.files import replace_text

    if asked.threads:
        import torch

        torch.set_num_threads(asked.threads)
    widths = _widths(asked.widths)
    kind = (asked.method, asked.group_size, asked.sym, widths)
    form = Form(*kind, apart=asked.apart, lossless=asked.lossless)
    budget = Budget(_bytes(model, asked), asked.bits, asked.max_kl)
    try:
        with ui.progress("plan") as step:
            (made,) = make(model, text, form, [budget], step)
    except KeyboardInterrupt:
        ui.note("stopped; nothing was written, and the same command begins anew")
        raise
    replace_text(place, to_yaml(made.recipe))
    if asked.json:
        ui.emit(made.as_dict() | {"output": str(place)})
    else:
        _show(made.as_dict())
    if draw is not None:
        _plot(draw, made)
    ui.done(f"{place}", following=f"optim apply {place}")


def _widths(text: str) -> tuple[int, ...]:
    known = {str(bits): bits for bits in (2, 3, 4, 8)}
    parts = text.replace(" ", "").split(",")
    if not set(parts) <= known.keys():
        raise OptimError(f"--widths {text}: must be some of 2, 3, 4, 8", "--widths 3,4,8", USAGE)
    return tuple(sorted({known[part] for part in parts}))


def _bytes(model: str, asked: Planning) -> int | None:
    """The bytes that weights may take."""
    if asked.fit is not None:
        return parse_size(asked.fit, "--fit")
    if asked.device is None:
        return None
    from optim.quant.mixed.context import context_bytes

    whole = parse_size(asked.device, "--device")
    taken = context_bytes(model, asked.context)
    if taken >= whole:
        what = f"a text of {asked.context:,} tokens alone takes {ui.size(taken)}"
        raise OptimError(what, "a larger --device, or a shorter --context", USAGE)
    ui.note(f"{ui.size(taken)} of {ui.size(whole)} are for {asked.context:,} tokens of context")
    return whole - taken


def _show(made: dict[str, Any]) -> None:
    kinds = made["widths"]
    widths = next(iter(kinds.values()))
    heads = ("linears", *("plain" if w == 16 else f"{w} bits" for w in widths))
    ui.table(heads, [(kind, *map(str, row.values())) for kind, row in kinds.items()])
    rows = [
        (p["name"], ui.size(p["nbytes"]), *(f"{p[k]:.{n}f}" for k, n in COLUMNS))
        for p in [*made["uniform"], made["chosen"]]
    ]
    ui.table(("stored", "size", "bits/w", "added up", "KL"), rows)
    ui.say("KL: nats a token, of linears solved one by one on little text; the recipe does better")


def _plot(draw: Any, made: Any) -> None:
    axes, save = draw("bytes of weights, MB", "KL from the original, nats a token")
    curve = [(nbytes / 1e6, kl) for nbytes, kl in made.curve if kl > 0]
    axes.plot(*zip(*curve, strict=True), label="best widths, added up")
    for point in (*made.uniform, made.chosen):
        axes.plot(point.nbytes / 1e6, point.kl, "o")
        place = (point.nbytes / 1e6, point.kl)
        axes.annotate(point.name, place, xytext=(6, 6), textcoords="offset points")
    axes.set_yscale("log")
    axes.legend()
    save()
