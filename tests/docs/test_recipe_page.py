"""docs/recipe.md has every key of the schema, as the schema has it."""

import importlib.util
from pathlib import Path

from optim.recipes.keys import READS, keys

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_schema_says() -> None:
    spec = importlib.util.spec_from_file_location("make_recipe_page", DOCS / "make_recipe_page.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    written = (DOCS / "recipe.md").read_text(encoding="utf-8")
    assert made.page() == written, "run: python docs/make_recipe_page.py"
    for command in READS:
        assert all(f"| `{key.path}` |" in written for key in keys(command))
