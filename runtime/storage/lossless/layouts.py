"""The layouts by the name that a recipe gives them (`Pack.layout` of recipes/schema.py)."""

from collections.abc import Mapping
from typing import Any

from optim.runtime.storage.lossless.bf12 import Bf12
from optim.runtime.storage.lossless.dfloat11 import Dfloat11
from optim.runtime.storage.lossless.layout import Layout

LAYOUTS: dict[str, Layout] = {"df11": Dfloat11(), "bf12": Bf12()}


def layout_of(config: Mapping[str, Any]) -> str | None:
    """The layout that config.json names; None where the weights are not packed."""
    named = (name for name, row in LAYOUTS.items() if isinstance(config.get(row.key), dict))
    return next(named, None)


def without_layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as it was before the weights were packed."""
    keys = {row.key for row in LAYOUTS.values()}
    return {key: value for key, value in config.items() if key not in keys}
