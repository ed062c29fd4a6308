"""A saved cache goes on where it was; any other file is refused, and everything is read again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optim.recipes.errors import OptimError
from optim.runtime.cache.full import Policy
from optim.runtime.engine.load import Model, load_model
from optim.runtime.engine.sampling import Sampling
from optim.runtime.engine.session import Session

POLICIES = [Policy(bits, kind) for bits in (16, 8, 4) for kind in ("full", "stream")]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Model:
    return load_model(str(make_model("llama", torch.float32)), device="cpu")


def _session(model: Model, policy: Policy | None = None) -> Session:
    return Session(model, sampling=Sampling(max_tokens=12), context=64, policy=policy)


def _said(session: Session, text: str) -> str:
    return "".join(session.complete(text))


FIRST, SECOND = "a long beginning of a text: ", "0123456789" * 3


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_it_goes_on_from_the_file(model: Model, policy: Policy, tmp_path: Path) -> None:
    one, path = _session(model, policy), tmp_path / "kept"
    long = FIRST + SECOND * (3 if policy.kind == "stream" else 1)
    _said(one, long)
    assert one.save_cache(path) == path.stat().st_size > 0
    assert path.stat().st_mode & 0o077 == 0
    two = _session(model, policy)
    assert two.load_cache(path) == ""
    more = long + "!"
    assert _said(one, more) == _said(two, more)
    assert one.stats.cached_tokens == two.stats.cached_tokens == len(long)
    assert sorted(tmp_path.iterdir()) == [path]


def test_an_empty_cache_writes_nothing(model: Model, tmp_path: Path) -> None:
    assert _session(model).save_cache(tmp_path / "kept") == 0
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_not_written_over(model: Model, tmp_path: Path) -> None:
    session, path = _session(model), tmp_path / "weights"
    _said(session, FIRST)
    for content in (b"precious", b""):
        path.write_bytes(content)
        with pytest.raises(OptimError) as caught:
            session.save_cache(path)
        assert caught.value.code == 2
        assert path.read_bytes() == content
    save_file({"mine": torch.ones(2)}, path)
    with pytest.raises(OptimError, match="not a saved cache"):
        session.save_cache(path)
    with pytest.raises(OptimError):
        session.save_cache(tmp_path / "no" / "folder")


def test_what_is_not_this_conversations_is_not_used(
    model: Model, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "kept"
    session = _session(model)
    _said(session, FIRST)
    session.save_cache(path)
    other = load_model(str(make_model("qwen2", torch.float32)), device="cpu")
    assert "another model" in _session(other).load_cache(path)
    assert "8 bits" in _session(model, Policy(8)).load_cache(path)
    assert "stream" in _session(model, Policy(16, "stream")).load_cache(path)
    assert "no cache" in _session(model).load_cache(tmp_path / "none")
    again = _session(model, Policy(8))
    again.load_cache(path)
    assert _said(again, FIRST) == _said(_session(model, Policy(8)), FIRST)
    assert again.stats.cached_tokens == 0


@pytest.mark.parametrize("policy", [Policy(), Policy(4), Policy(8, "stream")], ids=str)
@pytest.mark.parametrize(
    "damage", ["cut", "longer", "shape", "dtype", "missing", "tokens", "extra", "rows"]
)
def test_a_damaged_file_is_not_used(
    model: Model, policy: Policy, damage: str, tmp_path: Path
) -> None:
    session, path = _session(model, policy), tmp_path / "kept"
    text = FIRST + SECOND + "!!"
    _said(session, FIRST + SECOND)
    session.save_cache(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        _change(path, damage)
    again = _session(model, policy)
    assert "damaged" in again.load_cache(path)
    assert _said(again, text) == _said(_session(model, policy), text)
    assert again.stats.cached_tokens == 0


def _change(path: Path, damage: str) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = file.metadata()
    state = load_file(path)
    name = next(n for n in state if n.startswith("1.keys"))
    x = state[name]
    changed = {
        "longer": x.repeat(1, 2, 1),
        "shape": x[..., :-1].contiguous(),
        "dtype": x.double(),
        "rows": x[:1].contiguous(),
    }
    if damage in changed:
        state[name] = changed[damage]
    elif damage == "missing":
        del state[name]
    elif damage == "tokens":
        state["tokens"] = state["tokens"][:-1].clone()
    else:
        state["99.keys"] = x.clone()
    save_file(state, path, facts)
