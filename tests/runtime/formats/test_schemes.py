"""`quantization_config`: what we write is what every reader resolves, and the rest is refused."""

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

from optim.recipes.errors import OptimError
from optim.runtime.formats.pack_quantized import Scheme, parse_config, write_config

W4 = Scheme(4, 32, False)
W3 = Scheme(3, 16, True)
W8 = Scheme(8, -1, True)
MIXED = {
    "layers.0.q": W4,
    "layers.0.k": W4,
    "layers.0.v": W4,
    "layers.0.down": W3,
    "layers.1.down": W3,
    "lm_head": W8,
}


def broken(**changes: Any) -> dict[str, Any]:
    config = write_config({"a": W4})
    for path, value in changes.items():
        node = config
        *parents, last = path.replace("group__", "config_groups__group_0__", 1).split("__")
        for key in parents:
            node = node[key]
        node[last] = value
    return config


def test_what_is_written_is_read_back() -> None:
    scheme_of = parse_config(write_config(MIXED, ["layers.1.q"]))
    assert {name: scheme_of(name) for name in MIXED} == MIXED
    assert scheme_of("layers.1.q") is None
    assert scheme_of("layers.5.other") == W4


def test_compressed_tensors_resolves_the_same_schemes() -> None:
    model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(64, 8)})
    layer = {name: torch.nn.Linear(64, 32) for name in ("q", "k", "v", "down")}
    model["layers"] = torch.nn.ModuleList([torch.nn.ModuleDict(layer)])
    config = write_config(MIXED, ["layers.0.v"])
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    scheme_of = parse_config(config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            theirs, ours = getattr(module, "quantization_scheme", None), scheme_of(name)
            assert (theirs is None) == (ours is None)
            if theirs and ours:
                weights = theirs.weights
                assert (weights.num_bits, weights.group_size or -1) == (ours.bits, ours.group_size)
                assert weights.symmetric == ours.symmetric


def test_name_beats_pattern_beats_class() -> None:
    config = write_config({"a.down": W8, "x": W4, "y": W4})
    group = write_config({"z": W3})["config_groups"]["group_0"]
    group["targets"] = ["re:.*down$"]
    config["config_groups"] = {"first": group, **config["config_groups"]}
    config["ignore"] = ["re:.*head"]
    scheme_of = parse_config(config)
    assert scheme_of("a.down") == W8
    assert scheme_of("b.down") == W3
    assert scheme_of("b.up") == W4
    assert scheme_of("lm_head") is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"format": "float-quantized"}, "float-quantized"),
        ({"format": None}, "None"),
        ({"quantization_status": "frozen"}, "frozen"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"g": 3}}, "not a mapping"),
        ({"group__input_activations": {"num_bits": 8}}, "input activations"),
        ({"group__format": "int-quantized"}, "int-quantized"),
        ({"group__weights": None}, "how weights"),
        ({"group__weights__actorder": "group"}, "actorder"),
        ({"group__weights__strategy": "tensor"}, "tensor"),
        ({"group__weights__type": "float"}, "float"),
        ({"group__weights__num_bits": "4"}, "num_bits"),
        ({"group__weights__num_bits": 7}, "7 bits"),
        ({"group__weights__group_size": None}, "group_size"),
        ({"group__targets": "Linear"}, "target"),
        ({"group__targets": ["re:(a+)+$"]}, "take forever"),
        ({"group__targets": ["re:" + "a" * 999]}, "at most 256"),
        ({"group__targets": ["re:" + ".*" * 9]}, "take forever"),
        ({"group__targets": ["re:((x*)y)*"]}, "take forever"),
        ({"ignore": ["re:" + ".*" * 6 + "x"]}, "take forever"),
        ({"group__targets": ["re:(unclosed"]}, "not a valid regular"),
        ({"ignore": ["re:["]}, "not a valid regular"),
    ],
)
def test_what_cannot_be_run_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptimError, match=reason) as caught:
        parse_config(broken(**changes))
    assert caught.value.code == 2


def test_a_config_of_nothing_is_refused() -> None:
    with pytest.raises(OptimError, match="no module"):
        write_config({}, ["lm_head"])
