"""A tiny model with random weights whose tokens are letters, and `optim run` over it."""

import json
import os
import sys
from collections.abc import Callable

import pytest
import torch

from optim.cli import main, ui

Captured = pytest.CaptureFixture[str]
LETTERS = [chr(code) for code in range(32, 127)]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
MakeLetters = Callable[[int, int | None], str]


@pytest.fixture(scope="session")
def make_letters(tmp_path_factory: pytest.TempPathFactory) -> MakeLetters:
    """make_letters(context, end token) -> a folder that no test may change."""

    def make(context: int, end: int | None) -> str:
        from tokenizers import Tokenizer, decoders
        from tokenizers.models import BPE
        from transformers import LlamaConfig, LlamaForCausalLM

        folder = tmp_path_factory.mktemp("letters")
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=len(LETTERS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            initializer_range=0.4,
            bos_token_id=None,
            eos_token_id=end,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
        tokenizer.decoder = decoders.Fuse()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
        return str(folder)

    return make


@pytest.fixture(autouse=True)
def _notes_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command sets `quiet` for its process, which here goes on to the next test."""
    monkeypatch.setattr(ui.notes, "quiet", False)


GREEDY = ("--temperature", "0")


class Run:
    """`optim run ARGUMENTS` in this process, on one thread; the exit code and both outputs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(
        self, *arguments: str, piped: bytes = b"", greedy: bool = True
    ) -> tuple[int, str, str]:
        flags = ("--threads", "1", *(GREEDY if greedy else ()))
        reading, writing = os.pipe()
        os.write(writing, piped)
        os.close(writing)
        self.monkeypatch.setattr(sys, "argv", ["optim", "run", *flags, *arguments])
        with os.fdopen(reading, encoding="utf-8") as stdin:
            self.monkeypatch.setattr(sys, "stdin", stdin)
            code = main()
        out, err = self.capsys.readouterr()
        return code, out, err


@pytest.fixture
def optim(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> Run:
    return Run(monkeypatch, capsys)
