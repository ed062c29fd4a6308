"""How fast a feed-forward and a model decode when part of the weights is not read, on this CPU.

    python benchmarks/sparsity_speed.py [--threads 1] [--hidden 2048] [--neurons 8192] [--rounds 15]
    python benchmarks/sparsity_speed.py --model DENSE SPARSE ... [--new-tokens 32]

The feed-forward is gated with random weights, batch 1, and held several times over so that no copy
is in a cache when its turn comes. All variants of a row run in turn, round after round; times are
medians. With one thread they are CPU time, which other work on the machine disturbs less. With
`--model` whole models decode in turn. One JSON line a row.
"""

import argparse
import json
from collections.abc import Callable
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import torch
from torch import Tensor

from optim.runtime.architecture.activations import ACTIVATIONS
from optim.runtime.decoder.layers import MLP
from optim.runtime.decoder.linears.base import MaskedLinear
from optim.runtime.decoder.linears.dense import DenseLinear
from optim.runtime.decoder.linears.pack_quantized import PackedLinear
from optim.runtime.decoder.linears.sparse import SparseLinear
from optim.runtime.engine.load import load_model
from optim.runtime.formats.pack_quantized import pack
from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels.cpu import skip_dense
from optim.runtime.kernels.cpu.skip_int4 import NOTHING
from optim.runtime.sparsity.gated_ffn import GatedFeedForward

Call = Callable[[Tensor], Any]
SPREAD = 128 * 2**20  # bytes over which copies of a feed-forward are laid out
SCHEME = Scheme(4, 128, False)
PROMPT = "Whoever reads a text token by token needs few of the weights for each of them. "


def now() -> float:
    """Seconds: of this thread where it does all the work."""
    return thread_time() if torch.get_num_threads() == 1 else perf_counter()


