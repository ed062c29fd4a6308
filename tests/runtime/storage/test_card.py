"""The model card: where the model comes from, and lines that run as they stand."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from optim.runtime.storage.card import Card, card_of
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.origin import Origin, origin_of

Make = Callable[..., Path]


@pytest.fixture
def folder(make_model: Make, tmp_path: Path) -> Path:
    shutil.copytree(make_model("llama"), tmp_path / "small")
    return tmp_path / "small"


def text_of(folder: Path, programs: tuple[str, ...] = ("optim",)) -> str:
    made = Card("small", "What it is.", ("optim",), programs, "", "optim quantize", "version: 1\n")
    return card_of(made, open_checkpoint(str(folder)))


KNOWN = "base_model: [them/base]\nlicense: mit\nlanguage: [en, 'no']\n"


def test_the_source_card_says_where_it_comes_from(folder: Path) -> None:
    (folder / "README.md").write_text(f"---\n{KNOWN}---\n# x\n")
    assert origin_of(open_checkpoint(str(folder))) == Origin("them/base", "mit", ("en", "no"))
    text = text_of(folder)
    found = yaml.safe_load(text.split("---\n")[1])
    assert found["base_model"] == "them/base" and found["license"] == "mit"
    assert "[them/base](https://huggingface.co/them/base). Licence: mit. Language: en, no." in text


@pytest.mark.parametrize("programs", [("optim",), ("optim", "compressed-tensors"), ()])
def test_the_hub_hears_of_transformers_where_it_loads_it(
    programs: tuple[str, ...], folder: Path
) -> None:
    found = yaml.safe_load(text_of(folder, programs).split("---\n")[1])
    assert ("library_name" in found) == ("compressed-tensors" in programs)


HOSTILE = [
    "",
    "# no front matter",
    "---\n{[",
    "---\n- a\n---\n",
    "---\nlicense: 'a b\n",
    "\xff" * 99,
]
HOSTILE += ["---\nlicense: {a: b}\nlanguage: ['<b>', 3, [x]]\nbase_model: ../../etc\n---\n"]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_cannot_be_true_is_left_out(text: str, folder: Path) -> None:
    (folder / "README.md").write_text(text, encoding="latin-1")
    assert origin_of(open_checkpoint(str(folder))) == Origin()
    assert str(folder) not in text_of(folder)  # nobody else has this folder


def test_the_models_own_sampling_is_named(folder: Path) -> None:
    assert "names no sampling settings" in text_of(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95, "x": "y"}')
    assert "Sampling: temperature 0.6, top_p 0.95, as" in text_of(folder)


@pytest.mark.parametrize("program", ["optim", "transformers"])
def test_the_lines_of_python_run(
    program: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = '{"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}'
    if program == "optim":
        (folder / "tokenizer_config.json").write_text(template)
    monkeypatch.chdir(folder.parent)
    blocks = re.findall(r"```python\n(.*?)```", text_of(folder, (program,)), flags=re.S)
    assert len(blocks) == 1
    exec(blocks[0], {})
    assert capsys.readouterr().out
