"""CPU time of one token's attention in C, for caches of 16, 8 and 4 bits (docs/engine.md).

    python benchmarks/cpu_attention.py [--positions 64 1024]

All 30 blocks of `demo` (9 query heads, 3 key heads of 64), one thread, caches filled with noise:
lower quartiles of 40 tokens, in milliseconds a token.
"""

import argparse
import json
import time
from statistics import quantiles

import torch

from optim.runtime.cache.full import Layer, static_layers
from optim.runtime.cache.quantized import packed_layers
from optim.runtime.kernels.cpu.step import Attend

BLOCKS, HEADS, KV, DIM = 30, 9, 3, 64
CPU = torch.device("cpu")


def filled(bits: int, positions: int) -> list[Layer]:
    """A cache's layers, with so many positions of noise."""
    if bits == 16:
        layers = static_layers(BLOCKS, 1, KV, DIM, CPU, torch.float16)
    else:
        layers = packed_layers(BLOCKS, 1, KV, DIM, CPU, bits)
    k, v = torch.randn(2, 1, positions, KV, DIM)
    for layer in layers:
        layer.grow(positions + 128)
        for at in range(0, positions, 256):
            layer.write(k[:, at : at + 256], v[:, at : at + 256], at)
    return layers


def milliseconds(bits: int, positions: int) -> float:
    layers, attend = filled(bits, positions), Attend(HEADS, KV, DIM, DIM**-0.5, None, 0.0)
    qkv, times = torch.randn(1, HEADS + 2 * KV, DIM), []
    for _ in range(40):
        start = time.process_time()
        for layer in layers:
            attend(qkv, layer, positions, None, None)
        times.append(time.process_time() - start)
    return round(1e3 * quantiles(times, n=4)[0], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, nargs="+", default=[64, 1024])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for positions in options.positions:
        row = {f"{bits} bits": milliseconds(bits, positions) for bits in (16, 8, 4)}
        print(json.dumps({"positions": positions} | row), flush=True)


if __name__ == "__main__":
    main()
