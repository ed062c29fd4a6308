"""`optim pack`, `unpack`, and what the other commands say of packed folders."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from optim.cli import main

Make = Callable[..., Path]


def run(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "argv", ["optim", *map(str, words)])
        return main()


@pytest.fixture(scope="module")
def packed(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "out"
    assert run("pack", make_model("llama"), "-o", folder, "--quiet") == 0
    return folder


def test_the_report(make_model: Make, tmp_path: Path, capfd) -> None:
    assert run("pack", make_model("llama"), "-o", tmp_path / "x", "--layout", "bf12", "--json") == 0
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert report["layout"] == "bf12" and report["packed_weights"] > 50_000
    assert report["limit_bits_per_weight"] < report["packed_bits_per_weight"]
    assert "each decoded again and proven equal" in err and "next: optim run" in err


def test_a_dry_run_writes_nothing(make_model: Make, tmp_path: Path, capfd) -> None:
    assert run("pack", make_model("llama"), "-o", tmp_path / "x", "--dry-run") == 0
    out, err = capfd.readouterr()
    assert "layout df11" in out and "output about" in out and "nothing was written" in err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(make_model: Make, packed: Path, capfd) -> None:
    assert run("pack", make_model("llama"), "-o", packed) == 2
    assert "exists" in capfd.readouterr().err


def test_a_recipe_packs(make_model: Make, tmp_path: Path, packed: Path, capfd) -> None:
    recipe = packed / "recipe.yaml"
    assert run("pack", "--recipe", recipe, "--print-recipe") == 0
    assert "layout: df11" in capfd.readouterr().out
    assert run("pack", "--recipe", recipe, "-o", tmp_path / "again", "--quiet") == 0
    for path in packed.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_wide_models_are_refused_with_the_way_out(make_model: Make, tmp_path: Path, capfd) -> None:
    import torch

    folder = make_model("llama", torch.float32)
    assert run("pack", folder, "-o", tmp_path / "x") == 2
    assert "--cast rounds them to bf16" in capfd.readouterr().err
    assert run("pack", folder, "-o", tmp_path / "x", "--cast") == 0
    assert "that is not lossless" in capfd.readouterr().err


def test_unpack(packed: Path, tmp_path: Path, capfd) -> None:
    assert run("unpack", packed, "-o", tmp_path / "back") == 0
    assert "tensors proven by their sha256" in capfd.readouterr().err
    assert run("unpack", tmp_path / "back", "-o", tmp_path / "never") == 2
    assert run("unpack", packed) == 2


def test_inspect_proves_without_the_original(packed: Path, capfd) -> None:
    assert run("inspect", packed, "--verify", "--tensors") == 0
    out = capfd.readouterr().out
    assert "proven:" in out and "model.layers.1.mlp.down_proj.weight" in out
    assert run("inspect", packed, "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert len(facts["packed"]) == 16 and facts["packed"][0]["format"] == "df11"
    assert all(tensor["limit"] < tensor["bits"] for tensor in facts["packed"])


def test_inspect_finds_a_wrong_manifest(packed: Path, tmp_path: Path, capfd) -> None:
    import shutil

    folder = tmp_path / "wrong"
    shutil.copytree(packed, folder)
    manifest = json.loads((folder / "optim.json").read_text())
    name = "model.layers.0.self_attn.q_proj.weight"
    manifest["original_sha256"][name] = "0" * 64
    (folder / "optim.json").write_text(json.dumps(manifest))
    assert run("inspect", folder, "--verify") == 3
    assert f"{name} does not decode to what was packed" in capfd.readouterr().err


@pytest.mark.parametrize("extra", [[], ["--exact"]])
def test_it_answers_like_the_original(make_model: Make, packed: Path, capfd, extra) -> None:
    words = ["ab", "--raw", "--max-tokens", "12", "--temperature", "0", *extra]
    replies = []
    for model in (make_model("llama"), packed):
        assert run("run", model, *words) == 0
        replies.append(capfd.readouterr().out)
    assert replies[0] == replies[1]


def test_eval_finds_no_difference(make_model: Make, packed: Path, some_text: Path, capfd) -> None:
    words = ["--text", some_text, "--window", "64", "--max-windows", "2", "--json"]
    assert run("eval", packed, "--against", make_model("llama"), *words) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["kl"] == 0 and result["ppl_ratio"] == 1 and result["same_top"] == 1


@pytest.fixture(scope="module")
def both(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe that quantizes and packs, and what it makes."""
    folder = tmp_path_factory.mktemp("both")
    recipe, out = folder / "both.yaml", folder / "out"
    recipe.write_text(
        f"version: 1\nmodel: {make_model('llama')}\n"
        "quantize: {method: rtn, bits: 4}\npack: {layout: bf12}\n"
    )
    assert run("quantize", "--recipe", recipe, "-o", out, "--quiet") == 0
    return recipe, out


