"""Kept values of a configuration say what the configuration object says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from optim.recipes.errors import OptimError
from optim.runtime.architecture import settings
from optim.runtime.architecture.config import read_config
from optim.runtime.architecture.rope import ropes
from optim.runtime.architecture.settings import Settings, read_settings, text_of
from optim.runtime.architecture.shape import resolve
from optim.runtime.architecture.table import FAMILIES
from tests.conformance.variants import CASES, config_of


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_a_model_has_the_same_shape(family: str, variant: str) -> None:
    object_ = read_config(config_of(family, variant), "test")
    facts = FAMILIES[object_.model_type].decoder
    text = text_of(object_)
    assert text is not None
    kept = Settings(json.loads(text))
    shape = resolve(object_, facts)
    assert resolve(kept, facts) == shape
    if facts.positions or not settings._unscaled(object_):
        return
    for kind, rope in ropes(object_, facts, shape.head_dim).items():
        again = ropes(kept, facts, shape.head_dim)[kind]
        assert torch.equal(rope.frequencies[0], again.frequencies[0])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPTIM_CACHE", str(tmp_path))
    return tmp_path / "settings"


def never(*_: Any) -> Any:
    raise AssertionError("the class was asked again")


def test_the_class_is_asked_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(*CASES[0])
    read_settings(config, "test")
    monkeypatch.setattr(settings, "read_config", never)
    assert read_settings(config, "test").hidden_size == config["hidden_size"]
    with pytest.raises(AssertionError):
        read_settings(config | {"hidden_size": 2 * config["hidden_size"]}, "test")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"hidden_size": 1}'])
def test_a_damaged_file_is_made_anew(cache: Path, text: str) -> None:
    config = config_of(*CASES[0])
    read_settings(config, "test")
    (kept,) = cache.iterdir()
    whole = kept.read_text()
    kept.write_text(text)
    assert read_settings(config, "test").hidden_size == config["hidden_size"]
    assert kept.read_text() == whole


def test_scaled_angles_need_the_object(cache: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    read_settings(config_of("llama", CASES[0][1]) | {"rope_parameters": rope}, "test")
    assert not cache.exists() or not list(cache.iterdir())


def test_a_value_that_json_changes_keeps_the_object(cache: Path) -> None:
    config = config_of(*CASES[0]) | {"hidden_act_param": float("nan")}
    for _ in range(2):
        value = read_settings(config, "test").hidden_act_param
        assert value != value
    assert not cache.exists()


def test_what_is_refused_is_not_kept(cache: Path) -> None:
    with pytest.raises(OptimError):
        read_settings({"model_type": "no such"}, "test")
    assert not cache.exists()
