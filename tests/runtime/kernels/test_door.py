"""The door to kernels: what is not what a kernel reads does not pass, and there is no other way."""

import ast
import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from optim.runtime.kernels import compile, door
from optim.runtime.kernels.cpu import attention_prompt, bf12, decode, df11, shortlist, skip_dense
from optim.runtime.kernels.door import Struct, WrongTensor, address, array_address, check_launch

ROOT = Path(__file__).parent.parent.parent.parent
FOLDERS = ("cli", "quant", "prune", "export", "runtime", "recipes")
SOURCES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
KERNELS = Path(door.__file__).parent
F32 = torch.float32


def test_a_tensor_that_fits_is_where_it_is() -> None:
    x = torch.randn(3, 5)
    assert address(x, F32, 15) == x.data_ptr()
    assert address(x[1:], F32, 10) == x.data_ptr() + 20


@pytest.mark.parametrize(
    ("tensor", "dtype", "count", "words"),
    [
        (torch.zeros(4), F32, 5, r"5 x torch.float32 on cpu, got torch.float32 \[4\]"),
        (torch.zeros(4), F32, 3, "3 x"),
        (torch.zeros(4, dtype=torch.bfloat16), F32, 4, "torch.bfloat16"),
        (torch.zeros(4, 4).T[:2], F32, 8, "strides"),
        (torch.zeros(8)[::2], F32, 4, "strides"),
        (torch.zeros(4, device="meta"), F32, 4, "on meta"),
    ],
)
def test_any_other_tensor_is_refused(
    tensor: torch.Tensor, dtype: torch.dtype, count: int, words: str
) -> None:
    with pytest.raises(WrongTensor, match=words):
        address(tensor, dtype, count)
    with pytest.raises(WrongTensor):
        check_launch(torch.device("cpu"), (tensor, dtype, count))


def test_arrays_go_through_the_same_door() -> None:
    x = np.zeros((3, 5), np.uint8)
    assert array_address(x, np.uint8, 15, write=True) == x.ctypes.data
    x.flags.writeable = False
    array_address(x, np.uint8, 15)
    for array, count, write in (
        (x, 15, True),
        (x, 14, False),
        (x.T, 15, False),
        (x.view(np.int8), 15, False),
    ):
        with pytest.raises(WrongTensor):
            array_address(array, np.uint8, count, write=write)


def test_triton_takes_one_of_several_dtypes() -> None:
    x, here = torch.zeros(4, dtype=torch.bfloat16), torch.device("cpu")
    check_launch(here, (x, (torch.bfloat16, F32), 4))
    with pytest.raises(WrongTensor):
        check_launch(here, (x, (torch.bfloat16, F32), 4), (x, (torch.float16, F32), 4))


class _Pair(Struct):
    NAME = "Pair"
    _fields_ = (("x", ctypes.c_void_p), ("y", ctypes.c_void_p))


def test_a_structure_keeps_what_it_points_to_and_looks_at_what_is_new() -> None:
    pair, x = _Pair(), torch.zeros(4)
    pair.point("x", x, F32, 4)
    pair.point("y", None, F32, 4)
    assert (pair.x, pair.y) == (x.data_ptr(), None)
    pair.point("x", x, F32, 4)
    with pytest.raises(WrongTensor):
        pair.point("x", x, F32, 5)
    with pytest.raises(WrongTensor):
        pair.point("x", torch.zeros(5), F32, 4)
    pair.point("x", None, F32, 4)
    assert pair.x is None


def _attributes(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_nothing_else_takes_an_address() -> None:
    """A recorded step on a GPU tells its buffers apart by their addresses; nothing reads there."""
    found = {str(f.relative_to(ROOT)) for f in SOURCES if _attributes(f) & {"data_ptr", "ctypes"}}
    assert len(SOURCES) > 100
    door_file = str(Path(door.__file__).resolve().relative_to(ROOT.resolve()))
    assert {path for path in found if Path(path).stem not in ("graph", "cuda_graph")} == {door_file}


def test_every_structure_goes_through_the_door() -> None:
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and file.stem != "door":
                assert "ctypes.Structure" not in map(ast.unparse, node.bases), (file, node.name)


STRUCTS = [kind for kind in Struct.__subclasses__() if kind.__module__.startswith("optim.")]


@pytest.mark.skipif(not skip_dense.usable(), reason="no C compiler")
def test_every_structure_is_compared_with_c(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: set[type[Struct]] = set()

    def library(*names: str, structs: tuple[type[Struct], ...] = ()) -> ctypes.CDLL:
        compared.update(structs)
        return compile.library(*names, structs=structs)

    for module in (attention_prompt, bf12, decode, df11, shortlist, skip_dense):
        monkeypatch.setattr(module, "library", library)
        module.load.__wrapped__()
    assert compared == set(STRUCTS) and len(compared) > 10


@pytest.mark.parametrize("kind", STRUCTS)
def test_fields_stand_in_the_order_of_c(kind: type[Struct]) -> None:
    assert _c_fields(kind.NAME) == [name for name, *_ in kind._fields_]


def _c_fields(name: str) -> list[str]:
    """The fields of a structure as its C source lists them."""
    text = "\n".join(f.read_text() for pattern in ("*.h", "*.c") for f in KERNELS.rglob(pattern))
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    (body,) = re.findall(r"typedef struct \{([^}]*)\} " + name + ";", text)
    parts = [part for part in body.split(";") if part.strip()]
    return [re.findall(r"\w+", one)[-1] for part in parts for one in part.split(",")]
