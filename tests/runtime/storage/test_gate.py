"""The gate: what does not fit the configuration is refused by name, what is no part is left out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.engine.load import load_model
from optim.runtime.formats.pack_quantized import Scheme, pack, write_config
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.walk.walk import Walk

MakeModel = Callable[..., Path]
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    """A tiny llama that the test may spoil."""
    return shutil.copytree(make_model("llama"), tmp_path / "llama")


def _tensors(folder: Path, change: Change) -> None:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def _config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def _refused(folder: Path) -> str:
    with pytest.raises(OptimError) as caught:
        load_model(str(folder), device="cpu")
    assert caught.value.code == 2
    return caught.value.message


def _logits(folder: Path) -> Tensor:
    model = load_model(str(folder), device="cpu")
    return model.forward(torch.tensor([[5, 6, 7]]), model.new_cache(1))


def _walked(folder: Path, path: Path) -> Tensor:
    walk, ids = Walk(open_checkpoint(str(folder))), torch.tensor([[5, 6, 7]])
    states = walk.embed(ids, path)
    with torch.inference_mode():
        for i in range(len(walk)):
            states[slice(0, 1)] = walk.run(i, walk.block(i), states[slice(0, 1)])
        return walk.logits(ids, states[slice(0, 1)])[:, -1]


@pytest.mark.parametrize("family_", ["llama", "phi3", "opt", "gpt_neox", "mixtral", "olmo2"])
def test_a_tensor_of_any_other_shape_is_named(
    family_: str, make_model: MakeModel, tmp_path: Path
) -> None:
    folder = shutil.copytree(make_model(family_), tmp_path / family_)
    whole = load_file(folder / "model.safetensors")
    for name, tensor in whole.items():
        for other in (tensor[:-1], torch.cat((tensor, tensor)), tensor[..., None]):
            save_file(whole | {name: other.contiguous()}, folder / "model.safetensors")
            with pytest.raises(OptimError, match=r"expected|has no tensor"):
                open_checkpoint(str(folder))
    for name in whole:
        left = {k: v for k, v in whole.items() if k != name}
        save_file(left, folder / "model.safetensors")
        if name != "lm_head.weight" or family_ != "opt":
            with pytest.raises(OptimError, match=r"has no tensor"):
                open_checkpoint(str(folder))


def test_integers_and_float8_are_no_weights(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    _tensors(folder, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    assert f"{name} is float8_e4m3fn" in _refused(folder)


def test_what_the_class_does_not_ask_for_changes_nothing(folder: Path) -> None:
    before = _logits(folder)
    strange = {
        "model.layers.0.mlp.down_proj.bias": torch.ones(4096),
        "model.layers.0.mlp.gate.weight": torch.ones(1, 64),
        "model.layers.1.self_attn.q_norm.weight": torch.ones(16),
    }
    _tensors(folder, lambda t: t.update(strange))
    assert torch.equal(_logits(folder), before)
    assert set(open_checkpoint(str(folder)).left_out) == set(strange)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weight_packed", lambda x: x[:-1]),
        ("weight_packed", lambda x: torch.cat((x, x))),
        ("weight_packed", lambda x: x.to(torch.int64)),
        ("weight_scale", lambda x: x[:, :-1]),
        ("weight_zero_point", lambda x: x[:1]),
        ("weight_shape", lambda x: x - 1),
        ("weight_shape", lambda x: x.flip(0)),
    ],
)
def test_packed_tensors_fit_the_configuration(
    folder: Path, part: str, change: Callable[[Tensor], Tensor]
) -> None:
    scheme, module = Scheme(4, 16, False), "model.layers.1.mlp.gate_proj"

    def packs(tensors: dict[str, Tensor]) -> None:
        out, width = tensors.pop(f"{module}.weight").shape
        q = torch.randint(16, (out, width), dtype=torch.uint8)
        scale, zero = torch.rand(out, width // 16).bfloat16(), q[:, : width // 16].contiguous()
        tensors.update({f"{module}.{k}": v for k, v in pack(q, scale, zero, scheme).items()})

    _tensors(folder, packs)
    _config(folder, quantization_config=write_config({module: scheme}, ["lm_head"]))
    _logits(folder)
    name = f"{module}.{part}"
    _tensors(folder, lambda t: t.update({name: change(t[name]).contiguous()}))
    assert name in _refused(folder)


@pytest.mark.parametrize(
    "keys",
    [
        {"num_hidden_layers": 10**30},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 2.0},
        {"num_hidden_layers": "cuda"},
        {"num_hidden_layers": 60_000},
        {"num_labels": 10**12},
        {"num_attention_heads": 1e300},
        {"num_attention_heads": 5},
        {"num_key_value_heads": 63},
        {"num_key_value_heads": -2},
        {"hidden_size": -64},
        {"head_dim": 17},
        {"head_dim": 10**9},
        {"vocab_size": 0},
        {"max_position_embeddings": float("inf")},
        {"max_position_embeddings": 0},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": True},
        {"hidden_act": {"a": 1}},
        {"hidden_act": "evil"},
        {"hidden_act_param": "x"},
        {"tie_word_embeddings": "64"},
        {"rope_scaling": 1},
        {"rope_scaling": {"rope_type": "evil"}},
        {"rope_scaling": {"rope_type": "linear", "factor": "x"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0.0}},
        {"rope_scaling": {"rope_type": "linear", "partial_rotary_factor": 8.0, "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}},
        {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 3,
                "long_factor": [1.0],
            }
        },
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
        {"use_bidirectional_attention": True},
        {"quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": 5}},
    ],
    ids=str,
)
def test_numbers_that_no_model_has_are_refused_at_once(folder: Path, keys: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "rope_parameters"}
    path.write_text(json.dumps(config | keys))
    assert _refused(folder)


def test_infinity_as_transformers_writes_it(make_model: MakeModel, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model("starcoder2"), tmp_path / "inf")
    _config(folder, time_step_limit=[0.0, {"__float__": "Infinity"}])
    assert open_checkpoint(str(folder)).settings.time_step_limit == [0.0, float("inf")]
    _logits(folder)


def test_a_stored_head_is_kept_where_the_configuration_says_tied(
    folder: Path, tmp_path: Path
) -> None:
    before = _logits(folder)
    _config(folder, tie_word_embeddings=True)
    assert torch.equal(_logits(folder), before)
    walked = _walked(folder, tmp_path / "states")
    assert (walked - before).abs().max() / before.abs().max() < 2e-2


def test_a_tied_pair_may_be_stored_under_the_name_of_the_head(folder: Path, tmp_path: Path) -> None:
    _config(folder, tie_word_embeddings=True)
    _tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    before = _logits(folder)
    _tensors(folder, lambda t: t.__delitem__("model.embed_tokens.weight"))
    assert torch.allclose(_logits(folder), before, atol=1e-5)
    walked = _walked(folder, tmp_path / "states")
    assert (walked - before).abs().max() / before.abs().max() < 2e-2


def test_a_text_config_that_leaves_everything_to_its_class(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model: Any = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    _config(tmp_path, text_config=text | {"model_type": "gemma3_text", "num_key_value_heads": 4})
    with torch.no_grad():
        wanted = model(torch.tensor([[5, 6, 7]])).logits[:, -1]
    assert (_logits(tmp_path) - wanted).abs().max() / wanted.abs().max() < 1e-3
    made = open_checkpoint(str(tmp_path)).text_config
    assert made["head_dim"] == 256
    assert made["tie_word_embeddings"] is True
