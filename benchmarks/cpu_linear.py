"""Microseconds and GB/s of the CPU linears at the shapes of models: one table, one run.

    python benchmarks/cpu_linear.py [--shapes 576x1536] [--tokens 1,8,64,512] [--threads 1,2]

Layers are rotated so that the weights of a row exceed 64 MB and come from memory. Each figure is
the lower quartile of the calls in the time given; the load average is printed, because on a busy
machine no figure means much.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from optim.runtime.formats.pack_quantized import Scheme
from optim.runtime.kernels import torch_tiles
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.cpu import bf16 as cpu_bf16
from optim.runtime.kernels.cpu import torch_int4, w4a8

ROTATED = 64 << 20
SCHEMES = (Scheme(4, 32, False), Scheme(4, 64, False), Scheme(8, 64, True))
Linear = Callable[[Tensor], Tensor]


def packed(module, scheme: Scheme, inputs: int, outputs: int) -> Callable[[], Linear]:  # type: ignore[no-untyped-def]
    """A maker of random packed layers; copies share their integers' cost, not their memory."""
    q = torch.randint(0, 1 << scheme.bits, (outputs, inputs)).to(torch.uint8)
    scale = torch.rand(outputs, scheme.groups(inputs)).to(torch.bfloat16)
    zero = torch.randint(0, 1 << scheme.bits, scale.shape).to(torch.uint8)
    return lambda: module.Weight(q, scale, None if scheme.symmetric else zero, scheme, None)


def dense(dtype: torch.dtype, inputs: int, outputs: int) -> Callable[[], Linear]:
    def make() -> Linear:
        weight = torch.randn(outputs, inputs).to(dtype)
        return lambda x: F.linear(x.to(dtype), weight)

    return make


def head(inputs: int, outputs: int) -> Callable[[], Linear]:
    def make() -> Linear:
        weight = torch.randn(outputs, inputs).to(torch.bfloat16)
        return lambda x: cpu_bf16.linear(x, weight)

    return make


def candidates(inputs: int, outputs: int) -> Iterator[tuple[str, int, Callable[[], Linear]]]:
    """(name, bytes of one layer, maker) for all that works on this machine."""
    size = inputs * outputs
    for module in (w4a8, torch_int4, torch_tiles):
        try:
            getattr(module, "check", lambda: "")()
        except NoKernel as reason:
            print(f"# {module.__name__.rpartition('.')[2]}: {reason}")
            continue
        for scheme in SCHEMES:
            if module.supports(scheme, torch.device("cpu")):
                make = packed(module, scheme, inputs, outputs)
                yield f"{module.__name__.rpartition('.')[2]} {scheme}", make().nbytes, make
    if cpu_bf16.usable():
        yield "cpu_bf16", 2 * size, head(inputs, outputs)
    yield "torch fp32", 4 * size, dense(torch.float32, inputs, outputs)
    yield "torch bf16", 2 * size, dense(torch.bfloat16, inputs, outputs)


def microseconds(layers: list[Linear], x: Tensor, seconds: float) -> float:
    """Lower quartile of one call, rotating over `layers`."""
    layers[0](x)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 4:
        start = time.perf_counter()
        layers[len(times) % len(layers)](x)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 4] * 1e6


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shapes", default="576x1536,1536x576,2048x8192", help="in x out")
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=0.3, help="a figure")
    chosen = parser.parse_args()
    tokens = [int(n) for n in chosen.tokens.split(",")]
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"# {processor()}, {capability}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"{'in x out':>12} {'threads':>7}  {'linear':<28}", *(f"{n:>9} tok" for n in tokens), "GB/s"
    )
    for shape in chosen.shapes.split(","):
        inputs, outputs = (int(n) for n in shape.split("x"))
        for name, nbytes, make in candidates(inputs, outputs):
            layers = [make() for _ in range(max(1, min(64, ROTATED // nbytes)))]
            for threads in (int(n) for n in chosen.threads.split(",")):
                torch.set_num_threads(threads)
                inputs_of = [torch.randn(n, inputs) for n in tokens]
                times = [microseconds(layers, x, chosen.seconds) for x in inputs_of]
                cells = (f"{value:>10.1f} us" for value in times)
                rate = nbytes / times[0] / 1e3
                print(f"{shape:>12} {threads:>7}  {name:<28}", *cells, f"{rate:5.1f}", flush=True)


if __name__ == "__main__":
    main()
