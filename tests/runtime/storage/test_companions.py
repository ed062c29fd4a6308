from pathlib import Path

import pytest

from optim.recipes.errors import OptimError
from optim.runtime.storage.companions import companions, copy_companions

BELONG = (
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "vocab.json",
)
OTHERS = (
    "README.md",
    "config.json",
    "diary.txt",
    "model.safetensors",
    "model.safetensors.index.json",
    "modeling_own.py",
    "optim.json",
    "other/tokenizer.json",
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name in (*BELONG, *OTHERS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_what_belongs_with_a_model_is_copied_and_nothing_else(model: Path, tmp_path: Path) -> None:
    assert companions(model) == sorted(BELONG)
    out = tmp_path / "out"
    out.mkdir()
    copy_companions(model, out)
    copied = {p.relative_to(out).as_posix(): p.read_text() for p in out.rglob("*") if p.is_file()}
    assert copied == {name: name for name in BELONG}


def test_code_is_copied_where_it_is_trusted(model: Path) -> None:
    assert set(companions(model, code=True)) - set(BELONG) == {"modeling_own.py"}


def test_a_link_out_of_the_folder_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    (model / "merges.txt").symlink_to(tmp_path / "private")
    with pytest.raises(OptimError, match=r"merges.txt is a link that leads out"):
        companions(model)


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "repo/blobs", tmp_path / "repo/snapshots/12ab"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "0123").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0123")
    assert companions(snapshot) == ["tokenizer.json"]
