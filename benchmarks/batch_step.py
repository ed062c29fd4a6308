"""Many tokens in one step, one text through the scheduler, and a batch: ratios within one run.

    optim quantize demo -m rtn --group-size 64 --lm-head-bits 8 -o g64-head8
    python benchmarks/batch_step.py g64-head8

CPU seconds of one thread, medians: other work on the machine slows a row, not its ratios so much.
"""

import argparse
import time
from collections.abc import Iterator
from statistics import median

import torch

from optim.runtime.engine.load import Model, load_model
from optim.runtime.engine.sampling import Sampling
from optim.runtime.engine.scheduler import answer_all, write
from optim.runtime.engine.sequence import Request, Sequence
from optim.runtime.engine.slots import Slots

ROWS, CONTEXTS, ROUNDS = (1, 2, 4, 8), (64, 1024), 16


def steps(model: Model) -> None:
    """The table of tokens a second against rows, for texts side by side and for one text."""
    for context in CONTEXTS:
        caches = [model.new_cache(length=2 * max(CONTEXTS)) for _ in range(max(ROWS))]
        prompt = torch.randint(5, 4000, (1, context), generator=torch.Generator().manual_seed(0))
        for cache in caches:
            model.forward(prompt, cache)
        for name in ("texts", "tokens of one text"):
            seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
            for _ in range(ROUNDS):
                for rows in ROWS:
                    for cache in caches:
                        cache.truncate(context)
                    many = [(cache, [7]) for cache in caches[:rows]]
                    work = many if name == "texts" else [(caches[0], [7] * rows)]
                    start = time.process_time()
                    model.step_many(work)
                    seconds[rows].append(time.process_time() - start)
            one = median(seconds[1])
            cells = (
                f"{rows}: {rows / median(s):.0f} tok/s ({rows * one / median(s):.2f}x)"
                for rows, s in seconds.items()
            )
            print(f"@{context} {name}: {', '.join(cells)}", flush=True)


def scheduled(model: Model, new: int = 48) -> None:
    """One greedy text written by the scheduler, beside a bare loop over the model's steps."""
    prompt = torch.randint(5, 4000, (64,), generator=torch.Generator().manual_seed(0)).tolist()

    def bare() -> Iterator[int]:
        cache = model.new_cache(length=1024)
        logits = model.forward(torch.tensor([prompt]), cache)
        while True:
            yield (token := int(logits[0, -1].argmax()))
            logits = model.forward(torch.tensor([[token]]), cache)

    def through() -> Iterator[int]:
        slots = Slots(model, 1, 1024)
        text = Sequence(model, Request(prompt, Sampling(max_tokens=new)), 1024)
        yield from (
            event.token.id for events in write(text, slots) for event in events if event.token
        )

    seconds: dict[str, list[float]] = {"bare": [], "through": []}
    for _ in range(2 * ROUNDS):
        for name, tokens in (("bare", bare()), ("through", through())):
            next(tokens)
            start = time.process_time()
            for _ in range(new - 2):
                next(tokens)
            seconds[name].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(seconds["bare"], seconds["through"], strict=True)]
    print(f"one text through the scheduler: {median(ratios):.3f}x a bare loop", flush=True)


def batches(model: Model) -> None:
    """Eight prompts of a few hundred tokens: side by side, beside one after the other."""
    draw, seconds = torch.Generator().manual_seed(0), dict[int, float]()
    prompts = [torch.randint(5, 4000, (300 + 13 * i,), generator=draw).tolist() for i in range(8)]
    requests = [Request(ids, Sampling(max_tokens=24)) for ids in prompts]
    for size in (1, 8):
        start = time.process_time()
        for _ in answer_all(model, requests, context=1024, size=size):
            pass
        seconds[size] = time.process_time() - start
    print(f"8 prompts of 300 to 391 tokens, 24 more each: {seconds[8]:.2f} s,", end=" ")
    print(f"{seconds[1] / seconds[8]:.2f}x one after the other", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    options = parser.parse_args()
    model = load_model(options.model, device="cpu", threads=1)
    print(f"{options.model}: {model.place}")
    scheduled(model)
    batches(model)
    steps(model)


if __name__ == "__main__":
    main()
