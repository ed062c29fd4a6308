"""Many tokens in one step, and guesses ahead: tokens a second, as ratios within one run.

    optim quantize demo -m rtn --group-size 64 --lm-head-bits 8 -o g64-head8
    python benchmarks/batch_step.py g64-head8

CPU seconds of one thread, medians: other work on the machine slows a row, not its ratios so much.
"""

import argparse
import time
from statistics import median

import torch

from optim.runtime.engine.drafts import lookup
from optim.runtime.engine.load import Model, load_model
from optim.runtime.engine.sampling import Sampling
from optim.runtime.engine.scheduler import write
from optim.runtime.engine.sequence import Request, Sequence
from optim.runtime.engine.slots import Slots

ROWS, CONTEXTS, ROUNDS = (1, 2, 4, 8), (64, 1024), 16
NEW = 96  # tokens of a reply
NOTE = (
    "The meeting is on Tuesday at ten in room 214. Anna brings the figures for March, Paul the plan"
    " for the new building. Everyone reads the report on the bridge before the meeting. Questions"
    " about the budget go to Maria Keller, questions about the building to Paul."
)
CODE = (
    "def total(prices, rate):\n    result = 0\n    for price in prices:\n        result += price\n"
    "    return result * (1 + rate)\n"
)
PROMPTS = {
    "chat": [
        "What is the capital of France?",
        "Why is the sky blue?",
        "Give me three tips for a good night's sleep.",
        "How do I boil an egg?",
    ],
    "rewrite": [
        f"Repeat this text exactly, word for word:\n\n{NOTE}",
        f"Correct any spelling mistake and write the whole text again:\n\n{NOTE}",
        f"Write the following text again, with Wednesday in place of Tuesday:\n\n{NOTE}",
    ],
    "summary": [
        f"Summarize this text:\n\n{NOTE}",
        f"List who does what in this text:\n\n{NOTE}",
    ],
    "edit": [
        f"Rename `prices` to `costs` and show the whole function:\n\n{CODE}",
        f"Add a docstring and show the whole function:\n\n{CODE}",
    ],
}
DRAWN = {"greedy": Sampling(max_tokens=NEW), "T 0.7": Sampling(0.7, seed=1, max_tokens=NEW)}


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


def speculation(model: Model) -> None:
    """The table of speed-ups by kind of prompt, and whether every text is the plain one."""
    for drawn, sampling in DRAWN.items():
        for kind, prompts in PROMPTS.items():
            spent = {"off": 0.0, "lookup": 0.0, "auto": 0.0}
            same = 0
            for prompt in prompts:
                ids = model.tokenizer.chat([{"role": "user", "content": prompt}])
                texts = {}
                for how in spent:
                    asked = Request(ids, sampling)
                    text = Sequence(model, asked, model.max_context, drafts=lookup(how))
                    for _ in write(text, Slots(model, 1, model.max_context)):
                        if text.count == 1:  # the prompt is read, and not counted
                            start = time.process_time()
                    spent[how] += time.process_time() - start
                    texts[how] = text.history
                same += texts["off"] == texts["lookup"] == texts["auto"]
            gains = ", ".join(f"{how} {spent['off'] / spent[how]:.2f}x" for how in spent)
            print(f"{drawn} {kind}: {gains}; identical: {same} of {len(prompts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--only", choices=("steps", "speculation"))
    options = parser.parse_args()
    time.perf_counter = time.process_time  # the clock by which drafts are judged
    model = load_model(options.model, device="cpu", threads=1)
    print(f"{options.model}: {model.place}")
    if options.only != "speculation":
        steps(model)
    if options.only != "steps":
        speculation(model)


if __name__ == "__main__":
    main()
