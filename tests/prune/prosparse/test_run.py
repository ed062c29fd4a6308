"""ProSparse on tiny random models: it trains, resumes to the bit, refuses, and its result runs."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from optim.prune.plan import plan
from optim.prune.prosparse import held_back, train
from optim.prune.prosparse import run as prosparse
from optim.recipes.build import build_recipe
from optim.recipes.errors import OptimError
from optim.runtime.engine.load import load_model
from optim.runtime.measure.quality import evaluate
from optim.runtime.storage.manifest import verify
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.text.windows import evaluation_windows

QUICK = {
    "prune.method": "prosparse",
    "prune.steps": 6,
    "prune.save_every": 2,
    "prune.lr": 3e-3,
    "prune.l1": [0.05, 0.1],
    "prune.batch": 2,
    "prune.refit": 0,
    "calibration.num_samples": 4,
    "calibration.seq_len": 32,
}


@pytest.fixture(autouse=True)
def _held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in text is long for a tokenizer of bytes: two short windows of it."""
    monkeypatch.setattr(held_back, "HELD_BACK", ("builtin:eval", 32, 2))


def made(model: Path, text: Path, out: Path, **keys: Any) -> Any:
    """The plan of a short run."""
    named = {f"prune.{k}": v for k, v in keys.items()}
    paths = {"model": str(model), "output": str(out), "calibration.dataset": str(text)}
    return plan(build_recipe(None, QUICK | paths | named, []), device="cpu")


def run(*args: Any, report: Any = lambda point, total: None, **keys: Any) -> prosparse.Outcome:
    return prosparse.prune(made(*args, **keys), report)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(str(folder))
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_what_is_written_is_a_plain_relu_model(make_model, some_text, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_model("llama")
    outcome = run(source, some_text, tmp_path / "out", refit=2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_act"] == "relu" and "hidden_act_param" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _m, i: inputs.append(i[0]))
    model(torch.arange(3, 20)[None])
    share = [float((x == 0).float().mean()) for x in inputs]
    assert all(0.2 < s < 1 for s in share)
    assert len(outcome.blocks) == 2 and outcome.steps == 6
    before, after = weights(source), weights(tmp_path / "out")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if ".mlp." in n}
    assert len((tmp_path / "out" / "training.jsonl").read_text().splitlines()) == 6


def test_the_history_is_drawn_where_matplotlib_is_installed(
    make_model, some_text, tmp_path, monkeypatch
) -> None:
    source = make_model("llama")
    run(source, some_text, tmp_path / "with", steps=2)
    card = (tmp_path / "with" / "README.md").read_text()
    for name in ("loss.png", "sparsity.png"):
        assert (tmp_path / "with" / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in card
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(source, some_text, tmp_path / "without", steps=2)
    assert not list((tmp_path / "without").glob("*.png"))
    assert "png" not in (tmp_path / "without" / "README.md").read_text()


def test_the_engine_runs_it_with_its_threshold(make_model, some_text, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_model("llama", torch.float32)
    ids = torch.arange(3, 30)[None]
    logits = []
    for threshold in (0.0, 0.3):
        out = tmp_path / f"t{threshold}"
        run(source, some_text, out, threshold=threshold)
        assert verify(out) == []
        model = load_model(str(out), device="cpu")
        logits.append(model.forward(ids, model.new_cache(1, 40), all_logits=True))
        walked = evaluate(str(out), text=str(some_text), window=32, max_windows=2, device="cpu")
        direct = _nll(model, evaluation_windows(str(some_text), model.tokenizer, window=32)[:2])
        assert walked.nll == pytest.approx(direct, abs=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "t0.0")
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, logits[0], atol=1e-4)
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)


def _nll(model: Any, windows: torch.Tensor) -> float:
    """Mean over the windows, through the engine."""
    total = 0.0
    for row in windows:
        logits = model.forward(row[None], model.new_cache(1, 40), all_logits=True)[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, row[1:])) / len(windows)
    return total