def timed(variants: dict[str, list[Call]], x: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds a call of each variant; its copies take turns, and so do variants."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, copies in variants.items():
            start = now()
            for call in copies:
                call(x)
            taken[name].append((now() - start) / len(copies) * 1e3)
    return {name: median(times[1:]) for name, times in taken.items()}


def show(title: str, found: dict[str, float]) -> None:
    """One line: milliseconds, and each variant's speed against `dense`."""
    dense = found["dense"]
    row = {name: {"ms": round(ms, 4), "speed": round(dense / ms, 2)} for name, ms in found.items()}
    print(json.dumps({"row": title, **row}), flush=True)


def packed(outputs: int, inputs: int, generator: torch.Generator) -> PackedLinear:
    """A random int4 linear, not prepared."""
    groups = SCHEME.groups(inputs)
    q = torch.randint(0, 16, (outputs, inputs), generator=generator).to(torch.uint8)
    scale = (torch.rand(outputs, groups, generator=generator) * 0.01).bfloat16()
    zero = torch.randint(0, 16, (outputs, groups), generator=generator).to(torch.uint8)
    return PackedLinear(pack(q, scale, zero, SCHEME), SCHEME)


class Shapes:
    """Makes the linears of one feed-forward in a number of copies."""

    def __init__(self, hidden: int, neurons: int, kind: str) -> None:
        self.hidden, self.neurons, self.kind = hidden, neurons, kind
        size = 3 * hidden * neurons * (2 if kind == "bf16" else 0.53)
        self.copies = max(1, int(SPREAD / size))
        self.generator = torch.Generator().manual_seed(0)

    def linear(self, outputs: int, inputs: int) -> Any:
        """A dense linear of the kind."""
        if self.kind == "int4":
            return packed(outputs, inputs, self.generator)
        weight = torch.randn(outputs, inputs, generator=self.generator) * 0.02
        return DenseLinear(weight.bfloat16())


def sparse(linear: Any, threshold: float) -> SparseLinear | None:
    """The same linear held input by input; None where the runtime reads it whole."""
    if isinstance(linear, PackedLinear):
        return linear.by_input(threshold)
    return SparseLinear(skip_dense.linear(linear.weight, None), threshold)


def feed_forward(shapes: Shapes, x: Tensor, rounds: int) -> None:
    """Dense, thresholds at several sparsities, compact at several keeps."""
    hidden, neurons, act = shapes.hidden, shapes.neurons, ACTIVATIONS["silu"]
    pairs = [
        (shapes.linear(2 * neurons, hidden), shapes.linear(hidden, neurons))
        for _ in range(shapes.copies)
    ]
    columns = [(sparse(up, 0), sparse(down, 0)) for up, down in pairs]
    gathered = [sparse(down, NOTHING) for _, down in pairs]
    dense = [MLP(up, down, act, True) for up, down in pairs]
    for mlp in dense:
        mlp(x)  # prepares its kernels, which rows are gathered from
    middle = dense[0].inner(x)
    variants: dict[str, list[Call]] = {"dense": list(dense)}
    for p in (0.0, 0.25, 0.4, 0.5, 0.6):
        variants[f"threshold {p:.0%}"] = [
            MLP(_cut(up, mlp.up, x, p), _cut(down, mlp.down, middle, p), act, True)
            for mlp, (up, down) in zip(dense, columns, strict=True)
        ]
    for keep in (0.4, 0.6, 0.8):
        picked = torch.randperm(neurons, generator=shapes.generator)[: round(keep * neurons)]
        kept = picked.sort().values
        rows = torch.cat((kept, kept + neurons))
        variants[f"compact {keep}"] = [
            MLP(mlp.up.with_outputs(rows), (down or mlp.down).with_inputs(kept), act, True)
            for mlp, down in zip(dense, gathered, strict=True)
        ]
    show(f"feed-forward {hidden} x {neurons} {shapes.kind}", timed(variants, x, rounds))


def _cut(linear: SparseLinear | None, dense: Any, x: Tensor, sparsity: float) -> Any:
    """The linear that the runtime takes for a threshold that leaves out a share of `x`."""
    t = float(x.abs().flatten().float().quantile(sparsity)) if sparsity else NOTHING
    return MaskedLinear(dense, t) if linear is None else SparseLinear(linear.columns, t)


def relu(shapes: Shapes, x: Tensor, rounds: int, zeros: float) -> None:
    """A ReLU feed-forward with so many zeros: whole, and the part after the gate alone."""
    hidden, neurons = shapes.hidden, shapes.neurons
    gates, ups = ([shapes.linear(neurons, hidden) for _ in range(shapes.copies)] for _ in range(2))
    downs = [shapes.linear(hidden, neurons) for _ in range(shapes.copies)]
    down = [skip_dense.linear(linear.weight, None) for linear in downs]
    rows = [skip_dense.Rows(linear.weight, None) for linear in ups]
    level = float(gates[0](x).flatten().quantile(zeros))

    def act(gate: Tensor) -> Tensor:
        return torch.relu(gate - level)

    gate = act(gates[0](x))
    fused = [
        MLP(DenseLinear(torch.cat((g.weight, u.weight))), d, act, True)
        for g, u, d in zip(gates, ups, downs, strict=True)
    ]
    whole: dict[str, list[Call]] = {
        "dense": list(fused),
        "exact": [
            GatedFeedForward(*parts, act, 0.0) for parts in zip(gates, rows, down, strict=True)
        ],
    }
    after: dict[str, list[Call]] = {
        "dense": [lambda x, u=u, d=d: d(gate * u(x)) for u, d in zip(ups, downs, strict=True)],
        "exact": [
            lambda x, r=r, d=d: skip_dense.gated(r, d, x[0, 0], gate[0, 0], 0.0)
            for r, d in zip(rows, down, strict=True)
        ],
    }
    title = f"{hidden} x {neurons} bf16, {zeros:.0%} zeros"
    show(f"relu feed-forward {title}", timed(whole, x, rounds))
    show(f"relu up and down {title}", timed(after, x, rounds))


def models(sources: list[str], new: int, rounds: int, threads: int) -> None:
    """Milliseconds and megabytes a token of whole models after a prompt, the first one dense."""
    made = {source: load_model(source, device="cpu", threads=threads) for source in sources}
    taken: dict[str, list[float]] = {source: [] for source in sources}
    for _ in range(rounds + 1):
        for source, model in made.items():
            ids = torch.tensor([model.tokenizer.encode(PROMPT * 4)[:64]])
            cache = model.new_cache(length=64 + new)
            token = model.forward(ids, cache).argmax(-1, keepdim=True)
            start = now()
            for _ in range(new):
                token = model.forward(token, cache).argmax(-1, keepdim=True)
            taken[source].append((now() - start) / new * 1e3)
    dense = median(taken[sources[0]][1:])
    for source, model in made.items():
        ms = median(taken[source][1:])
        row = {"model": source, "ms": round(ms, 3), "speed": round(dense / ms, 2)}
        print(json.dumps(row | {"mb_a_token": round(model.token_bytes / 1e6, 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("threads", 1), ("hidden", 2048), ("neurons", 8192), ("rounds", 15), ("new-tokens", 32)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kinds", nargs="*", default=["bf16", "int4"])
    parser.add_argument("--model", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        if options.model:
            models(options.model, options.new_tokens, options.rounds, options.threads)
            return
        x = torch.randn(1, 1, options.hidden, generator=torch.Generator().manual_seed(1))
        for kind in options.kinds:
            feed_forward(Shapes(options.hidden, options.neurons, kind), x, options.rounds)
        if "bf16" in options.kinds:
            relu(Shapes(options.hidden, options.neurons, "bf16"), x, options.rounds, 0.85)


if __name__ == "__main__":
    main()
