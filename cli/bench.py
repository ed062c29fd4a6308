"""`optim bench`: speed, memory, and how much of the machine is used, against others."""

from typing import TYPE_CHECKING, Any

from optim.cli import ui
from optim.cli.options import Timing
from optim.recipes.errors import USAGE, OptimError

if TYPE_CHECKING:
    from optim.runtime.storage.checkpoint import Checkpoint

PEERS = ("transformers", "llama.cpp")


def bench(source: str, asked: Timing) -> None:
    """Measure `source`, then `--against`, then the peers; print the table.

    Raises OptimError: 2 for a length that is no number, 4 for a peer that is not installed.
    """
    ui.notes.quiet = asked.quiet
    from optim.runtime.cache.full import Policy
    from optim.runtime.measure.speed import bandwidth, measure

    Policy(asked.kv_bits, asked.kv_policy)  # refuses what no cache has
    jobs = _jobs(source, asked)
    runs = []
    with ui.progress("bench") as step:
        step(0, len(jobs) + 1, "memory bandwidth")
        peak = bandwidth(asked.device, asked.threads)
        for at, job in enumerate(jobs, 1):
            step(at, len(jobs) + 1, f"{job.engine} · {job.source}")
            runs.append(measure(job))
        step(len(jobs) + 1, len(jobs) + 1, "")
    if asked.json:
        ui.emit({"bandwidth": peak, "runs": runs})
    else:
        _show(runs, peak)


def _jobs(source: str, asked: Timing) -> list[Any]:
    from optim.runtime.measure.job import Job
    from optim.runtime.storage.open import open_checkpoint

    lengths = numbers("--prompt-tokens", asked.prompt_tokens)
    peers = asked.peer or []
    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise OptimError(f"there is no peer {unknown[0]!r}", f"known: {', '.join(PEERS)}", USAGE)

    def job(model: str, engine: str = "optim", form: Any = None) -> Any:
        return Job(
            source=model,
            engine=engine,
            prompt_tokens=lengths,
            new_tokens=asked.new_tokens,
            batch=asked.batch,
            repeat=asked.repeat,
            threads=asked.threads,
            device=asked.device,
            kv_bits=asked.kv_bits,
            kv_policy=asked.kv_policy,
            context=asked.context,
            form=form or ("exact" if asked.exact else "planes"),
            offload=asked.offload,
        )

    sources = [open_checkpoint(name) for name in (source, asked.against) if name is not None]
    _check_lengths(sources, max(lengths) + asked.new_tokens, asked)
    # Weights packed without loss are measured as bf16 too.
    plain = [job(source, form="bf16")] if sources[0].layout is not None else []
    base = [job(asked.against)] if asked.against else []
    return [
        job(source),
        *plain,
        *base,
        *(job(asked.against or source, peer) for peer in peers),
    ]


def _check_lengths(sources: "list[Checkpoint]", need: int, asked: Timing) -> None:
    """Raise OptimError (2) where `need` tokens do not fit, before anything is measured."""
    if asked.kv_policy == "stream":
        return
    stated = {c.name: c.text_config.get("max_position_embeddings") for c in sources}
    limits = {name: limit for name, limit in stated.items() if isinstance(limit, int)}
    if asked.context is not None:
        limits["--context"] = asked.context
    for name, limit in limits.items():
        if need > limit:
            what = f"a prompt and what is decoded take {need} tokens, {name} has {limit}"
            raise OptimError(what, "give less as --prompt-tokens or --new-tokens", USAGE)


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """The numbers that were typed, like 64,512. OptimError (2) if they are none."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise OptimError(f"{flag} cannot be {text!r}", "like 64,512", USAGE)
    return found


def _show(runs: list[dict[str, Any]], peak: float) -> None:
    heads = (
        "model",
        "prompt",
        "prefill tok/s",
        "decode tok/s",
        "ms/step",
        "MB/token",
        "GB/s",
        "of peak",
        "speed-up",
    )
    slowest: dict[int, float] = {}
    for timing in (timing for run in runs for timing in run["timings"]):
        length = timing["prompt_tokens"]
        slowest[length] = min(_decode(timing), slowest.get(length, _decode(timing)))
    ui.table(heads, [_row(run, t, peak, slowest) for run in runs for t in run["timings"]])
    for run in runs:
        ui.say(
            f"{_name(run)}: {run['place']} · load {run['load_seconds']:.1f} s"
            f" · peak memory {ui.size(run['peak_bytes'])}"
        )
    if (verdict := _verdict(runs)) is not None:
        ui.say(verdict)
    ui.say(f"this machine reads {peak / 1e9:.1f} GB/s · load average {runs[0]['load_average']:.1f}")
    ui.say(
        "rates are medians (slowest-fastest round); speed-up: of decode, beside the slowest model"
    )


def _decode(timing: dict[str, Any]) -> float:
    return float(timing["decode_tokens_per_second"]["median"])


def _verdict(runs: list[dict[str, Any]]) -> str | None:
    """Of a model packed without loss: whether it decodes faster here than the same bf16."""
    from optim.runtime.decoder.linears.bf12 import WORTH

    plain = next((run for run in runs[1:] if run["form"] == "bf16"), None)
    if plain is None:
        return None
    packed, bf16 = (
        [t["decode_tokens_per_second"]["median"] for t in run["timings"]]
        for run in (runs[0], plain)
    )
    gain = min(a / b for a, b in zip(packed, bf16, strict=True))
    if gain < WORTH:
        return f"planes gain nothing here ({gain:.2f}x bf16): packed for capacity"
    return f"planes decode {gain:.2f}x as fast as bf16 here"


def _row(
    run: dict[str, Any], timing: dict[str, Any], peak: float, slowest: dict[int, float]
) -> tuple[str, ...]:
    faster = _decode(timing) / slowest[timing["prompt_tokens"]]
    decode = timing["decode_tokens_per_second"]
    rate = run["weight_bytes"] / (timing["ms_per_step"] / 1e3)
    return (
        _name(run),
        str(timing["prompt_tokens"]),
        _spread(timing["prefill_tokens_per_second"]),
        _spread(decode),
        f"{timing['ms_per_step']:.2f}",
        f"{run['weight_bytes'] / 1e6:.0f}",
        f"{rate / 1e9:.1f}",
        f"{rate / peak:.0%}",
        f"{faster:.2f}x" if faster > 1 else "",
    )


def _name(run: dict[str, Any]) -> str:
    engine = "" if run["engine"] == "optim" else f"{run['engine']} "
    form = " as bf16" if run["form"] == "bf16" else ""
    return f"{engine}{run['source']}{form}"


def _spread(rate: dict[str, float]) -> str:
    return f"{rate['median']:.1f} ({rate['min']:.1f}-{rate['max']:.1f})"
