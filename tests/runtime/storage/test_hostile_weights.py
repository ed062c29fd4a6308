"""Weight files that came from anyone: what they say is bounded and true, or refused."""

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.storage.names import canonical_parts
from optim.runtime.storage.tensors import TensorInfo, open_files
from optim.runtime.system.files import MAX_JSON, load_json

SINGLE, BIN = "model.safetensors", "pytorch_model.bin"
HUGE = "9" * 19


def header(folder: Path, text: bytes) -> None:
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + b"\0\0")


@pytest.mark.parametrize(
    "shape",
    [f"[{','.join([HUGE] * 100_000)}]", f"[{HUGE}]", "[-1]", "[true]", "[1.0]", "[null]", "{}"],
)
def test_a_shape_that_cannot_be_is_refused(tmp_path: Path, shape: str) -> None:
    header(tmp_path, f'{{"a":{{"dtype":"BF16","shape":{shape},"data_offsets":[0,2]}}}}'.encode())
    with pytest.raises(OptimError, match=r"is damaged: (the entry of )?a ") as caught:
        open_files(tmp_path)
    assert caught.value.code == USAGE


def test_a_large_file_of_json_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_JSON + 1)
    with pytest.raises(OptimError, match="larger than 32 MB"):
        load_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["x" * 300, "a/b", "..", "", "a\\b", "\0", "\ud800"])
def test_an_index_names_files_of_its_folder(tmp_path: Path, name: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(OptimError):
        open_files(tmp_path)


ODD: dict[str, Callable[[], Any]] = {
    "a view of one number": lambda: torch.zeros(1).expand(1 << 40),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "compressed rows": lambda: torch.eye(4).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
    "complex": lambda: torch.zeros(2, dtype=torch.complex64),
    "on no device": lambda: torch.zeros(2, device="meta"),
    "a number": lambda: 3,
    "a list": lambda: [torch.zeros(2)],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_a_torch_file_holds_plain_tensors(tmp_path: Path, kind: str) -> None:
    torch.save({"a": ODD[kind]()}, tmp_path / BIN)
    with pytest.raises(OptimError) as caught:
        open_files(tmp_path)
    assert caught.value.code == USAGE


@pytest.mark.parametrize("content", [torch.zeros(2), [1], {3: torch.zeros(2)}, None])
def test_a_torch_file_is_a_dictionary(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / BIN)
    with pytest.raises(OptimError, match="dictionary"):
        open_files(tmp_path)


def test_a_compressed_torch_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / BIN, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(OptimError, match="compressed"):
        open_files(tmp_path)


@pytest.mark.parametrize("data", [b"", b"PK\x05\x06" + bytes(18), b"\x80\x02}q\x00.", bytes(100)])
def test_what_is_no_torch_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / BIN).write_bytes(data)
    with pytest.raises(OptimError, match="damaged"):
        open_files(tmp_path)


def test_a_torch_file_with_parameters_and_views_is_read(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state: dict[str, Tensor] = {"a": torch.nn.Parameter(whole.clone()), "b": whole.T, "c": whole[1]}
    torch.save(state, tmp_path / BIN)
    store = open_files(tmp_path)
    from optim.runtime.storage.tensors import Part

    assert all(torch.equal(store.read(Part(name)), state[name]) for name in state)


def test_two_tensors_of_one_name_are_refused() -> None:
    info = TensorInfo((2, 2), torch.float32, 16)
    names = ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight")
    with pytest.raises(OptimError, match="are both model"):
        canonical_parts(dict.fromkeys(names, info), {"hidden_size": 2}, "mixtral")


def test_an_empty_stack_of_experts_is_no_stack() -> None:
    infos = {"model.layers.0.mlp.experts.down_proj": TensorInfo((2**62, 64, 0), torch.float32, 0)}
    parts, _ = canonical_parts(infos, {"hidden_size": 64}, "mixtral")
    assert len(parts) == 1
