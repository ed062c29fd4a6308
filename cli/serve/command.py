"""`optim serve`: load the model, listen, and stop in order."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optim.cli import ui
from optim.cli.options import AS_ADVISED, Running, Serving
from optim.cli.run import INTERRUPTED, load
from optim.recipes.errors import MACHINE, USAGE, OptimError

if TYPE_CHECKING:
    import uvicorn

    from optim.runtime.cache.full import Policy
    from optim.runtime.engine.load import Model
    from optim.runtime.engine.sampling import Sampling

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ANYWHERE = ("0.0.0.0", "::")


def serve(source: str, options: Serving, running: Running) -> int:
    """Serve the model at `source` until a signal; returns the exit code.

    Raises OptimError: 2 for an address that would be open to everyone, 4 for one that is taken, or
    where the packages of the extra `serve` are not installed.
    """
    if any(find_spec(name) is None for name in ("starlette", "uvicorn")):
        what = "serving needs the packages starlette and uvicorn"
        raise OptimError(what, "pip install 'optim-llm[serve]'", MACHINE)
    ui.notes.quiet = running.quiet
    key = _key(options)
    with _listening(options) as listener:
        sampling, policy, model = load(source, running, AS_ADVISED)
        context = model.context(running.context)
        plan = _Plan(options, key, model, sampling, policy, context, running.speculate)
        return asyncio.run(_serve(plan, listener, running.json))


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that the server is made of."""

    options: Serving
    key: str | None
    model: Model
    sampling: Sampling
    policy: Policy
    context: int
    speculate: str


def _key(options: Serving) -> str | None:
    """The API key, from a file or the environment: a command line is seen by everyone here."""
    key = os.environ.get("OPTIM_API_KEY")
    if options.api_key_file is not None:
        try:
            key = Path(options.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise OptimError(f"cannot read {options.api_key_file}: {error}", code=USAGE) from None
    if key is not None and not key.isascii():
        raise OptimError("an API key has plain letters and digits", "choose another", USAGE)
    if key == "":
        raise OptimError("the API key is empty", "write one in the file", USAGE)
    if key is None and options.host not in LOOPBACK and not options.no_key:
        fix = "give --api-key-file FILE or OPTIM_API_KEY, or --no-key if that is what you want"
        raise OptimError(f"{options.host} lets others use this machine", fix, USAGE)
    return key


@contextmanager
def _listening(options: Serving) -> Iterator[socket.socket]:
    """The address, taken before the model is loaded."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((options.host, options.port))
        except OSError as error:
            what = f"cannot listen on {options.host} port {options.port}: {error.strerror}"
            raise OptimError(what, "choose another --port, or 0 for a free one", MACHINE) from None
        yield listener


async def _serve(plan: _Plan, listener: socket.socket, as_json: bool) -> int:
    import uvicorn

    from optim.cli.serve.app import Service, application
    from optim.cli.serve.asks import Asker
    from optim.cli.serve.engine import Engine
    from optim.cli.serve.guard import Guard
    from optim.runtime.engine.scheduler import Scheduler
    from optim.runtime.engine.slots import Slots

    options, model = plan.options, plan.model
    slots = Slots(model, options.slots, plan.context, _most_bytes(options), plan.policy)
    name = options.name or model.checkpoint.name
    state = _State(options.grace)
    queue = 4 * options.slots if options.queue is None else options.queue
    asker = Asker(model, slots, name, plan.sampling, plan.speculate)
    engine = Engine(Scheduler(slots), queue, options.queue_timeout, state.broke)
    service = Service(engine, asker, ui.note)
    hosts = None if options.host in ANYWHERE else (*LOOPBACK, options.host.lower())
    guard = Guard(application(service), hosts, plan.key, engine.metrics.requests)
    config = uvicorn.Config(
        guard, log_config=None, access_log=False, log_level="critical", lifespan="off", ws="none"
    )
    config.timeout_graceful_shutdown = 5
    state.server, state.engine = _server(config), engine
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, state.asked, number)
    running = asyncio.create_task(state.server.serve(sockets=[listener]))
    while not state.server.started and not running.done():
        await asyncio.sleep(0.01)
    _announce(listener, options, slots, name, as_json)
    await running
    engine.close()
    return state.code


def _server(config: uvicorn.Config) -> uvicorn.Server:
    """A server that leaves signals to us."""
    import uvicorn

    class Quiet(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Quiet(config)


class _State:
    """Stopping: what is written is finished, up to the grace; a second signal does not wait."""

    def __init__(self, grace: float) -> None:
        self._grace, self.code = grace, 0
        self.server: uvicorn.Server | None = None
        self.engine: Any = None
        self._ending: asyncio.Task[None] | None = None

    def asked(self, number: int) -> None:
        if self._ending is not None:
            self.engine.end_all()
            return
        self.code = INTERRUPTED if number == signal.SIGINT else 0
        self.engine.stopping = True
        ui.note(f"stopping: what is being written is finished, for {self._grace:g} s at most")
        self._ending = asyncio.create_task(self._end(self._grace))

    def broke(self, why: str) -> None:
        ui.note(why, style="red")
        self.code, self.engine.stopping = 1, True
        if self.server is not None:
            self.server.should_exit = True

    async def _end(self, grace: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + grace
        while self.engine.live and loop.time() < end:
            await asyncio.sleep(0.05)
        self.engine.end_all()
        assert self.server is not None
        self.server.should_exit = True


def _most_bytes(options: Serving) -> int | None:
    return None if options.kv_memory is None else options.kv_memory << 20


def _announce(
    listener: socket.socket, options: Serving, slots: Any, name: str, as_json: bool
) -> None:
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    if as_json:
        ui.emit({"url": url, "pid": os.getpid(), "model": name})
    else:
        ui.say(f"{name} at {url}")
    most = ui.size(slots.most_bytes)
    ui.note(
        f"{options.slots} texts at once, {slots.context} tokens each; keys and values take {most}"
        " at most. Ctrl-C stops."
    )
