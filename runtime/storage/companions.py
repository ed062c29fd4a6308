"""The files that belong with a model's weights: tokenizer, chat templates, processor, licence.

One list, for whatever makes a folder from another: each of them is copied if it is there.
"""

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from optim.recipes.errors import USAGE, OptimError

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model*", "vocab*.json", "merges.txt", "vocab*.txt", "spiece.model", "*.tiktoken"),
    *("sentencepiece*.model", "spm*.model", "*.spm", "tekken*.json", "normalizer.json"),
    *("bpe.codes", "dict.txt"),
)
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
SETTINGS = (
    *("generation_config.json", "processor_config.json", "preprocessor_config.json"),
    "video_preprocessor_config.json",
)
LICENCE = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
COMPANIONS = (*TOKENIZER, *TEMPLATES, *SETTINGS, *LICENCE)


def companions(folder: Path, *, code: bool = False) -> list[str]:
    """Names in `folder` of the files that belong with its weights; with `code` also its modules.

    Raises OptimError (2) for a link that leads out of the model: it would publish what is there.
    """
    wanted = (*COMPANIONS, "*.py") if code else COMPANIONS
    inside = [path for level in ("*", "additional_chat_templates/*") for path in folder.glob(level)]
    names = (path.relative_to(folder).as_posix() for path in inside if path.is_file())
    found = sorted(n for n in names if any(fnmatchcase(n, pattern) for pattern in wanted))
    for name in found:
        _check_link(folder, name)
    return found


def copy_companions(source: Path, target: Path, *, code: bool = False) -> None:
    """Copy them into the folder `target`. Raises OptimError (2) as `companions` does."""
    for name in companions(source, code=code):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _check_link(folder: Path, name: str) -> None:
    """The hub's cache links `snapshots/REVISION/file` to `blobs/HASH`; other links stay inside."""
    real, home = (folder / name).resolve(), folder.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        fix = "put the file itself into the folder, or remove the link"
        raise OptimError(f"{folder / name} is a link that leads out of its folder", fix, USAGE)
