"""One linear on a GPU: packed weights and 12-bit planes beside cuBLAS, tinygemm and GemLite.

    python benchmarks/gpu_linear.py [--shapes 4096x4096 ...] [--tokens 1 2 4 ...] [--rounds 20]

Needs a GPU; refuses without one. Each line is JSON, for one shape and number of tokens:
microseconds a call of each form, its ratio to cuBLAS in bf16, and at which share of `--bandwidth`
its weights are read. Calls are recorded in one CUDA graph over as many copies of the weight as fill
the card's L2 cache four times, so launches cost nothing and every weight comes from memory.
tinygemm is torch's own int4 product; GemLite is measured where it is installed.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels.triton import bf12, w4a16

SHAPES = ("4096x4096", "14336x4096", "4096x14336", "8192x8192", "28672x8192", "128256x4096")
TOKENS = (1, 2, 4, 8, 16, 32, 64)
GROUP = 128
COLD = 4  # times the L2 cache

Call = Callable[[Tensor], Tensor]


def bf16(weight: Tensor) -> tuple[Call, int]:
    held = weight.clone()
    return lambda x: x @ held.T, held.nbytes


def planes(weight: Tensor) -> tuple[Call, int]:
    made = bf12.Weight(weight)
    return made, made.nbytes


def packed(bits: int) -> Callable[[Tensor], tuple[Call, int]]:
    def make(weight: Tensor) -> tuple[Call, int]:
        q = torch.randint(0, 1 << bits, weight.shape, device="cuda", dtype=torch.uint8)
        groups = weight.shape[1] // GROUP
        scale = torch.rand(weight.shape[0], groups, device="cuda").bfloat16() * 1e-2
        zero = torch.full_like(scale, 1 << (bits - 1), dtype=torch.uint8)
        made = w4a16.Weight(q, scale, zero, Scheme(bits, GROUP, False), None)
        return made, made.nbytes

    return make


def tinygemm(weight: Tensor) -> tuple[Call, int]:
    outputs, inputs = weight.shape
    q = torch.randint(0, 256, (outputs, inputs // 2), device="cuda", dtype=torch.uint8)
    words = torch.ops.aten._convert_weight_to_int4pack(q, 8)
    grid = torch.rand(inputs // GROUP, outputs, 2, device="cuda").bfloat16() * 1e-2
    size = words.nbytes + grid.nbytes
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, words, GROUP, grid), size


def gemlite(weight: Tensor) -> tuple[Call, int]:
    from gemlite import DType, GemLiteLinear  # type: ignore[import-not-found]

    outputs, inputs = weight.shape
    linear = GemLiteLinear(
        W_nbits=4,
        group_size=GROUP,
        in_features=inputs,
        out_features=outputs,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    q = torch.randint(0, 16, weight.shape, device="cuda", dtype=torch.uint8)
    scale = torch.rand(outputs * inputs // GROUP, 1, device="cuda").bfloat16() * 1e-2
    linear.pack(q, scale, torch.full_like(scale, 8.0), None)
    return linear, weight.numel() // 2 + 4 * scale.numel()


FORMS: dict[str, Callable[[Tensor], tuple[Call, int]]] = {
    "bf16": bf16,
    "bf12": planes,
    "int4": packed(4),
    "int8": packed(8),
    "tinygemm": tinygemm,
    "gemlite": gemlite,
}


def measured(
    make: Callable[[Tensor], tuple[Call, int]], weight: Tensor, x: Tensor, rounds: int
) -> tuple[float, int]:
    """Median seconds of one call, and the bytes of its weight."""
    first, size = make(weight)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = [first, *(make(weight)[0] for _ in range(min(64, COLD * cache // size)))]
    for call in copies[:2]:
        call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in copies:
            call(x)
    return statistics.median(_times(graph, rounds)) / len(copies), size


def _times(graph: Any, rounds: int) -> Iterator[float]:
    for at in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if at >= 3:
            yield start.elapsed_time(end) / 1e3


def line(shape: str, tokens: int, options: argparse.Namespace) -> dict[str, object]:
    outputs, inputs = map(int, shape.split("x"))
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.02
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    row: dict[str, object] = {"shape": shape, "tokens": tokens}
    base = 0.0
    for form in options.forms:
        try:
            seconds, size = measured(FORMS[form], weight, x, options.rounds)
        except (ImportError, RuntimeError) as error:
            row[form] = {"failed": str(error).partition("\n")[0]}
            continue
        base = base or seconds
        row[form] = {
            "us": round(seconds * 1e6, 2),
            "over_bf16": round(base / seconds, 2),
            "of_bandwidth": round(size / seconds / options.bandwidth, 2),
        }
    return row


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU: nothing was measured")
    print(json.dumps({"card": torch.cuda.get_device_name(), "torch": torch.__version__}))
    for shape in options.shapes:
        for tokens in options.tokens:
            print(json.dumps(line(shape, tokens, options)), flush=True)


if __name__ == "__main__":
    main()
