"""How fast a model runs here: load time, prefill, decode, peak memory, against the machine's limit.

Every model is measured in a process of its own, one after the other, so that its memory is its own
and none warms the caches for the next. The first round of each length is warm-up and not counted.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Protocol

import torch

from optim.recipes.errors import OptimError
from optim.runtime.cache.full import Cache, Policy
from optim.runtime.engine.load import load_model
from optim.runtime.engine.sampling import require_finite
from optim.runtime.measure.job import Job
from optim.runtime.measure.peers import LlamaCpp, Transformers
from optim.runtime.system.devices import pick_device
from optim.runtime.system.memory import peak_bytes

WORKER = "import sys; from optim.runtime.measure.speed import worker; worker(sys.stdin, sys.stdout)"
MARK = "optim-measure:"  # libraries may print to stdout too
PROBE = 1 << 28  # bytes read to measure bandwidth: larger than any cache


@dataclass(slots=True)
class Timing:
    """Seconds of every counted round at one prompt length."""

    prompt_tokens: int
    new_tokens: int
    batch: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Rates: median, and the slowest and fastest round."""
        prompt, new = self.prompt_tokens * self.batch, self.new_tokens * self.batch
        return {
            "prompt_tokens": self.prompt_tokens,
            "prefill_tokens_per_second": _rates(prompt, self.prefill),
            "decode_tokens_per_second": _rates(new, self.decode),
            "ms_per_step": 1e3 * median(self.decode) / self.new_tokens,
        }


def _rates(tokens: int, seconds: Sequence[float]) -> dict[str, float]:
    return {
        "median": tokens / median(seconds),
        "min": tokens / max(seconds),
        "max": tokens / min(seconds),
    }


class Engine(Protocol):
    """One loaded model: `run` gives the seconds of the prefill and of the decode."""

    place: str

    @property
    def weight_bytes(self) -> int: ...

    def run(self, prompt: int, new: int, batch: int) -> tuple[float, float]: ...


class OptimEngine:
    """Our own loop: prefill, then `new` greedy steps."""

    def __init__(self, job: Job) -> None:
        self._model = load_model(
            job.source,
            device=job.device,
            threads=job.threads,
            form=job.form,
            offload=job.offload,
        )
        self._policy, self._context = Policy(job.kv_bits, job.kv_policy), job.context
        self.place = self._model.place

    @property
    def weight_bytes(self) -> int:
        """What a token reads; of a sparse model, what its tokens have read on average."""
        return round(self._model.token_bytes)

    def run(self, prompt: int, new: int, batch: int) -> tuple[float, float]:
        model = self._model
        ids = torch.randint(10, int(model.config["vocab_size"]), (batch, prompt))
        length = self._context or prompt + new
        cache = model.new_cache(batch=batch, length=length, policy=self._policy)
        start = time.perf_counter()
        logits = model.forward(ids, cache)
        token = _largest(logits)
        _wait(model.device)
        middle = time.perf_counter()
        for _ in range(new):
            logits = self._after(token, cache)
            token = _largest(logits)
        _wait(model.device)
        end = time.perf_counter()
        require_finite(logits)
        return middle - start, end - middle

    def _after(self, token: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits `[B, V]`; on a CPU, of one text, sure of the largest alone, as in `run`."""
        if len(token) > 1 or self._model.device.type != "cpu":
            return self._model.forward(token, cache)
        return self._model.step_many([(cache, token[0].tolist())], best=1)[0]


def _largest(logits: torch.Tensor) -> torch.Tensor:
    """int64 `[B, 1]`; on a CPU numpy's, which takes a tenth of torch's time."""
    if not logits.is_cpu:
        return logits.argmax(-1, keepdim=True)
    return torch.from_numpy(logits.numpy().argmax(-1, keepdims=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def engines() -> dict[str, Callable[[Job], Engine]]:
    """What can run a job, by name."""
    return {"optim": OptimEngine, "transformers": Transformers, "llama.cpp": LlamaCpp}


def run_here(job: Job) -> dict[str, Any]:
    """Measure `job` in this process; a dict that JSON can hold."""
    if job.threads:
        torch.set_num_threads(job.threads)
    start = time.perf_counter()
    engine = engines()[job.engine](job)
    load_seconds = time.perf_counter() - start
    timings = []
    for length in job.prompt_tokens:
        timing = Timing(length, job.new_tokens, job.batch)
        engine.run(length, min(4, job.new_tokens), job.batch)
        for _ in range(job.repeat):
            prefill, decode = engine.run(length, job.new_tokens, job.batch)
            timing.prefill.append(prefill)
            timing.decode.append(decode)
        timings.append(timing.summary())
    return {
        "source": job.source,
        "form": job.form,
        "engine": job.engine,
        "place": engine.place,
        "weight_bytes": engine.weight_bytes,
        "load_seconds": load_seconds,
        "peak_bytes": peak_bytes(),
        "load_average": os.getloadavg()[0],
        "timings": timings,
    }


def read_bandwidth(device: torch.device, threads: int | None = None) -> float:
    """Bytes a second that a plain sum over memory reads here; the best of five passes."""
    if threads:
        torch.set_num_threads(threads)
    data = torch.ones(PROBE // 4 * (4 if device.type == "cuda" else 1), device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return data.nbytes / min(seconds)


def worker(source: Any, target: Any) -> None:
    """Serve one request (JSON on `source`): a job, or a bandwidth probe."""
    request = json.load(source)
    try:
        if "device" in request and "source" not in request:
            answer: Any = read_bandwidth(pick_device(request["device"]), request["threads"])
        else:
            answer = run_here(Job(**(request | {"prompt_tokens": tuple(request["prompt_tokens"])})))
        result = {"answer": answer}
    except OptimError as error:
        result = {"error": [error.message, error.fix, error.code]}
    print(MARK + json.dumps(result), file=target, flush=True)


def _ask(request: dict[str, Any]) -> Any:
    """Send a request to a fresh process. Raises what the worker raised, if it explained itself."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["it left no message"])[-1]
        raise OptimError(f"the measuring process ended with {done.returncode}: {last}")
    result = json.loads(lines[-1].removeprefix(MARK))
    if "error" in result:
        raise OptimError(*result["error"])
    return result["answer"]


def measure(job: Job) -> dict[str, Any]:
    """Measure `job` in a process of its own.

    Raises OptimError if the model cannot be loaded, or the process ends without an answer.
    """
    answer: dict[str, Any] = _ask(asdict(job))
    return answer


def bandwidth(device: str, threads: int | None) -> float:
    """`read_bandwidth` in a process of its own, bytes a second."""
    return float(_ask({"device": device, "threads": threads}))
