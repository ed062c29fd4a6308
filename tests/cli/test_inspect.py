"""`optim inspect`: the size table, the manifest, and `--verify`."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import optim.cli
from optim.runtime.formats.pack_quantized import Scheme, pack, write_config
from optim.runtime.system.hashes import file_sha256

Captured = pytest.CaptureFixture[str]

SHARD = "model.safetensors"
MLP = "model.layers.0.mlp.down_proj"


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as `optim quantize` writes it, with one packed linear."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "small"
    folder.mkdir()
    scheme = Scheme(bits=3, group_size=16, symmetric=False)
    q = torch.zeros(8, 32, dtype=torch.uint8)
    zero = torch.zeros(8, 2, dtype=torch.uint8)
    packed = pack(q, torch.ones(8, 2, dtype=torch.bfloat16), zero, scheme)
    tensors = {f"{MLP}.{key}": value for key, value in packed.items()}
    for name, shape in {
        "model.embed_tokens.weight": (10, 32),
        "model.layers.0.self_attn.q_proj.weight": (32, 32),
        "model.layers.0.self_attn.q_proj.bias": (32,),
        "model.layers.0.input_layernorm.weight": (32,),
    }.items():
        tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
    save_file(tensors, folder / SHARD)
    config = {"model_type": "llama", "quantization_config": write_config({MLP: scheme})}
    (folder / "config.json").write_text(json.dumps(config))
    manifest = {
        "source": {"name": "big", "sha256": "ab" * 32},
        "recipe": {
            "calibration": {"dataset": "builtin:mixed"},
            "quantize": {"method": "awq", "bits": 3, "group_size": 16, "sym": False},
        },
        "calibration": {"samples": 4, "seq_len": 32, "sha256": "cd" * 32},
        "blocks": [{"error": 0.25, "rounding_error": 0.5}, {"error": 0.75, "rounding_error": 1.5}],
        "notes": ["block 0: a note"],
        "shards": {SHARD: file_sha256(folder / SHARD)},
    }
    (folder / "optim.json").write_text(json.dumps(manifest))
    return folder


def optim_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["optim", "inspect", *arguments])
    return optim.cli.main()


# 3 bits: 8 rows of 3 words; scales 8 x 2 bf16; zero points 1 word x 2; shape 2 x int64.
PACKED = 8 * 3 * 4 + 8 * 2 * 2 + 1 * 2 * 4 + 16
ROWS = {
    ("self_attn.*", "bf16"): (1, 1024, 2048),
    ("embed_tokens", "bf16"): (1, 320, 640),
    ("mlp.*", "3-bit g16 asym"): (1, 256, PACKED),
    ("norms", "bf16"): (1, 32, 64),
    ("biases", "bf16"): (1, 32, 64),
}


def test_json_counts_every_byte(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert optim_main(monkeypatch, "small", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rows = {
        (row["group"], row["format"]): (row["tensors"], row["params"], row["nbytes"])
        for row in found["groups"]
    }
    assert rows == ROWS
    assert found["params"] == sum(params for _, params, _ in ROWS.values())
    assert found["nbytes"] == sum(nbytes for _, _, nbytes in ROWS.values())
    assert found["bits_per_weight"] == 8 * found["nbytes"] / found["params"]
    assert found["file_bytes"] == (artifact / SHARD).stat().st_size
    assert found["manifest"]["source"]["name"] == "big"


def test_the_table_and_the_manifest(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert optim_main(monkeypatch, "small", "--verify") == 0
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines() if line.strip()]
    assert lines[0].startswith("small · llama · 1.66 k parameters · 14.27 bits/weight · ")
    assert lines[3] == "self_attn.* bf16 1 1.02 k 16.00 2.05 kB"
    assert lines[5] == f"mlp.* 3-bit g16 asym 1 256 {8 * PACKED / 256:.2f} {PACKED} B"
    assert lines[8:] == [
        "total 5 1.66 k 14.27 2.97 kB",
        "made from big (sha256 abababababab)",
        "method awq, bits 3, group_size 16, sym False",
        "calibrated on builtin:mixed, 4 x 32 tokens (sha256 cdcdcdcdcdcd)",
        "mean error of a block 5.00e-01; plain rounding 1.00e+00",
        "verified: every shard is as it was written",
    ]
    assert err == "block 0: a note\n"


def damage(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def test_verify_finds_one_flipped_bit(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    damage(artifact / SHARD)
    assert optim_main(monkeypatch, "small", "--verify", "--json") == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["verified"] is False
    assert err == (
        "error: small is not what its manifest says\n"
        "  model.safetensors has changed since it was written\n"
        "  fix: make it again, or fetch it again\n"
    )


def test_verify_finds_missing_and_strange_shards(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    manifest = json.loads((artifact / "optim.json").read_text())
    manifest["shards"] = {"gone.safetensors": "0" * 64}
    (artifact / "optim.json").write_text(json.dumps(manifest))
    assert optim_main(monkeypatch, "small", "--verify") == 3
    err = capsys.readouterr().err
    assert "  model.safetensors is not in the manifest\n  gone.safetensors is missing\n" in err


def test_verify_without_a_manifest_is_bad_input(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    (artifact / "optim.json").unlink()
    assert optim_main(monkeypatch, "small", "--verify") == 2
    assert capsys.readouterr().err == (
        "error: there is no optim.json with hashes to verify\n"
        "  fix: only artifacts that optim wrote carry hashes\n"
    )


def test_a_hostile_manifest_is_refused_by_name(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    hostile = {"source": 3, "recipe": [], "calibration": "x", "blocks": [1, {"error": "x"}]}
    (artifact / "optim.json").write_text(json.dumps(hostile))
    assert optim_main(monkeypatch, "small") == 2
    assert "optim.json is damaged: source" in capsys.readouterr().err


def test_a_gguf_file_is_shown_as_it_is_stored(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert optim_main(monkeypatch, "demo") == 0
    shown = capsys.readouterr().out
    assert "5.74 bits/weight" in shown
    assert "Q4_1" in shown
    assert "by type:" in shown
    assert optim_main(monkeypatch, "demo", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert {row["format"]: row["tensors"] for row in facts["types"]} == {
        **{"Q4_1": 210, "Q8_0": 1, "F32": 61}
    }
    assert facts["file_bytes"] - 2_000_000 < facts["nbytes"] < facts["file_bytes"]
    assert facts["packed"] == []
