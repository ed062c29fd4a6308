"""Write docs/recipe.md: every key of a recipe, as the schema has it.

python docs/make_recipe_page.py
"""

from pathlib import Path

from optim.recipes.keys import READS, Key, keys

PAGE = Path(__file__).with_name("recipe.md")
HEAD = """# The keys of a recipe

A recipe is a YAML file that says what a command does; [several steps in one go](recipes.md) are one
file too. It has one section for each command, and
`calibration` for the text that is run through the model. `optim recipe show awq-w4` prints one;
`optim recipe check FILE` names everything that is wrong with one.

```yaml
version: 1
model: demo
calibration:
  num_samples: 32
quantize:
  method: awq
  bits: 4
```

A key has the value that stands last in this list: its default, the recipe that `--recipe` names,
the key's flag, `--set SECTION.KEY=VALUE`. This page is made from the schema, as the flags are.
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_section(command) for command in READS)


def _section(command: str) -> str:
    rows = "".join(_row(k) for k in keys(command) if not k.path.startswith("calibration."))
    if command == "quantize":  # the text is the same for prune, but for prosparse's defaults
        calibration = [key for key in keys("prune") if key.path.startswith("calibration.")]
        rows += "".join(_row(key) for key in calibration)
    head = "| key | flag | methods | what it is | default |\n|---|---|---|---|---|\n"
    return f"\n## optim {command}\n\n{head}{rows}"


def _row(key: Key) -> str:
    flags = ", ".join(f"`{flag}`" for flag in key.flags) or f"`--set {key.path}=...`"
    default = f"`{key.default}`" if key.default else "none"
    whose = ", ".join(key.methods) or "all"
    return f"| `{key.path}` | {flags} | {whose} | {key.what} | {default} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
