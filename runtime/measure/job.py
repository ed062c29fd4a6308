"""What one measurement runs."""

from dataclasses import dataclass

from optim.runtime.decoder.linears.source import Form


@dataclass(frozen=True, slots=True)
class Job:
    """What to run: `engine` is "optim", "transformers" or "llama.cpp"."""

    source: str
    engine: str = "optim"
    prompt_tokens: tuple[int, ...] = (64, 512)
    new_tokens: int = 64
    batch: int = 1
    repeat: int = 3
    threads: int | None = None
    device: str = "auto"
    kv_bits: int = 16
    kv_policy: str = "full"
    context: int | None = None
    form: Form = "planes"
    offload: bool = False