def test_a_stopped_run_ends_with_the_same_weights(make_model, some_text, tmp_path) -> None:
    source = make_model("llama")
    run(source, some_text, tmp_path / "whole")

    def stop(point: train.Point, total: int) -> None:
        if point.step == 4:  # after the save at step 4, in the middle of the next stretch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, some_text, tmp_path / "parts", report=stop)
    seen: list[int] = []
    run(source, some_text, tmp_path / "parts", report=lambda point, total: seen.append(point.step))
    assert seen == [4, 5]
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for name in ("training.jsonl", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_training_comes_nearer_to_the_teacher_and_l1_makes_zeros(
    make_model, some_text, tmp_path
) -> None:
    source = make_model("llama", torch.float32)
    ratios, zeros = [], []
    for steps, l1 in ((1, [0.0]), (60, [0.0]), (60, [30.0])):
        out = tmp_path / f"{steps}-{l1[0]}"
        options = {"steps": steps, "l1": l1, "lr": 1e-2, "substitution": 0.5, "labels": 0.0}
        outcome = run(source, some_text, out, **options)
        history = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
        ratios.append(history[-1]["kl"])
        zeros.append(outcome.held_back["sparsity"])
    assert ratios[1] < 0.5 * ratios[0]
    assert zeros[2] > zeros[1] + 0.05


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_low_rank_and_full_training_move_what_they_should(
    make_model, some_text, tmp_path, mode
) -> None:
    source = make_model("llama")
    rank = {"rank": 2} if mode == "lora" else {}
    run(source, some_text, tmp_path / mode, train=mode, lr=3e-2, **rank)
    before, after = weights(source), weights(tmp_path / mode)
    assert before.keys() == after.keys()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert {n for n in before if ".mlp." in n} <= moved
    assert (moved == {n for n in before if ".mlp." in n}) == (mode == "lora")


def test_recomputing_gives_the_same_gradients(make_model, some_text, tmp_path) -> None:
    source = make_model("llama")
    run(source, some_text, tmp_path / "kept")
    run(source, some_text, tmp_path / "again", recompute=True)
    kept, again = weights(tmp_path / "kept"), weights(tmp_path / "again")
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_state(
    make_model, some_text, tmp_path, monkeypatch
) -> None:
    real = train.kl_divergence
    calls = []

    def broken(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real(teacher, student) * (float("nan") if len(calls) > 10 else 1.0)

    monkeypatch.setattr(train, "kl_divergence", broken)
    with pytest.raises(OptimError) as caught:
        run(make_model("llama"), some_text, tmp_path / "out")
    assert "nan at step 6" in caught.value.message and "step 4" in caught.value.message
    assert caught.value.code == 1 and "prune.lr" in caught.value.fix
    (saved,) = (tmp_path / "out.partial").glob("state-*.pt")
    state = torch.load(saved, weights_only=True)
    assert len(state["history"]) == 4
    assert all(bool(w.isfinite().all()) for w in state["moving"].values())
    assert not (tmp_path / "out").exists()


def test_a_killed_run_goes_on_and_another_recipe_does_not_take_its_state(
    make_model, some_text, tmp_path
) -> None:
    program = """
import json, os, signal, sys
from optim.prune.prosparse import held_back
from optim.prune.prosparse import run as prosparse
from optim.prune.plan import plan
from optim.recipes.build import build_recipe

def report(point, total):
    if point.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

prosparse.prune(plan(build_recipe(None, json.loads(sys.argv[1]), []), device="cpu"), report)
"""
    source, out = make_model("llama"), tmp_path / "parts"
    paths = {"model": str(source), "output": str(out), "calibration.dataset": str(some_text)}
    words = [sys.executable, "-c", program, json.dumps(QUICK | paths)]
    assert subprocess.run(words, capture_output=True, timeout=200).returncode == -signal.SIGKILL
    with pytest.raises(OptimError, match=r"unfinished run of something else.*lr"):
        run(source, some_text, out, lr=1e-4)
    run(source, some_text, tmp_path / "whole")
    seen: list[int] = []
    run(source, some_text, out, report=lambda point, total: seen.append(point.step))
    assert seen == [4, 5]
    whole, parts = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_refusals(make_model, some_text, tmp_path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(OptimError, match="too short") as caught:
        run(make_model("llama"), short, tmp_path / "a")
    assert caught.value.code == 2
    with pytest.raises(OptimError, match="mixture") as caught:
        run(make_model("mixtral"), some_text, tmp_path / "b")
    assert caught.value.code == 2
    with pytest.raises(OptimError, match="measured on"):
        run(make_model("llama"), "builtin:eval", tmp_path / "b")
    assert not list(tmp_path.glob("*.partial"))
    run(make_model("llama"), some_text, tmp_path / "c", steps=1)
    with pytest.raises(OptimError, match="ReLU model already"):
        run(tmp_path / "c", some_text, tmp_path / "d")


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "granite"])
def test_other_families(make_model, some_text, tmp_path, family) -> None:
    from transformers import AutoModelForCausalLM

    outcome = run(make_model(family), some_text, tmp_path / family, steps=1)
    assert 0 < outcome.held_back["sparsity"] < 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / family)
    inside = next(m for m in model.modules() if hasattr(m, "down_proj"))
    act = getattr(inside, "act_fn", None) or inside.activation_fn
    assert float(act(torch.tensor(-1.0))) == 0 and float(act(torch.tensor(2.0))) == 2
