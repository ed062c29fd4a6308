"""Decode and prefill on a CPU, ours beside llama.cpp and transformers: one run, one table.

    python benchmarks/cpu_decode.py                     # threads 1 and 2, contexts 64 and 1024
    python benchmarks/cpu_decode.py --threads 1 --cpu-time --rounds 5    # on a busy machine

Every engine lives in a process of its own and waits; rounds go from engine to engine, so that what
else the machine does falls on all of them. Our artifacts are made by plain rounding (`-m rtn`) and
llama.cpp's files from the demo's own GGUF: both say how fast, not how well. `--cpu-time` counts the
CPU seconds of a process instead of the wall's: only for one thread, where others work too.

`--ours bf16` runs the demo itself with dense bf16 weights, as transformers does.

`--ik PATH` adds ik_llama.cpp by its own `llama-bench`, with Q4_0 repacked (`-rtr 1 -fa 1`).
Build it with `-DGGML_NATIVE=ON`: without, it falls back to AVX2 in silence. It knows the clock on
the wall only; each round is a process of its own, whose load and warm-up are not counted.

Beside each rate of decode stand the bytes of weights that a token reads, of a .gguf file all of it,
and what that makes a second; above the table, what a sum over 256 MB reads here. A model that the
CPU's caches hold in part may be read faster than that.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers

from optim.cli import WAITING
from optim.runtime.measure.job import Job
from optim.runtime.measure.speed import MARK, bandwidth, engines
from optim.runtime.storage.demo import demo_file
from optim.runtime.system.memory import peak_bytes

Q4_0 = "llama.cpp Q4_0"
FILES = {"Q4_0": 2, "Q4_1": 3, "Q4_K_M": 15}  # llama_ftype
OURS = {
    "g64": ["--group-size", "64"],
    "g32": ["--group-size", "32"],
    "g64 head8": ["--group-size", "64", "--lm-head-bits", "8"],
    "g32 head8": ["--group-size", "32", "--lm-head-bits", "8"],
}
DENSE = "bf16"
PROMPT = "What is the capital of France?"


@dataclass(slots=True)
class Seconds:
    """All rounds of one engine at one context."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    token_bytes: int = 0
    """Of weights, that a decoded token reads."""


def make_artifacts(folder: Path, wanted: list[str]) -> dict[str, str]:
    for name in set(wanted) - {DENSE}:
        out = ["-o", str(folder / name), "--quiet"]
        subprocess.run(["optim", "quantize", "demo", "-m", "rtn", *OURS[name], *out], check=True)
    return {f"optim {name}": "demo" if name == DENSE else str(folder / name) for name in wanted}


def make_ggufs(folder: Path) -> dict[str, str]:
    """The demo's file in llama.cpp's formats; nothing where llama-cpp-python is missing."""
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama-cpp-python is not installed: left out", file=sys.stderr)
        return {}
    import llama_cpp  # type: ignore[import-not-found,unused-ignore]

    options = llama_cpp.llama_model_quantize_default_params()
    options.allow_requantize = True
    made = {}
    for name, kind in FILES.items():
        options.ftype, path = kind, folder / f"{name}.gguf"
        names = str(demo_file()).encode(), str(path).encode()
        if llama_cpp.llama_model_quantize(*names, options):
            raise SystemExit(f"llama.cpp could not write {name}")
        made[f"llama.cpp {name}"] = str(path)
    return made


def serve(text: str, cpu_time: bool) -> None:
    """The worker: loads a Job, then answers lines `prompt new` with `prefill decode` seconds and
    the bytes of weights that a token reads."""
    if cpu_time:
        time.perf_counter = time.process_time  # the clock that engines ask
    job = Job(**json.loads(text))
    torch.set_num_threads(job.threads or 1)
    start = time.perf_counter()
    engine = engines()[job.engine](job)
    facts = {"place": engine.place, "load_seconds": time.perf_counter() - start}
    print(MARK + json.dumps(facts | {"loaded_bytes": peak_bytes()}), flush=True)
    for line in sys.stdin:
        prompt, new = map(int, line.split())
        print(MARK + json.dumps([*engine.run(prompt, new, 1), engine.weight_bytes]), flush=True)


