"""What every test folder shares: a tiny random model of each family, with a tokenizer of bytes."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from optim.runtime.system import instructions

# Read when Triton is first imported; `TRITON_INTERPRET=0 pytest -m gpu` runs kernels on a card.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Other programs may keep a machine busy: no test fails by the clock.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

BASE: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
NO_GROUPS = {"num_key_value_heads": None}  # these families have no grouped queries
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "phi3": ("Phi3", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3_text": ("Gemma3Text", GEMMA | {"sliding_window_pattern": 2}),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4},
    ),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 16}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64, **NO_GROUPS}),
    "gpt_neox": ("GPTNeoX", NO_GROUPS),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    ),
}
OUTSIDE = {"starcoder2": ("Starcoder2", {}), "stablelm": ("StableLm", {})}

LEVELS = instructions.levels() or [""]
"""The levels of instructions that this machine has; elsewhere what the compiler makes of it."""
if os.environ.get("OPTIM_SANITIZE"):  # slow: those that differ most
    LEVELS = sorted({LEVELS[0], LEVELS[-1]})

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session", params=[*TABLE, *OUTSIDE])
def family(request: pytest.FixtureRequest) -> str:
    """Every family of the table, and some outside it."""
    return str(request.param)


@pytest.fixture(scope="session", params=[*TABLE])
def table_family(request: pytest.FixtureRequest) -> str:
    """Every family of the table."""
    return str(request.param)


def pytest_report_header() -> list[str]:
    """A green run says where it was green."""
    return [instructions.described(), f"OPTIM_ISA levels: {' '.join(instructions.levels()) or '-'}"]


@contextmanager
def _another_machine() -> Iterator[pytest.MonkeyPatch]:
    """What is changed in here about the machine, kernels look at anew."""
    with pytest.MonkeyPatch.context() as patch:
        _forget_kernels()
        yield patch
    _forget_kernels()


def _forget_kernels() -> None:
    """Clear what modules remember of the machine."""
    for name, module in list(sys.modules.items()):
        if name.startswith("optim."):
            getattr(module, "REFUSED", {}).clear()
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@pytest.fixture(scope="module", params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every level of instructions that this machine has, one after the other."""
    with _another_machine() as patch:
        patch.setenv("OPTIM_ISA", request.param)
        yield request.param


@pytest.fixture
def another_machine() -> Iterator[pytest.MonkeyPatch]:
    """To change what the machine has, before any kernel looks."""
    with _another_machine() as patch:
        patch.delenv("OPTIM_ISA", raising=False)
        yield patch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a busy machine two threads wait for each other far longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """make_model(family, dtype=torch.bfloat16, **sizes) -> a folder that no test may change."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(family: str, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Path:
        key = family, dtype, *sorted(sizes.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            _save_model(family, dtype, made[key], sizes)
            _save_tokenizer(made[key])
        return made[key]

    return make


@pytest.fixture
def make_begun(make_model: MakeModel, tmp_path: Path) -> MakeModel:
    """`make_model` with a tokenizer that puts `<s>` (1) before every text, as its template does."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    def make(family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        folder = tmp_path / "begun"
        shutil.copytree(make_model(family, dtype), folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        template = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
        settings |= {"bos_token": "<s>", "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


@pytest.fixture(scope="session")
def some_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred tokens (bytes) of text that repeats and varies."""
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("\n".join(f"Line {i}: {'abcdefghij'[i % 10] * 3} {i * i}." for i in range(60)))
    return path


def _save_model(family: str, dtype: torch.dtype, folder: Path, sizes: dict[str, int]) -> None:
    """Random weights; norms and biases are random too, and some channels stand out."""
    import transformers

    kind, extra = (TABLE | OUTSIDE)[family]
    torch.manual_seed(0)
    options = {k: v for k, v in (BASE | extra | sizes).items() if v is not None}
    config = getattr(transformers, f"{kind}Config")(**options)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(noise * 0.15 if weight.dim() > 1 else weight + noise * 0.2)
        table = model.get_input_embeddings().weight
        table.mul_(torch.randn(table.shape[1]).exp())
    model.to(dtype).save_pretrained(folder)


def _save_tokenizer(folder: Path) -> None:
    """Three special tokens, then one token a byte."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
