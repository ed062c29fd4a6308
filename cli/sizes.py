"""The size table: what the plan, the report and `optim inspect` show of a model."""

from collections.abc import Iterable, Mapping
from typing import Any

from optim.cli import ui


def show(groups: Iterable[Mapping[str, Any]]) -> None:
    """Print rows with the keys group, format, tensors, params and nbytes, and their total."""
    rows = list(groups)
    total = {key: sum(row[key] for row in rows) for key in ("tensors", "params", "nbytes")}
    cells = [_cells(row) for row in [*rows, {"group": "total", "format": "", **total}]]
    ui.table(("group", "format", "tensors", "params", "bits/w", "size"), cells, left=2)


def _cells(row: Mapping[str, Any]) -> list[str]:
    bits = 8 * row["nbytes"] / row["params"] if row["params"] else 0.0
    return [
        row["group"],
        row["format"],
        str(row["tensors"]),
        ui.count(row["params"]),
        f"{bits:.2f}",
        ui.size(row["nbytes"]),
    ]
