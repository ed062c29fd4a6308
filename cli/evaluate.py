"""`optim eval`: perplexity, and the divergence from the original."""

from typing import Any

from optim.cli import ui
from optim.cli.options import Evaluating
from optim.recipes.errors import CHECK_FAILED, USAGE, OptimError


def evaluate(source: str, asked: Evaluating) -> None:
    """Measure, print, and raise OptimError (3) if perplexity rose by more than was allowed."""
    if asked.max_ppl_increase is not None and asked.against is None:
        fix = "add --against BASE, the model it was made from"
        raise OptimError("--max-ppl-increase needs a model to compare with", fix, USAGE)
    ui.notes.quiet = asked.quiet
    from optim.runtime.measure.quality import evaluate as measure
    from optim.runtime.storage.record import record, recordable

    folder = recordable(source) if asked.record else None
    with ui.progress("eval") as step:
        found = measure(
            source,
            against=asked.against,
            text=asked.text,
            text_column=asked.text_column,
            window=asked.window,
            max_windows=asked.max_windows,
            device=asked.device,
            threads=asked.threads,
            progress=step,
        ).as_dict()
    if folder is not None:
        record(folder, {"text": asked.text, "against": asked.against, **found})
    if asked.json:
        ui.emit(found)
    else:
        _show(source, asked, found)
    if asked.max_ppl_increase is not None:
        _hold(found["ppl_ratio"] - 1, asked.max_ppl_increase)


def _hold(increase: float, allowed: float) -> None:
    # Written so that an increase that is not a number fails too.
    if not increase <= allowed:
        message = f"perplexity rose by {increase:.2%}, more than the {allowed:.2%} allowed"
        raise OptimError(message, "try more bits or a smaller group", CHECK_FAILED)


def _show(source: str, asked: Evaluating, found: dict[str, Any]) -> None:
    rows = [(source, f"{found['perplexity']:.3f}", "", "")]
    if asked.against is not None:
        kl = f"{found['kl']:.4f}{_error(found['kl_error'])}"
        rows = [
            (f"{asked.against} (base)", f"{found['base_perplexity']:.3f}", "", ""),
            (source, f"{found['perplexity']:.3f}", f"{found['ppl_ratio'] - 1:+.2%}", kl),
        ]
    ui.table(("model", "perplexity", "change", "KL"), rows)
    if asked.against is not None:
        change = f"{found['delta_nll']:+.4f}{_error(found['delta_nll_error'])}"
        ui.say(f"nll a token {change} · same likeliest token {found['same_top']:.1%}")
    after = f", each after BOS ({', '.join(map(str, found['begin']))})" if found["begin"] else ""
    plural = "s" * (found["windows"] != 1)
    ui.say(f"{found['windows']} window{plural} of {asked.window} tokens from {asked.text}{after}")
    if found.get("skipped"):
        _show_skipped(found)


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.4f}"


SITES = {"qkv": "qkv", "out": "out", "up": "up", "rows": "up rows", "down": "down", "core": "core"}


def _show_skipped(found: dict[str, Any]) -> None:
    """What a sparse model left out: of each block, a token and in 8 tokens alike."""
    blocks = found["skipped"]
    sites = [site for site in SITES if site in blocks[0]["token"]]
    rows = [(str(i), *(_skip(block, site) for site in sites)) for i, block in enumerate(blocks)]
    ui.say(f"\nskipped by each block: of a token (of 8 tokens alike); the first {found['prompt']}")
    ui.say("tokens of a window are its prompt, read densely and not measured")
    ui.table(("block", *(SITES[site] for site in sites)), rows)
    ui.say(f"a token reads {found['read']:.1%} of the blocks' weights")


def _skip(block: dict[str, Any], site: str) -> str:
    return f"{block['token'][site]:.0%} ({block['chunk'][site]:.0%})"
