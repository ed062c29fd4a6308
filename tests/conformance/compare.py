"""One variant through transformers and through our engine: the largest difference of logits."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.runtime.engine.load import load_model

PROMPT, STEPS = 20, 10


def make(config: dict[str, Any], folder: Path) -> None:
    """A random fp32 model of `config`, whose config.json stays as it is given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    text = json.dumps(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)
    torch.manual_seed(0)
    model = factory.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(noise * 0.3 if weight.dim() > 1 else weight + noise * 0.2)
    model.float().save_pretrained(folder)
    (folder / "config.json").write_text(text)


@torch.inference_mode()
def theirs(folder: Path, ids: Tensor) -> Tensor:
    """transformers' logits `[1, T, vocab]`: those of the prompt, then of each longer text alone."""
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ends = range(PROMPT + 1, PROMPT + STEPS + 1)
    rows = [model(ids[:, :PROMPT], use_cache=False).logits]
    rows += [model(ids[:, :end], use_cache=False).logits[:, -1:] for end in ends]
    return torch.cat(rows, 1)


def ours(folder: Path, ids: Tensor) -> Tensor:
    """Our engine's: the prompt in one go, then token by token."""
    model = load_model(str(folder), device="cpu")
    cache = model.new_cache(1)
    rows = [model.forward(ids[:, :PROMPT], cache, all_logits=True)]
    for end in range(PROMPT, PROMPT + STEPS):
        rows.append(model.forward(ids[:, end : end + 1], cache)[:, None])
    return torch.cat(rows, 1)


def difference(config: dict[str, Any], folder: Path) -> float:
    """The largest difference of a logit, by the largest logit."""
    make(config, folder)
    ids = torch.randint(3, 96, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    wanted = theirs(folder, ids)
    return float((ours(folder, ids) - wanted).abs().max() / wanted.abs().max())
