"""Many tokens in one step: tokens a second, as ratios within one run.

    optim quantize demo -m rtn --group-size 64 --lm-head-bits 8 -o g64-head8
    python benchmarks/batch_step.py g64-head8

CPU seconds of one thread, medians: other work on the machine slows a row, not its ratios so much.
"""

import argparse
import time
from statistics import median

import torch

from optim.runtime.engine.load import Model, load_model

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    options = parser.parse_args()
    model = load_model(options.model, device="cpu", threads=1)
    print(f"{options.model}: {model.place}")
    steps(model)


if __name__ == "__main__":
    main()
