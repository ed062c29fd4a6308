"""Try the steps of a tokenizer on a few texts, in a process of its own: run as a script.

Standard input holds a JSON object with `normalizer`, `pre_tokenizer`, `post_processor`, `decoder`;
they are put around a vocabulary of one letter. What is printed is the reason why they cannot be
used, or nothing. The process is ended by the system where the steps take too much time or memory.
"""

import contextlib
import json
import resource
import sys
from typing import Any

SECONDS = 1
MEMORY = 1 << 30
LINE = 2000
TEXTS = (
    *(unit * (LINE // len(unit)) + " 9b" for unit in ("a", "A", "7", " ", "\n", ".", "'", "_")),
    *("é" * LINE, "漢" * LINE, "\u0301" * LINE, "🙂" * 500),
    *("The cat's 3 hats, 12.5 % off!\r\n\t" * 40, "aA1. \n_-" * 250, "ﬁ㌀½İ\u200d\u00a0" * 200),
    "".join(map(chr, range(1, 0x300))),
)


def main() -> None:
    """Print the reason of a failure."""
    from tokenizers import Tokenizer

    model: dict[str, Any] = {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": None}
    whole: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "truncation": None,
        "padding": None,
    }
    for kind, amount in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, SECONDS)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (amount, resource.getrlimit(kind)[1]))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        made = Tokenizer.from_str(json.dumps(whole | {"model": model} | json.load(sys.stdin)))
        for text in TEXTS:
            made.decode(made.encode(text).ids)
            made.encode(text, add_special_tokens=False)
        made.decode([0] * 100)
    except BaseException as error:  # a panic is no Exception
        print(str(error)[:300] or type(error).__name__)


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    main()
