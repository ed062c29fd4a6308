"""The model card of an artifact: what it is, how each program runs it, how to make it again.

What it cost is put in when it has been measured (record.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from optim.recipes.errors import OptimError
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.origin import Origin, origin_of
from optim.runtime.system.files import load_json

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

OPTIM = """In a terminal:

```sh
optim run {name}
```

In Python:

```python
from optim.runtime.engine.load import load_model
from optim.runtime.engine.session import Session

for piece in Session(load_model("{name}")).reply("Why is the sky blue?"):
    print(piece, end="", flush=True)
```"""
TRANSFORMERS = """With transformers{needs}:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
ids = tokenizer("The sky is blue because", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))
```"""
VLLM = """With vLLM:

```sh
vllm serve {name}
```"""
PROGRAMS = {
    "optim": OPTIM,
    "transformers": TRANSFORMERS.replace("{needs}", ""),
    "compressed-tensors": TRANSFORMERS.replace("{needs}", " and the package `compressed-tensors`"),
    "vllm": VLLM,
}
"""What runs a folder, and the lines to type; `{name}` is the folder."""


@dataclass(frozen=True, slots=True)
class Card:
    """What a command says of the folder that it wrote."""

    name: str
    about: str
    """Markdown: what it is, with its tables."""
    tags: tuple[str, ...]
    programs: Sequence[str]
    """Of PROGRAMS, those that run it."""
    remark: str
    """On programs that do not, or do with a condition; may be empty."""
    again: str
    """The command that makes it again with the recipe."""
    recipe: str
    """As YAML."""
    base: str = ""
    """What the base model is called, where that is not the name of what was read."""


def card_of(made: Card, source: Checkpoint) -> str:
    """The text of README.md for a folder that was made from `source`."""
    origin = origin_of(source)
    lines = "\n\n".join(PROGRAMS[name].replace("{name}", made.name) for name in made.programs)
    remark = f"\n\n{made.remark}" if made.remark else ""
    loads = {"transformers", "compressed-tensors"} & set(made.programs)
    return f"""{front_matter(origin, made.tags, "transformers" if loads else None)}
# {made.name}

{made.about}

{_base(made.base or source.name, origin)}

## Run it

{lines}{remark}

{_sampling(source)}

## Make it again

`{made.again}` with:

```yaml
{made.recipe.strip()}
```

`optim verify {made.name}` measures the numbers of this card again.
"""


def front_matter(origin: Origin, tags: Sequence[str], library: str | None = None) -> str:
    """What the hub reads of a card; what is not known is left out."""
    rows = {
        "base_model": origin.hub,
        "license": origin.licence,
        "language": f"[{', '.join(origin.languages)}]" if origin.languages else None,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": f"[{', '.join(tags)}]",
    }
    return "\n".join(["---", *(f"{k}: {v}" for k, v in rows.items() if v), "---", ""])


def _base(name: str, origin: Origin) -> str:
    if origin.hub:
        name = f"[{origin.hub}](https://huggingface.co/{origin.hub})"
    licence = origin.licence or "not known here: see the base model"
    known = ", ".join(origin.languages) or "not known here"
    return f"Base model: {name}. Licence: {licence}. Language: {known}."


def _sampling(source: Checkpoint) -> str:
    """The model's own settings, which `optim run` takes where no flag says otherwise."""
    try:
        given = load_json(source.folder / "generation_config.json")
    except (OptimError, OSError):
        given = {}
    found = [f"{k} {given[k]:g}" for k in SAMPLING if type(given.get(k)) in (int, float)]
    if not found:
        return "The model names no sampling settings; `optim run --help` shows the usual ones."
    return f"Sampling: {', '.join(found)}, as the model's `generation_config.json` says."
