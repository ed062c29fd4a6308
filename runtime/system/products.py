"""How fast this machine multiplies, right now and beside whatever else it does."""

import time

import torch

SIDE = 1024
SECONDS = 0.2


def products_a_second(device: torch.device) -> float:
    """Multiplications and additions a second in fp32 products of large matrices."""
    left, right = torch.ones(SIDE, SIDE, device=device), torch.ones(SIDE, SIDE, device=device)
    float((left @ right)[0, 0])  # threads start, and a GPU gets ready
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < SECONDS:
        float((left @ right)[0, 0])  # waits for a GPU
        count += 1
    return count * SIDE**3 / passed