def test_what_quantization_leaves_is_packed(both: tuple[Path, Path], tmp_path: Path, capfd) -> None:
    import torch

    from optim.runtime.decoder.linears.bf12 import PlaneLinear
    from optim.runtime.engine.load import load_model

    recipe, out = both
    assert {path.name for path in out.parent.iterdir()} == {recipe.name, "out"}
    manifest = json.loads((out / "optim.json").read_text())
    assert manifest["recipe"]["quantize"]["method"] == "rtn" and "bf12" in str(manifest["recipe"])
    assert manifest["modules"] and manifest["shapes"]
    assert run("inspect", out, "--verify", "--tensors") == 0
    shown = capfd.readouterr().out
    assert "4-bit" in shown and "proven:" in shown and "method rtn" in shown
    alone = tmp_path / "alone"
    assert run("quantize", manifest["recipe"]["model"], "-m", "rtn", "-o", alone, "--quiet") == 0
    ids = torch.arange(7)[None]
    models = [load_model(str(folder), device="cpu") for folder in (out, alone)]
    logits = [m.forward(ids, m.new_cache(), all_logits=True) for m in models]
    assert torch.equal(*logits)
    assert isinstance(models[0].decoder.head, PlaneLinear)
    assert (models[0].decoder.one_call is None) == (models[1].decoder.one_call is None)


def test_its_recipe_makes_it_again(both: tuple[Path, Path], tmp_path: Path) -> None:
    """And a run that has quantized already goes on with what it has."""
    _, out = both
    again = tmp_path / "again"
    assert run("pack", "--recipe", out / "recipe.yaml", "-o", again, "--quiet") == 0
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_quantization_is_not_done_twice(
    both: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    from optim.quant import run as quantizing

    recipe = both[0]
    words = ("quantize", "--recipe", recipe, "-o", tmp_path / "out", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(
            "optim.export.lossless.pack.pack", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert run(*words) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial"}
    monkeypatch.setattr(quantizing, "quantize", lambda *_: pytest.fail("it is there already"))
    assert run(*words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_scales_are_never_cast(both: tuple[Path, Path], tmp_path: Path, capfd) -> None:
    assert run("pack", both[1], "--cast", "-o", tmp_path / "x") == 2
    assert "round its scales" in capfd.readouterr().err


def timed(form: str, *rates: float) -> dict:
    timings = [{"decode_tokens_per_second": {"median": rate}} for rate in rates]
    return {"form": form, "timings": timings}


def test_bench_says_whether_planes_pay() -> None:
    """By the worst of the prompt lengths; of a model that is not packed nothing is said."""
    from optim.cli.bench import _verdict

    assert "gain nothing here (1.04x" in str(
        _verdict([timed("planes", 20, 10.4), timed("bf16", 10, 10)])
    )
    assert "1.50x as fast" in str(_verdict([timed("planes", 20, 15), timed("bf16", 10, 10)]))
    assert _verdict([timed("planes", 20), timed("planes", 10)]) is None


@pytest.mark.parametrize(
    ("device", "gain", "words"),
    [
        ("cpu", 1.2, None),
        ("cpu", 1.0, "1.00x bf16 where it was measured: they save memory alone"),
        ("cuda", None, "never timed on such a device"),
    ],
)
def test_the_model_says_where_planes_do_not_pay(
    packed: Path, device: str, gain: float | None, words: str | None, monkeypatch
) -> None:
    import torch

    from optim.runtime.decoder.linears import bf12 as plane_linear
    from optim.runtime.engine.load import load_model

    model = load_model(str(packed), device="cpu")
    monkeypatch.setattr(plane_linear, "runs_here", lambda device: True)
    monkeypatch.setitem(plane_linear.GAINS, device, gain)
    model.device = torch.device(device)
    assert (model.advice is None) if words is None else words in (model.advice or "")
    monkeypatch.setattr(plane_linear, "runs_here", lambda device: False)
    assert "no C compiler: decoded at load" in (model.advice or "")


def test_the_card_names_no_folder_of_this_machine(make_model: Make, packed: Path) -> None:
    top, _, rest = (packed / "README.md").read_text().removeprefix("---\n").partition("---\n")
    assert "base_model" not in top and "tags: [df11, lossless, optim]" in top
    assert f"optim unpack {packed.name}" in rest and f"optim run {packed.name}" in rest
    about = rest.partition("## Make it again")[0]
    assert str(make_model("llama")) not in about
