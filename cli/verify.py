"""`optim verify`: every number that an artifact states, measured again."""

from typing import Any

from optim.cli import ui
from optim.cli.options import Common
from optim.recipes.errors import CHECK_FAILED, OptimError

MARKS = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}


def verify(source: str, against: str | None, common: Common) -> None:
    """Print each number, what was found and whether it holds; OptimError (3) if one does not."""
    ui.notes.quiet = common.quiet
    from optim.runtime.measure.claims import claims

    with ui.progress("verify") as step:
        found = claims(source, against, device=common.device, threads=common.threads, progress=step)
    wrong = [claim.name for claim in found if claim.holds is False]
    if common.json:
        ui.emit({"holds": not wrong, "claims": [claim.as_dict() for claim in found]})
    else:
        rows = [(c.name, MARKS[c.holds], _short(c.stated), _short(c.found)) for c in found]
        ui.table(("number", "verdict", "stated", "found"), rows, left=2)
        for why in dict.fromkeys(claim.why for claim in found if claim.why):
            ui.note(f"not measured: {why}")
    if wrong:
        what = f"{source}: {len(wrong)} of {len(found)} numbers do not hold ({', '.join(wrong)})"
        fix = "fetch it again, or make it again; --against must name the model it was made from"
        raise OptimError(what, fix, CHECK_FAILED)


def _short(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…" if " " not in text else text
