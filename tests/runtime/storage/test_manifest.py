"""The manifest: what is written is read again, lies are refused by name, the page says its form."""

import json
from pathlib import Path
from typing import Any

import pytest

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.storage.manifest import Manifest, Source, made_here, read_manifest

ROOT = Path(__file__).parents[3]
DIGEST = "0" * 64
FACTS: dict[str, Any] = {
    "format_version": 1,
    "source": {"name": "a", "sha256": DIGEST},
    "recipe": {"version": 1, "quantize": None},
    "shards": {"a.safetensors": DIGEST},
    "blocks": [{"error": 0.5, "rounding_error": 1}],
    "later": {"x": [1]},
}


def written(folder: Path, facts: Any) -> Path:
    (folder / "optim.json").write_text(json.dumps(facts))
    return folder


def test_what_is_read_is_written_again(tmp_path: Path) -> None:
    found = read_manifest(written(tmp_path, FACTS))
    assert found is not None and json.loads(found.text()) == FACTS


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


LIES: list[tuple[str, Any]] = [
    ("format_version", "1"),
    ("format_version", 0),
    ("source", 3),
    ("source", {"name": None, "sha256": DIGEST}),
    ("source", {"name": "a", "sha256": "0" * 63}),
    ("recipe", []),
    ("calibration", "x"),
    ("shards", []),
    ("shards", {"../a": DIGEST}),
    ("shards", {"a" * 300: DIGEST}),
    ("shards", {"a": None}),
    ("blocks", [1]),
    ("blocks", [{"error": "x"}]),
    ("notes", "x"),
    ("modules", {"a": None}),
    ("shapes", {"a": [0]}),
    ("shapes", {"a": [True]}),
    ("shapes", {"a": [2.0]}),
    ("packed_bits", {"a": -1.0}),
    ("limits", {"a": float("nan")}),
    ("bits_per_weight", float("inf")),
    ("bytes", -1),
    ("original_sha256", {"a": 3}),
    ("evaluation", []),
    ("sparsity", {"blocks": {}}),
]


@pytest.mark.parametrize(("key", "value"), LIES)
def test_a_lie_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(OptimError, match=rf"optim\.json is damaged: {key}") as caught:
        read_manifest(written(tmp_path, FACTS | {key: value}))
    assert caught.value.code == USAGE


def test_a_later_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptimError, match="version 2, newer") as caught:
        read_manifest(written(tmp_path, FACTS | {"format_version": 2}))
    assert caught.value.fix == "install a newer optim"


def test_it_says_with_what_it_was_made() -> None:
    facts = Manifest(made=made_here(), source=Source(name="a", sha256=DIGEST)).facts()
    assert set(facts["made"]) == {"optim", "torch", "transformers", "date", "cpu"}
    assert all(facts["made"].values())


def test_the_page_has_the_schema() -> None:
    page = (ROOT / "docs" / "artifact.md").read_text(encoding="utf-8")
    shown = page.partition("```json\n")[2].partition("\n```")[0]
    assert json.loads(shown) == Manifest.model_json_schema()
