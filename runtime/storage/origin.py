"""Where a model comes from, as far as its files say: the hub's name, the licence, the languages.

The front matter of a model card may come from anyone. What does not look like what it must be is
left out, since it goes into a card of ours.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.hub import HUB_ID

CARD = "README.md"
MOST = 16 * 2**10  # bytes of a card that are looked at
LICENCE = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}")
LANGUAGE = re.compile(r"[A-Za-z][A-Za-z-]{1,15}")


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of the base model; None and nothing where its files do not say."""

    hub: str | None = None
    licence: str | None = None
    languages: tuple[str, ...] = ()


DEMO = Origin("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", ("en",))


def origin_of(checkpoint: Checkpoint) -> Origin:
    """Of a model of the hub its name there, else the base model that its own card names."""
    if checkpoint.source == "demo":
        return DEMO
    card = _front_matter(checkpoint)
    name = checkpoint.source.partition("@")[0]
    fetched = checkpoint.folder.parent.name == "snapshots" and HUB_ID.fullmatch(name)
    return Origin(
        name if fetched else next(_those(HUB_ID, card.get("base_model")), None),
        next(_those(LICENCE, card.get("license")), None),
        tuple(_those(LANGUAGE, card.get("language"))),
    )


def _front_matter(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        with (checkpoint.folder / CARD).open("rb") as file:
            text = file.read(MOST).decode("utf-8", "replace").replace("\r\n", "\n")
        begin, _, rest = text.partition("---\n")
        # BaseLoader makes only strings: the language `no` is no boolean.
        found = None if begin.strip() else yaml.load(rest.partition("\n---")[0], yaml.BaseLoader)
    except (OSError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _those(form: re.Pattern[str], value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    return (text for text in values[:20] if isinstance(text, str) and form.fullmatch(text))
