"""Names that came from a file as names of files: one function makes the one of the other."""

import re
from collections import Counter
from collections.abc import Iterable

from optim.runtime.system.hashes import text_sha256

ORDINARY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,99}")  # none of what is known by its hash
TAKEN = ("model", "pytorch_model")  # stems that other programs take for the whole model


def file_stems(names: Iterable[str]) -> dict[str, str]:
    """A stem of a file's name for each of `names`, which may come from anyone.

    Of ordinary letters it is the name with dots as underscores, as in DFloat11's releases. Any
    other name is known by its hash, and so are names that would share a file.
    """
    plain = {name: name.replace(".", "_") for name in names}
    shared = Counter(stem.casefold() for stem in plain.values())

    def stem(name: str) -> str:
        found = plain[name]
        if ORDINARY.fullmatch(name) and shared[found.casefold()] == 1 and found not in TAKEN:
            return found
        return f"tensors-{text_sha256(name)[:32]}"

    return {name: stem(name) for name in plain}
