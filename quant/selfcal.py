"""Calibration with no data: the model that will be compressed writes the text itself."""

from optim.runtime.checkpoint import Checkpoint
from optim.runtime.selftext import Generate


def generator(checkpoint: Checkpoint, device: str) -> Generate:
    """A sampler (prompt ids, count, seed) -> new ids, that loads the model when first called."""
    from optim.runtime.engine import Sampling, generate
    from optim.runtime.model import Model, load_model

    loaded: list[Model] = []

    def write(prompt: list[int], count: int, seed: int) -> list[int]:
        if not loaded:
            loaded.append(load_model(checkpoint, device=device))
        sampling = Sampling(temperature=1.0, top_p=0.95, max_tokens=count, seed=seed)
        return list(generate(loaded[0], prompt, sampling))

    return write
