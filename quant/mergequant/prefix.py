"""Which tokens to put before every text so that no other becomes an outlier (PrefixQuant).

A model parks attention on its first token, and on a few others: there the input of some `down_proj`
is hundreds of times larger than elsewhere, and a step that covers it is useless for all the rest.
Put such tokens first, keep their keys and values as they are, and the text itself has none (Chen et
al. 2024, arXiv 2410.05265). Found here on the calibration text: a position is an outlier in a block
if its largest |down_proj input| is beyond FAR times the median of all positions.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from optim.quant.mergequant.rotation import places
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.walk.walk import Walk

FAR = 64.0
MOST = 4  # tokens of a prefix
WINDOWS = 4  # of the calibration text that are looked at


def find_prefix(
    checkpoint: Checkpoint, windows: Tensor, path: Path, begin: Sequence[int] = ()
) -> list[int]:
    """The shortest prefix found that leaves fewest outliers in `windows` int64 `[n, length]`.

    Hidden states are kept in the file `path`. Starts with what the tokenizer puts in front of every
    text (`begin`), else with the model's begin token, if it has one.
    """
    windows = windows[:WINDOWS]
    start = checkpoint.text_config.get("bos_token_id")
    prefix = list(begin) or ([start] if isinstance(start, int) else [])
    best, left = prefix, outliers(checkpoint, windows, prefix, path)
    while left and len(prefix) < MOST:
        prefix = [*prefix, Counter(left).most_common(1)[0][0]]
        now = outliers(checkpoint, windows, prefix, path)
        if len(now) >= len(left):
            break
        best, left = prefix, now
    return best


@torch.inference_mode()
def outliers(checkpoint: Checkpoint, windows: Tensor, prefix: list[int], path: Path) -> list[int]:
    """The tokens at positions of the text that are outliers in some block, `prefix` before it."""
    walk = Walk(checkpoint)
    first = len(prefix)
    ids = torch.cat((torch.tensor(prefix, dtype=torch.int64).expand(len(windows), -1), windows), 1)
    states = walk.embed(ids, path)
    walk.release()
    far = torch.zeros(windows.shape, dtype=torch.bool)
    model_type = str(walk.model.config.get_text_config().model_type)
    for i in range(len(walk)):
        block = walk.block(i)
        (down,) = places(block, model_type).downs
        peaks: list[Tensor] = []
        hook = block.get_submodule(down).register_forward_pre_hook(
            lambda _m, args, peaks=peaks: peaks.append(args[0].abs().amax(-1).float().cpu())
        )
        for rows in walk.slices(states):
            states[rows] = walk.run(i, block, states[rows])
        hook.remove()
        peak = torch.cat(peaks)[:, first:]
        far |= peak > FAR * peak.median()
    path.unlink()
    return windows[far].tolist()
