"""`optim bench --serve`: throughput and latency of a server, beside llama.cpp's."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from optim.cli import ui
from optim.recipes.errors import USAGE, OptimError

if TYPE_CHECKING:
    from optim.cli.options import Timing

PEER = "llama.cpp"
ROOM = 128  # tokens beside a prompt's words: the chat template, and what is asked


def bench(source: str, asked: Timing) -> None:
    """Serve `source`, and with `--peer llama.cpp` a .gguf file too; print the table.

    Raises OptimError: 2 for flags that do not go together, 4 for a server that does not start.
    """
    from optim.cli.bench import numbers
    from optim.runtime.measure.servers import llama_cpp_server, optim_server, started
    from optim.runtime.measure.serving import serving

    ui.notes.quiet = asked.quiet
    clients = numbers("--clients", asked.clients)
    prompt = numbers("--prompt-tokens", asked.prompt_tokens)[0]
    if asked.draft or asked.batch != 1 or set(asked.peer or ()) - {PEER} or max(clients) > 64:
        fix = f"leave --draft and --batch out; the peer is {PEER}, and there are 64 clients at most"
        raise OptimError("these flags do not go with --serve", fix, USAGE)
    threads = asked.threads or len(os.sched_getaffinity(0))
    sizes = (asked.context or 2 * prompt + asked.new_tokens + ROOM, max(clients), threads)
    flags = ["--speculate", asked.speculate, *(["--exact"] if asked.exact else [])]
    commands = {"optim": [*optim_server(source, *sizes), *flags]}
    if asked.peer:
        commands[PEER] = llama_cpp_server(_gguf(asked.against or source), *sizes)
    with ui.progress("bench") as told, ExitStack() as stack:
        told(0, 1, "loading")
        ports = {n: stack.enter_context(started(c))[1] for n, c in commands.items()}
        wanted = {"prompt": prompt, "new": asked.new_tokens}
        rows = list(serving(ports, clients, wanted, asked.repeat, told))
    if asked.json:
        ui.emit({"source": source, "threads": threads, "speculate": asked.speculate, "rows": rows})
        return
    heads = ("server", "clients", "tok/s", f"beside {PEER}", "first token ms", "between tokens ms")
    ui.table(heads, [cells for row in rows for cells in _cells(row)])
    ui.say(
        f"{threads} threads · prompts of about {prompt} words, {asked.new_tokens} tokens at most"
    )
    ui.say("milliseconds: half, 95 and 99 of 100 are below; the servers took turns")


def _gguf(source: str) -> str:
    from optim.runtime.measure.peers import gguf_file

    return str(gguf_file(source))


def _cells(row: dict[str, Any]) -> list[tuple[str, ...]]:
    peer = row["servers"].get(PEER)
    return [
        (
            name,
            str(row["clients"]),
            f"{one['tokens_per_second']:.1f}",
            f"{one['tokens_per_second'] / peer['tokens_per_second']:.2f}x" if peer else "",
            " / ".join(f"{ms:.0f}" for ms in one["first_ms"].values()),
            " / ".join(f"{ms:.1f}" for ms in one["between_ms"].values()),
        )
        for name, one in row["servers"].items()
    ]
