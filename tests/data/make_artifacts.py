"""Makes artifacts/: small artifacts of every kind, and the logits that the maker's version gives.

Run once, by hand. What lies there was made before `runtime/` was divided into floors; the test
`tests/runtime/test_old_artifacts.py` holds that artifacts of that time load and compute as they
did. Add a kind here when a format is added; what is there already is left alone.

    python tests/data/make_artifacts.py NAME...
"""

import json
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from conftest import _save_tokenizer  # noqa: E402

from optim.cli import main  # noqa: E402
from optim.runtime.engine.load import load_model  # noqa: E402

PROMPT, DECODED, VOCABULARY = 24, 3, 264
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ONE = {"num_hidden_layers": 1}
UNUSED = ("tokenizer*", "README.md")  # the logits need none of them
EXPERTS = ONE | {"num_local_experts": 2, "intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "relu": ("Llama", ONE | {"hidden_act": "relu"}),
    "fatrelu": ("Llama", ONE | {"hidden_act": "relu", "hidden_act_param": 0.3}),
    "qwen2": ("Qwen2", ONE),
    "phi3": ("Phi3", ONE | {"intermediate_size": 96}),
    "mixtral": ("Mixtral", EXPERTS),
}
QUANTIZE: dict[str, tuple[str, dict[str, Any]]] = {
    "awq4": ("llama", {"bits": 4, "group_size": 32}),
    "awq4-sym": ("qwen2", {"bits": 4, "group_size": 16, "sym": True}),
    "awq4-mixture": ("mixtral", {"bits": 4, "group_size": 32, "lm_head_bits": 8}),
    "awq4-mixed": (
        "llama",
        {
            "group_size": 32,
            "overrides": [{"targets": ["re:.*q_proj$", "re:.*up_proj$"], "bits": 8}],
        },
    ),
    "awq3": ("llama", {"bits": 3, "group_size": 32}),
    "awq3-sym": ("phi3", {"bits": 3, "group_size": -1, "sym": True}),
    "awq8": ("llama", {"bits": 8, "group_size": 32}),
    "awq8-sym": ("qwen2", {"bits": 8, "group_size": -1, "sym": True}),
    "static": ("llama", {"method": "mergequant"}),
    "static-literal": (
        "llama",
        {"method": "mergequant", "rotate": False, "prefix": False, "act_bits": 8},
    ),
    "static-mixture": ("mixtral", {"method": "mergequant", "down_bits": 4}),
}
PACK = {
    "bf12": ("llama", "bf12"),
    "bf12-mixture": ("mixtral", "bf12"),
    "df11": ("qwen2", "df11"),
    "df11-mixture": ("mixtral", "df11"),
    "awq4-bf12": ("awq4", "bf12"),
}
CORE = {"method": "coreinfer", "keep": 0.5}
PRUNE: dict[str, tuple[str, dict[str, Any]]] = {
    "threshold": ("phi3", {"method": "threshold", "sparsity": 0.4}),
    "threshold-awq4": ("awq4", {"method": "threshold", "sparsity": 0.4, "allocation": "uniform"}),
    "gate": ("qwen2", {"method": "threshold", "sparsity": 0.4, "only": "gate"}),
    "core": ("llama", CORE),
    "core-awq4": ("awq4", CORE | {"clusters": 2, "score": "griffin", "bias": False}),
    "relu-exact": ("relu", {"method": "relu-exact"}),
    "fatrelu-exact": ("fatrelu", {"method": "relu-exact"}),
}


def save_model(name: str) -> None:
    """A model with random weights, in bf16, in the folder `name`."""
    kind, extra = MODELS[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{kind}Config")(**BASE | extra)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(noise * 0.15 if weight.dim() > 1 else weight + noise * 0.2)
        model.get_input_embeddings().weight.mul_(torch.randn(64).exp())
    model.to(torch.bfloat16).save_pretrained(name)
    _save_tokenizer(Path(name))


def run(source: str, output: str, section: str, keys: dict[str, Any]) -> None:
    """One `optim` command, from a recipe."""
    text = {"dataset": "some.txt", "num_samples": 4, "seq_len": 32}
    recipe = {"version": 1, "model": source, "output": output, "calibration": text, section: keys}
    Path("recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    command = {"quantize": "quantize", "prune": "prune", "pack": "pack"}[section]
    sys.argv = ["optim", command, "--recipe", "recipe.yaml", "--quiet", "--threads", "1"]
    if main():
        raise SystemExit(f"{output} could not be made")


def logits(folder: str) -> torch.Tensor:
    """fp32 `[DECODED, vocabulary]`: after a prompt, then token by token."""
    ids = torch.arange(PROMPT + DECODED - 1)[None] * 37 % (VOCABULARY - 5) + 5
    model = load_model(folder, device="cpu")
    cache = model.new_cache(length=64)
    found = [model.forward(ids[:, :PROMPT], cache)]
    found += [model.forward(ids[:, i : i + 1], cache) for i in range(PROMPT, ids.shape[1])]
    return torch.cat(found)


def make(wanted: list[str]) -> None:
    """What is named, or everything that is not there yet, in the working folder."""
    lines = (f"Line {i}: {'abcdefghij'[i % 10] * 3} {i * i}." for i in range(60))
    Path("some.txt").write_text("\n".join(lines), encoding="utf-8")
    for name in MODELS:
        save_model(name)
    for name, (source, keys) in QUANTIZE.items():
        run(source, name, "quantize", {"method": "awq"} | keys)
    for name, (source, layout) in PACK.items():
        run(source, name, "pack", {"layout": layout})
    for name, (source, keys) in PRUNE.items():
        run(source, name, "prune", keys)
    artifacts = HERE / "artifacts"
    artifacts.mkdir(exist_ok=True)
    known = artifacts / "logits.safetensors"
    tensors = load_file(known) if known.exists() else {}
    for name in wanted or [*QUANTIZE, *PACK, *PRUNE]:
        if not (artifacts / name).exists():
            shutil.copytree(name, artifacts / name, ignore=shutil.ignore_patterns(*UNUSED))
            tensors[name] = logits(str(artifacts / name))
    save_file(tensors, known)


with TemporaryDirectory() as work:
    os.chdir(work)
    make(sys.argv[1:])
