"""`self`: calibration text that the model writes itself, so that no data is needed.

Sampling goes on from short openers (and short questions, where the model chats). A text that falls
into repetition would calibrate for that loop alone, so it is thrown away.
"""

from collections.abc import Callable, Iterator

from optim.recipes.errors import OptimError
from optim.runtime.text.tokenizer import Tokenizer

Generate = Callable[[list[int], int, int], list[int]]
"""(prompt ids, number of new tokens, seed) -> the sampled new ids."""

OPENERS = (
    "The",
    "In",
    "When",
    "A",
    "How to",
    "If you",
    "We",
    "def ",
    "It is",
    "# ",
    "During",
    "To",
)
QUESTIONS = (
    "Explain something about science that most people get wrong.",
    "Write a short story about a journey.",
    "How do I set up a small server at home?",
    "Write a Python function and explain it step by step.",
    "Give me advice on learning a new language.",
    "Tell me about an important event in history.",
)
DISTINCT = 0.6  # least share of different 4-grams
TRIES = 3  # texts to sample for each one needed


def is_repetitive(ids: list[int]) -> bool:
    """Whether fewer than 60 % of the 4-grams are different, or there are hardly any tokens."""
    grams = list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
    return len(grams) < 16 or len(set(grams)) < DISTINCT * len(grams)


def _prompts(tokenizer: Tokenizer) -> list[list[int]]:
    prompts = [[tokenizer.bos_id]] if tokenizer.bos_id is not None else []
    prompts += [tokenizer.encode(opener, special=True) for opener in OPENERS]
    if tokenizer.has_chat_template:
        prompts += [tokenizer.chat([{"role": "user", "content": text}]) for text in QUESTIONS]
    return [prompt for prompt in prompts if prompt]


def self_texts(
    tokenizer: Tokenizer, generate: Generate, *, tokens: int, length: int, seed: int
) -> Iterator[list[int]]:
    """Texts of the model itself, up to `length` new ids each, until there are `tokens` in all.

    Raises OptimError (1) if too much of what it writes is repetition.
    """
    prompts = _prompts(tokenizer)
    have, tried = 0, 0
    while have < tokens:
        if tried * length > TRIES * tokens + 8 * length:
            fix = "calibrate with builtin:mixed or a text of your own"
            raise OptimError("the model repeats itself too much to calibrate on", fix)
        prompt = prompts[tried % len(prompts)]
        new = generate(prompt, length, seed + tried)
        tried += 1
        if not is_repetitive(new):
            have += len(prompt) + len(new)
            yield prompt + new
