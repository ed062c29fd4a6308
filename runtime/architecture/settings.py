"""What transformers' class makes of a configuration, kept in the cache folder.

Importing the class takes a second or two, at each start. For a family of the table only its values
are asked for, so they are written down once for each configuration and version of transformers.
Scaled rotary embeddings take their formulas from transformers and need the object itself.
"""

import importlib.metadata
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from optim.recipes.errors import OptimError
from optim.runtime.architecture.config import read_config
from optim.runtime.architecture.table import FAMILIES
from optim.runtime.system.files import load_json, replace_text
from optim.runtime.system.hashes import text_sha256
from optim.runtime.system.paths import cache_folder

LAYOUT = "2"  # of a kept file; another number makes all of them anew
NOT_VALUES = ("id2label", "label2id", "dtype", "ignore_keys_at_rope_validation")
"""What JSON cannot hold, and nobody asks for."""
KINDS = "nested_rope_parameter_keys"


class Settings:
    """The values of a transformers configuration object, under its names."""

    def __init__(self, values: dict[str, Any]) -> None:
        kinds = values.pop(KINDS)
        self.__dict__.update(values)
        self.nested_rope_parameter_keys = lambda _parameters: kinds


def read_settings(config: dict[str, Any], source: str) -> Any:
    """`read_config` of a family of the table, or its values if they were kept.

    Raises OptimError (2) as `read_config` does.
    """
    place = _place(config)
    with suppress(OptimError, KeyError, AttributeError):
        return Settings(load_json(place))
    made = read_config(config, source)
    if made.model_type in FAMILIES and _unscaled(made) and (text := text_of(made)) is not None:
        with suppress(OptimError, OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            replace_text(place, text)
    return made


def text_of(config: Any) -> str | None:
    """What a configuration object answers, as JSON; None if JSON would change an answer."""
    names = {*vars(config), *config.attribute_map, "model_type"} - {*NOT_VALUES}
    found = {name: getattr(config, name) for name in names}
    found[KINDS] = config.nested_rope_parameter_keys(_rotary(config))
    try:
        text = json.dumps(found)
        return text if json.loads(text) == found else None
    except (TypeError, ValueError, RecursionError):
        return None


def _place(config: dict[str, Any]) -> Path:
    facts = LAYOUT, importlib.metadata.version("transformers"), json.dumps(config, sort_keys=True)
    name = text_sha256("\0".join(facts))
    return cache_folder() / "settings" / f"{name[:32]}.json"


def _rotary(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _unscaled(config: Any) -> bool:
    """Whether all rotary embeddings are plain ones."""
    rotary = _rotary(config)
    kinds = config.nested_rope_parameter_keys(rotary)
    parts = [rotary[kind] for kind in kinds] if kinds else [rotary]
    return all(isinstance(p, dict) and p.get("rope_type", "default") == "default" for p in parts)
