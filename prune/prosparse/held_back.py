"""What a trained student is worth: perplexity and zeros on text that it was not trained on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optim.prune.prosparse.relu import watched
from optim.prune.prosparse.train import Job
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.text.windows import evaluation_windows

HELD_BACK = ("builtin:eval", 512, 8)  # text, window and windows


@torch.no_grad()
def measure_as_stored(job: Job, checkpoint: Checkpoint) -> dict[str, Any]:
    """Round the weights to what is stored; perplexity of both models and zeros of each block."""
    for name, parameter in job.student.moving.items():
        if name in checkpoint.tensors:
            parameter.copy_(parameter.to(checkpoint.tensors[name].dtype))
    for activation in job.student.swapped:
        activation.threshold = job.section.threshold
    spec, window, count = HELD_BACK
    tokenizer = checkpoint.tokenizer()
    windows = evaluation_windows(spec, tokenizer, window=window, max_windows=count)
    sums = torch.zeros(2, dtype=torch.float64)
    zeros = torch.zeros(len(job.student.ffns))
    bf16 = torch.autocast("cuda", torch.bfloat16, enabled=job.device.type == "cuda")
    begin = torch.tensor(tokenizer.begin, dtype=torch.int64)
    for row in windows:
        ids = torch.cat((begin, row))[None].to(job.device)
        with bf16, watched(job.student.blocks, job.student.ffns) as seen:
            sums[0] += _nll(job.student.model, ids, len(begin))
        with bf16:
            sums[1] += _nll(job.teacher, ids, len(begin))
        zeros += torch.stack(seen.zeros).cpu() / len(windows)
    mine, base = (sums / len(windows)).exp().tolist()
    return {
        "text": spec,
        "windows": len(windows),
        "window": windows.shape[1],
        "perplexity": mine,
        "base_perplexity": base,
        "ppl_ratio": mine / base,
        "sparsity": float(zeros.mean()),
        "zeros": zeros.tolist(),
    }


def _nll(model: Any, ids: Tensor, first: int) -> float:
    """Mean nll of `ids` `[1, t]` after the token `first`."""
    logits = model(input_ids=ids, use_cache=False).logits[0, first:-1].float()
    return float(F.cross_entropy(logits, ids[0, first + 1 :]))
