"""An evaluation kept with its artifact: manifest and card, replaced and never doubled."""

import json
from pathlib import Path

import pytest

from optim.recipes.errors import OptimError
from optim.runtime.storage.record import HEADING, record, recordable

FOUND = {"text": "t", "windows": 2, "window": 8, "tokens": 14, "perplexity": 3.25, "kl": None}


def artifact(folder: Path) -> Path:
    (folder / "optim.json").write_text(json.dumps({"format_version": 1, "shards": {}}))
    (folder / "README.md").write_text("# a model\n\n## Run it\n\nhow\n")
    return folder


def test_the_manifest_keeps_what_was_measured(tmp_path: Path) -> None:
    record(artifact(tmp_path), FOUND)
    manifest = json.loads((tmp_path / "optim.json").read_text())
    assert manifest["shards"] == {}
    assert manifest["evaluation"]["perplexity"] == 3.25
    assert "kl" not in manifest["evaluation"]


def test_the_card_has_one_table_with_the_newest_values(tmp_path: Path) -> None:
    record(artifact(tmp_path), FOUND)
    record(tmp_path, FOUND | {"perplexity": 4.5})
    card = (tmp_path / "README.md").read_text()
    assert card.count(HEADING) == 1
    assert "| perplexity | 4.500 |" in card and "3.25" not in card
    assert card.startswith("# a model\n\n## Run it\n\nhow\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "optim.json"]


def test_the_card_says_in_words_what_was_measured(tmp_path: Path) -> None:
    more = {"ppl_ratio": 1.25, "kl": 0.5, "kl_error": None, "same_top": 0.75, "windows": 1}
    record(artifact(tmp_path), FOUND | more)
    card = (tmp_path / "README.md").read_text()
    assert "_" not in card
    assert "| same likeliest token | 75.0% |" in card
    assert "1 window of 8 tokens" in card


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptimError, match=r"no optim\.json") as raised:
        recordable(str(tmp_path))
    assert raised.value.code == 2
