"""Models for the tests of sources and text: a tiny random one, and the real `demo`."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    """Two blocks, hidden 64, 4 query and 2 KV heads, untied."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def tiny_folder(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    """`tiny_llama` as one safetensors file, in a folder the test may damage."""
    folder = tmp_path / "tiny"
    tiny_llama.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    return open_checkpoint("demo")


@pytest.fixture(scope="session")
def demo_tokenizer(demo: Checkpoint) -> Tokenizer:
    return demo.tokenizer()
