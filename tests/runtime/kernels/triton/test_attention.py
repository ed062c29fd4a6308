"""One token's attention kernel against torch: in the interpreter, on a card (`-m gpu`) the same."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from optim.runtime.cache.attention import Rule
from optim.runtime.cache.device_position import Store, reference
from optim.runtime.cache.quantized import quantize

k = pytest.importorskip("optim.runtime.kernels.triton.attention", exc_type=ImportError)

DEVICES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass(frozen=True)
class Case:
    """`base` positions at `old` bits, then those up to `seen` at `bits`, in buffers of `room`."""

    bits: int
    seen: int
    room: int
    base: int = 0
    heads: int = 4
    kv: int = 2
    dim: int = 16
    window: int | None = None
    cap: float | None = None
    padding: tuple[int, ...] | None = None
    prefix: int = 0


CASES = [
    Case(16, 1, 5),
    Case(16, 37, 128, heads=9, kv=3, dim=64),
    Case(16, 200, 256, heads=2, kv=2, dim=80),
    Case(16, 200, 256, heads=20, kv=1, dim=24, window=70),
    Case(16, 130, 140, cap=3.0, window=64),
    Case(16, 90, 128, padding=(0, 17, 89)),
    Case(16, 90, 128, padding=(0, 40), prefix=3, window=80),
    Case(8, 150, 192, dim=64),
    Case(8, 90, 128, window=33, padding=(5, 0)),
    Case(4, 150, 192, base=100, dim=32),
    Case(4, 60, 192, base=0),
    Case(4, 150, 150, base=70, window=96, cap=5.0, padding=(0, 80)),
]


def stores(case: Case, rows: int) -> list[Store]:
    def packed(bits: int, room: int, old: bool) -> Store:
        pairs = [quantize(torch.randn(rows, room, case.dim) + 0.5, bits) for _ in range(2)]
        (keys, key_grid), (values, value_grid) = pairs
        return Store(bits, keys, values, key_grid, value_grid, old)

    if case.bits == 16:
        return [Store(16, *torch.randn(2, rows, case.room, case.dim))]
    if case.bits == 8:
        return [packed(8, case.room, False)]
    return [packed(4, case.room, True), packed(8, 128, False)]


def on(store: Store, device: str) -> Store:
    tensors = (store.keys, store.values, store.key_grid, store.value_grid)
    return Store(store.bits, *(None if x is None else x.to(device) for x in tensors), store.old)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_torch(
    device: str, split: int, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(k, "_split", lambda capacity, rows, device: split)
    torch.manual_seed(case.seen)
    batch = len(case.padding or (0,))
    held = stores(case, batch * case.kv)
    q = torch.randn(batch, case.heads, case.dim)
    place = torch.tensor([0, case.seen - 1 - case.base, case.base, case.seen])
    padding = None if case.padding is None else torch.tensor(case.padding)
    rule = Rule(case.dim**-0.5, case.window, case.cap)
    wanted = reference(q, held, place, rule, padding, case.prefix)
    there = None if padding is None else padding.to(device)
    moved = [on(store, device) for store in held]
    got = k.attend(q.to(device), moved, place.to(device), rule, there, case.prefix).cpu()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_what_lies_beyond_the_token_is_not_read() -> None:
    """Buffers hold leftovers of what was cut off: NaN there must not be seen."""
    case = Case(16, 70, 128, dim=16)
    (store,) = stores(case, 2)
    q, place = torch.randn(1, 4, 16), torch.tensor([0, 69, 0, 70])
    wanted = k.attend(q, [store], place, Rule(0.25), None, 0)
    store.keys[:, 70:], store.values[:, 70:] = torch.nan, torch.nan
    assert torch.equal(k.attend(q, [store], place, Rule(0.25), None, 0), wanted)
    assert not wanted.isnan().any()


def one_by_one(q: Tensor, store: Store, seen: int) -> Tensor:
    rows = q[0].view(2, 2, 16).double()
    keys, values = store.keys[:, :seen].double(), store.values[:, :seen].double()
    return torch.softmax(rows @ keys.mT / 4, -1) @ values


def test_the_reference_is_softmax() -> None:
    torch.manual_seed(0)
    (store,) = stores(Case(16, 50, 64), 2)
    q, place = torch.randn(1, 4, 16), torch.tensor([0, 49, 0, 50])
    got = reference(q, [store], place, Rule(0.25), None, 0)
    torch.testing.assert_close(got.double().view(2, 2, 16), one_by_one(q, store, 50))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optim.runtime.kernels.triton import attention as k
for target in GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64):
    for bits in (16, 8, 4):
        constants = dict(BITS=bits, OLD=bits == 4, HAS_PADDING=True, HAS_CAP=True, GROUP=4, D=128,
                         BLOCK_D=128, ROWS=16, TILE=64, SPLIT=8)
        kind = "*bf16" if bits == 16 else "*u8"
        types = dict(q="*bf16", keys=kind, values=kind, key_grid="*bf16", value_grid="*bf16",
                     padding="*i64", place="*i64", sums="*fp32", stats="*fp32", window="i64",
                     scale="fp32", cap="fp32")
        signature = {name: types.get(name, "i32") for name in k._attend.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(k._attend, signature, constexprs=constants)
        print(target.arch, bits, list(triton.compile(source, target=target).asm)[-1])
    constants = dict(D=128, BLOCK_D=128, PARTS=16)
    signature = dict(sums="*fp32", stats="*fp32", out="*bf16", parts="i32")
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(k._combine, signature, constexprs=constants)
    print(target.arch, list(triton.compile(source, target=target).asm)[-1])
"""


def test_it_compiles_for_hopper_and_mi300_without_one(tmp_path) -> None:  # type: ignore[no-untyped-def]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = [(90, "cubin"), ("gfx942", "hsaco")]
    wanted = [f"{a}{bits} {b}" for a, b in kinds for bits in (" 16", " 8", " 4", "")]
    assert done.stdout.splitlines() == wanted
