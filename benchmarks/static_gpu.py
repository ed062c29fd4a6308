"""Static integers on a GPU: exactness, then layers of a 7B shape against cuBLAS in bf16.

    python benchmarks/static_gpu.py [--rounds 50]

Needs a GPU; refuses without one. Each line is JSON: first whether the integers are those of the
CPU's int32 reference, then for each layer and number of tokens the milliseconds of the bf16
product, of the product of nibbles and codes, and of the norm that emits the codes before it.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from optim.runtime.formats.static_int import accumulate, pack_nibbles
from optim.runtime.kernels.triton import static_int

TOKENS = (1, 3, 16, 64, 1000)
INPUTS = (576, 640, 1536, 4096, 14336)
LAYERS = {"qkv": (12288, 4096), "out": (4096, 4096), "up": (22016, 4096), "down": (4096, 11008)}


def exact() -> dict[str, bool]:
    """Whether every product is bit for bit the reference's."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for inputs in INPUTS:
        u = torch.randint(0, 16, (256, inputs), generator=generator, dtype=torch.uint8)
        packed = pack_nibbles(u).cuda()
        for tokens in TOKENS:
            codes = torch.randint(-128, 128, (tokens, inputs), generator=generator).to(torch.int8)
            got = static_int.whole(codes.cuda(), packed).cpu()
            found[f"{tokens}x{inputs}"] = torch.equal(got, accumulate(codes, u))
    return found


def timed(call: Callable[[], object], rounds: int) -> float:
    """Median milliseconds of a call, caches cold enough: weights are read anew each time."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for at in range(rounds + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if at >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def layer(outputs: int, inputs: int, tokens: int, rounds: int) -> dict[str, float]:
    """One layer: bf16, static, and the norm."""
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    packed = torch.randint(0, 256, (outputs, inputs // 2), device="cuda", dtype=torch.uint8)
    gain = torch.ones(inputs, device="cuda")
    offset = torch.full_like(gain, 0.5)

    def norm() -> tuple[Tensor, Tensor]:
        return static_int.norm_codes(x, gain, offset, None, 1e-5, 4)

    codes, sums = norm()
    return {
        "bf16_ms": timed(lambda: x @ weight.T, rounds),
        "static_ms": timed(lambda: static_int.product(codes, sums, packed), rounds),
        "norm_ms": timed(norm, rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU: nothing was measured")
    print(json.dumps({"card": torch.cuda.get_device_name(), "torch": torch.__version__}))
    print(json.dumps({"exact": exact()}), flush=True)
    for name, (outputs, inputs) in LAYERS.items():
        for tokens in (1, 16, 2048):
            row = layer(outputs, inputs, tokens, options.rounds)
            row["speed_up"] = row["bf16_ms"] / row["static_ms"]
            print(json.dumps({"layer": name, "tokens": tokens, **row}), flush=True)


if __name__ == "__main__":
    main()
