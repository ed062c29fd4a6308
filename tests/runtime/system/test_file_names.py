"""Names from a file as names of files: whatever they are, safe, short and each its own."""

from pathlib import PurePosixPath, PureWindowsPath

from hypothesis import given
from hypothesis import strategies as st

from optim.runtime.system.file_names import file_stems


def test_ordinary_names_are_themselves() -> None:
    stems = file_stems(["model.layers.0", "lm_head", "model.embed_tokens", "rest"])
    assert list(stems.values()) == ["model_layers_0", "lm_head", "model_embed_tokens", "rest"]


def test_names_that_would_share_a_file_do_not() -> None:
    stems = file_stems(["lm_head", "lm.head", "LM_HEAD", "other"])
    assert len(set(stems.values())) == 4
    assert stems["other"] == "other" and stems["lm_head"] != "lm_head"


def test_a_name_that_looks_like_a_hash_is_hashed() -> None:
    hashed = file_stems(["a/b"])["a/b"]
    stems = file_stems(["a/b", hashed])
    assert stems["a/b"] == hashed != stems[hashed]


def test_no_shard_is_what_other_programs_take_for_the_model() -> None:
    assert file_stems(["model"])["model"] != "model"


HOSTILE = [
    "/tmp/x/model",
    "../../x",
    "a/../b",
    "",
    ".",
    "..",
    "a" * 5000,
    "\x1b[31m",
    "\ud800",
    "-",
]


@given(st.lists(st.sampled_from(HOSTILE) | st.text(st.characters()), max_size=8))
def test_any_name_becomes_a_file_of_the_folder(names: list[str]) -> None:
    stems = file_stems(names)
    assert len({stem.casefold() for stem in stems.values()}) == len(set(names))
    for stem in stems.values():
        file = f"{stem}.safetensors"
        assert PurePosixPath(file).name == file == PureWindowsPath(file).name
        assert len(file) < 128 and file.isascii() and file.isprintable() and file[0] not in ".-"
