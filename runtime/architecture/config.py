"""The configuration of a text model, as its class in transformers understands it.

A `config.json` leaves out what its class fills in, says null where the class means a value of its
own, and spells one fact in several ways. The class knows all that, so it is asked; what it cannot
be trusted with (a number of layers that no memory holds) is looked at before.
"""

import math
import re
from typing import TYPE_CHECKING, Any

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.table import FAMILIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

COUNTED = re.compile(r"(num|n)_(\w+_)?(layers?|labels|experts?|heads|blocks)|\w*layers?|depth")
MOST = 1 << 16  # of anything that is counted: layers, heads, experts
CHECK = "check the file against the one the model was published with"
FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's own dict: `config["text_config"]` of a composed model, else `config`."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def needs_remote_code(config: dict[str, Any]) -> bool:
    """Whether transformers itself does not know this model type, but the repository has code."""
    if "auto_map" not in config:
        return False
    from transformers import CONFIG_MAPPING

    return config.get("model_type") not in CONFIG_MAPPING


def read_config(config: dict[str, Any], source: str) -> "PretrainedConfig":
    """transformers' configuration object of the text model in `config`.

    A composed model says on top whether its text model ties head and embeddings. Raises OptimError
    (2) for a model type that transformers does not know, or values that its class refuses.
    """
    _check_counts(config)
    given = _decoded({key: value for key, value in config.items() if key not in _OURS})
    try:
        made = _class_of(given)(**given)
        text: PretrainedConfig = made.get_text_config(decoder=True)
        if text is not made and hasattr(made, "tie_word_embeddings"):
            text.tie_word_embeddings = made.tie_word_embeddings
    except Exception as error:  # transformers raises nearly anything on a wrong configuration
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise OptimError(
            f"transformers cannot use the configuration of {source}: {reason}",
            "check model_type and values in config.json, or install a newer transformers",
            USAGE,
        ) from None
    return text


# Ours to handle, or none of a configuration's business: how attention is computed, foreign code.
_OURS = ("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation")


def _class_of(config: dict[str, Any]) -> Any:
    """The configuration class; those of the table are imported alone, the others by their list."""
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns of what it mends
    name = config.pop("model_type", None)
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is not None:
        return getattr(transformers, family.decoder.config_class)
    if name not in transformers.CONFIG_MAPPING:
        raise ValueError(f"model_type {name!r} is not known")
    return transformers.CONFIG_MAPPING[name]


def _decoded(value: Any) -> Any:
    """transformers writes infinity, which JSON lacks, as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in FLOATS:
            return FLOATS[value["__float__"]]
        return {key: _decoded(entry) for key, entry in value.items()}
    return [_decoded(entry) for entry in value] if isinstance(value, list) else value


def _check_counts(config: dict[str, Any]) -> None:
    """Refuse counts that would fill the memory: a class makes lists of them."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value)
        elif COUNTED.fullmatch(key) and isinstance(value, int | float) and not value <= MOST:
            raise OptimError(f"config.json: {key} is {value:.6g}", CHECK, USAGE)