class Remote:
    """An engine in its own process."""

    def __init__(self, job: Job, cpu_time: bool) -> None:
        command = [sys.executable, __file__, "--serve", json.dumps(asdict(job))]
        self.process = subprocess.Popen(
            [*command, *(["--cpu-time"] if cpu_time else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=(WAITING if job.engine == "optim" else {})
            | dict(os.environ)
            | {"OMP_NUM_THREADS": str(job.threads)},
        )
        self.facts: dict[str, Any] = self.answer()

    def answer(self) -> Any:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")

    def run(self, prompt: int, new: int) -> tuple[float, float]:
        assert self.process.stdin
        print(prompt, new, file=self.process.stdin, flush=True)
        prefill, decode, self.token_bytes = self.answer()
        return prefill, decode


class LlamaBench:
    """ik_llama.cpp: a process of its `llama-bench` for each round."""

    def __init__(self, program: str, path: str, threads: int) -> None:
        flags = ["-t", str(threads), "-rtr", "1", "-fa", "1", "-r", "1", "-o", "json"]
        self._command = [program, "-m", path, *flags]
        self.facts = {"place": f"cpu, {threads} threads, {Path(path).name}", "load_seconds": 0.0}
        self.token_bytes = Path(path).stat().st_size

    def run(self, prompt: int, new: int) -> tuple[float, float]:
        asked = ["-p", str(prompt), "-n", "0", "-gp", f"{prompt},{new}"]
        done = subprocess.run([*self._command, *asked], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{self._command[0]} ended with {done.returncode}: {done.stderr}")
        seconds = {row["n_gen"]: row["avg_ns"] / 1e9 for row in json.loads(done.stdout)}
        return seconds[0], seconds[new]


Engine = Remote | LlamaBench


@contextmanager
def remotes(jobs: dict[str, Job], cpu_time: bool) -> Iterator[dict[str, Remote]]:
    with ExitStack() as stack:
        made = {}
        for name, job in jobs.items():
            made[name] = Remote(job, cpu_time)
            stack.callback(made[name].process.kill)
        yield made


def measure(
    engines: Mapping[str, Engine], contexts: list[int], new: int, rounds: int
) -> dict[int, dict[str, Seconds]]:
    """Rounds in turn; the first of each context is warm-up."""
    results: dict[int, dict[str, Seconds]] = {}
    for context in contexts:
        seconds = results[context] = {name: Seconds() for name in engines}
        for at in range(rounds + 1):
            for name, engine in engines.items():
                prefill, decode = engine.run(context, new)
                if at:
                    seconds[name].prefill.append(prefill)
                    seconds[name].decode.append(decode)
                    seconds[name].token_bytes = engine.token_bytes
    return results


def rates(tokens: int, seconds: list[float]) -> dict[str, float]:
    low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": tokens / median(seconds), "low": tokens / high, "high": tokens / low}


def run_memory(source: str) -> int:
    """Peak resident bytes of `optim run` with one answer."""
    command = [
        "optim",
        "run",
        source,
        PROMPT,
        "--temperature",
        "0",
        "--max-tokens",
        "32",
        "--threads",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    return usage.ru_maxrss * 1024


def row(name: str, rate: dict[str, float], peers: dict[str, float], token_bytes: int) -> str:
    spread = f"{rate['median']:7.1f} ({rate['low']:.1f}-{rate['high']:.1f})"
    ratios = "  ".join(f"{rate['median'] / peer:.2f}x" for peer in peers.values())
    a_second = rate["median"] * token_bytes / 1e9
    read = f"  {token_bytes / 1e6:.1f} MB a token, {a_second:.1f} GB/s" if token_bytes else ""
    return f"{name:20s} {spread:26s} {ratios}{read}"


def show(threads: int, context: int, found: dict[str, dict[str, Any]]) -> None:
    for kind in ("decode", "prefill"):
        peers = {n: r[kind]["median"] for n, r in found.items() if not n.startswith("optim")}
        print(f"\n{threads} threads, {context} tokens; {kind} tok/s (quartiles); against: ", end="")
        print(", ".join(peers) or "nobody")
        for name, rate in found.items():
            print(row(name, rate[kind], peers, rate["token_bytes"] if kind == "decode" else 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--contexts", default="64,1024")
    parser.add_argument("--ours", default=",".join(OURS))
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--ik", metavar="PATH", help="ik_llama.cpp's llama-bench")
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.cpu_time)
    if options.ik and options.cpu_time:
        parser.error("--ik measures by the wall's clock: leave --cpu-time out")
    contexts = [int(c) for c in options.contexts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        ours = make_artifacts(Path(folder), options.ours.split(","))
        sources = ours | make_ggufs(Path(folder))
        if options.ik and Q4_0 not in sources:
            parser.error("--ik runs a file that llama-cpp-python writes: install that too")
        if not options.no_transformers:
            sources["transformers bf16"] = "demo"
        report: dict[str, Any] = {
            "cpu": platform.processor() or platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "clock": "cpu" if options.cpu_time else "wall",
            "run_peak_bytes": {name: run_memory(source) for name, source in ours.items()},
            "results": [],
        }
        for threads in map(int, options.threads.split(",")):
            measure_at(threads, contexts, sources, options, report)
    for name, peak in report["run_peak_bytes"].items():
        print(f"{name}: `optim run` peaks at {peak / 1e6:.0f} MB")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def measure_at(
    threads: int, contexts: list[int], sources: dict[str, str], options: Any, report: dict[str, Any]
) -> None:
    def job(name: str, source: str) -> Job:
        engine, form = name.split()[0], "bf16" if name == f"optim {DENSE}" else "planes"
        lengths, new = tuple(contexts), options.new
        return Job(source, engine, lengths, new, threads=threads, device="cpu", form=form)

    before, read = os.getloadavg(), bandwidth("cpu", threads)
    print(f"{threads} threads read {read / 1e9:.1f} GB/s here")
    with remotes({n: job(n, s) for n, s in sources.items()}, options.cpu_time) as ours:
        engines: dict[str, Engine] = dict(ours)
        if options.ik:
            engines["ik_llama Q4_0"] = LlamaBench(options.ik, sources[Q4_0], threads)
        for name, engine in engines.items():
            print(f"{name}: {engine.facts['place']}, load {engine.facts['load_seconds']:.1f} s")
        results = measure(engines, contexts, options.new, options.rounds)
        facts = {name: engine.facts for name, engine in engines.items()}
    for context, seconds in results.items():
        found = {
            name: {
                "prefill": rates(context, s.prefill),
                "decode": rates(options.new, s.decode),
                "token_bytes": s.token_bytes,
            }
            for name, s in seconds.items()
        }
        show(threads, context, found)
        load = {"before": before, "after": os.getloadavg()}
        entry = {"threads": threads, "context": context, "load_average": load, "rates": found}
        entry["read_bytes_per_second"] = read
        report["results"].append(entry | {"engines": facts})
    print(f"load average {before[0]:.1f} before, {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
