"""What smaller KV caches cost `demo`: perplexity against a 16-bit cache, and a stream's against
windowed recomputation.

    python benchmarks/kv_quality.py [--windows 8] [--chunk 1] [--stream-tokens 8192] ...

Packed caches: windows of 1024 tokens of builtin:eval, given `--chunk` tokens at a time (1 is
decode; more is prefill, in which the tokens of a chunk see each other at 8 bits even in a 4-bit
cache).

Stream: one long text (builtin:eval, again from its start if it is shorter). Recomputation gives
each token the `--window` tokens before it and nothing else, computed afresh; doing so for every
token is slow, so it is done for every `--every`-th, and both are judged on those tokens. The
stream is given `--stream-chunk` tokens at a time, which changes what is forgotten when by as many.
"""

import argparse
import json
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from optim.runtime.cache.full import Policy
from optim.runtime.engine.load import Model, load_model
from optim.runtime.system.memory import peak_bytes
from optim.runtime.text.windows import evaluation_windows


def loss(model: Model, ids: Tensor, policy: Policy, chunk: int) -> tuple[float, int]:
    """Mean negative log-likelihood of `ids` `[T]`, and the bytes of the cache at the end."""
    cache = model.new_cache(length=len(ids), policy=policy)
    parts = ids[None, :-1].split(chunk, 1)
    logits = torch.cat([model.forward(part, cache, all_logits=True)[0] for part in parts])
    return F.cross_entropy(logits, ids[1:]).item(), cache.nbytes


def packed(model: Model, count: int, chunk: int) -> None:
    windows = evaluation_windows("builtin:eval", model.tokenizer, window=1024, max_windows=count)
    base: list[float] = []
    for bits in (16, 8, 4):
        found = [loss(model, ids, Policy(bits), chunk) for ids in windows]
        losses = [value for value, _ in found]
        base = base or losses
        over = torch.tensor(losses) - torch.tensor(base)
        row = {
            "bits": bits,
            "ppl": round(math.exp(sum(losses) / len(losses)), 4),
            "over_percent": round(100 * math.expm1(float(over.mean())), 3),
            "error_percent": round(100 * float(over.std()) / len(over) ** 0.5, 3),
            "windows": len(windows),
            "chunk": chunk,
            "cache_mb": round(found[0][1] / 1e6, 2),
        }
        print(json.dumps(row), flush=True)


def long_text(model: Model, tokens: int) -> Tensor:
    ids = evaluation_windows("builtin:eval", model.tokenizer, window=64).flatten()
    return ids.repeat(-(-tokens // len(ids)))[:tokens]


def streamed(
    model: Model, ids: Tensor, places: range, policy: Policy, window: int, chunk: int
) -> list[float]:
    """The loss at each of `places`, from one pass over all of `ids`."""
    cache, wanted, losses = model.new_cache(length=window, policy=policy), set(places), []
    most, after, at = 0, 0, 0
    for part in ids[:-1].split(chunk):
        logits = model.forward(part[None], cache, all_logits=True)[0]
        for place in range(at + 1, at + len(part) + 1):
            if place in wanted:
                losses.append(F.cross_entropy(logits[place - 1 - at], ids[place]).item())
        at += len(part)
        most, after = (cache.nbytes, 0) if at < 2 * window else (most, max(after, cache.nbytes))
    assert after <= most, "a stream's memory is constant"
    return losses


def recomputed(model: Model, ids: Tensor, places: range, window: int) -> list[float]:
    losses = []
    for place in places:
        before = ids[place - window : place]
        logits = model.forward(before[None], model.new_cache(length=window))
        losses.append(F.cross_entropy(logits[0], ids[place]).item())
    return losses


def stream(model: Model, tokens: int, window: int, every: int, chunk: int, bits: list[int]) -> None:
    ids = long_text(model, tokens)
    places = range(window, tokens, every)
    base = torch.tensor(recomputed(model, ids, places, window))
    name = {"tokens": tokens, "judged": len(places), "window": window}
    print(json.dumps({"recomputed": round(math.exp(base.mean()), 4)} | name), flush=True)
    for bit in bits:
        found = torch.tensor(streamed(model, ids, places, Policy(bit, "stream"), window, chunk))
        over = found - base
        row = {
            "stream_bits": bit,
            "ppl": round(math.exp(found.mean()), 4),
            "over_percent": round(100 * math.expm1(float(over.mean())), 2),
            "error_percent": round(100 * float(over.std()) / len(over) ** 0.5, 2),
            "peak_mb": round(peak_bytes() / 1e6),
        }
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=1)
    parser.add_argument("--stream-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--every", type=int, default=16)
    parser.add_argument("--stream-chunk", type=int, default=8)
    parser.add_argument("--stream-bits", type=int, nargs="+", default=[16])
    options = parser.parse_args()
    model = load_model(options.model)
    if options.windows:
        packed(model, options.windows, options.chunk)
    if options.stream_tokens:
        sizes = options.stream_tokens, options.window, options.every, options.stream_chunk
        stream(model, *sizes, options.stream_bits)


if __name__ == "__main__":
    main()
