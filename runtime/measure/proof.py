"""The short measurement that a compression ends with: what the result cost, on a text of our own.

Workspace.publish calls it while the artifact has no name yet, and records what it finds.

A few windows are enough to see that a model is whole, and about how far it moved; the errors say
how sure that is. `optim eval --record` puts a longer measurement in its place.
"""

from pathlib import Path
from typing import Any

from optim.runtime.measure.quality import Progress, evaluate
from optim.runtime.storage.open import open_checkpoint

TEXT = "builtin:eval"
WINDOW = 512
WINDOWS = 4


def prove(
    folder: Path,
    against: str,
    progress: Progress = lambda at, total, text: None,
    *,
    device: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure the artifact in `folder` against its source: the evaluation for its manifest.

    Only a block of each model is in memory at a time. Raises OptimError where nothing can be
    measured, as without a tokenizer.
    """
    found = evaluate(
        str(folder),
        against=against,
        text=TEXT,
        window=_window(folder, trust_remote_code),
        max_windows=WINDOWS,
        device=device,
        threads=threads,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    given = {"text": TEXT, "against": against, **found.as_dict()}
    return {key: value for key, value in given.items() if value is not None}


def _window(folder: Path, trust: bool) -> int:
    """Tokens of a window: WINDOW, or what a model of a short context can read."""
    model = open_checkpoint(str(folder), trust_remote_code=trust)
    limit = getattr(model.settings, "max_position_embeddings", None)
    most = limit - len(model.tokenizer().begin) if isinstance(limit, int) else WINDOW
    return max(2, min(WINDOW, most))
