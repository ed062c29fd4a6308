"""`optim serve`: load the model, listen, and stop in order."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from optim.cli import ui
from optim.cli.options import AS_ADVISED, Running, Serving
from optim.cli.run import INTERRUPTED, load
from optim.recipes.errors import MACHINE, USAGE, OptimError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp, Scope

    from optim.cli.serve.app import Service
    from optim.cli.serve.engine import Engine
    from optim.runtime.cache.full import Policy
    from optim.runtime.engine.load import Model
    from optim.runtime.engine.sampling import Sampling

T = TypeVar("T")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
ANYWHERE = ("0.0.0.0", "::")
ORIGIN = re.compile(r"https?://[\w.-]+(:\d+)?|https?://\[[\da-f:]+\](:\d+)?", re.ASCII)
SENT = 128 << 10  # bytes that the system holds for a client that does not read
CLOSING = 10.0  # seconds for the step that is under way
GOODBYE = 0.3  # seconds for the last words to clients, when nothing is waited for


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
    _check_origins(options.cors or ())
    with _listening(options) as listener:
        return asyncio.run(_Uptime(options, running).run(source, listener, key))


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


def _check_origins(origins: Sequence[str]) -> None:
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            fix = "give one site, like https://chat.example: any page could use the server else"
            raise OptimError(f"--cors cannot be {origin!r}", fix, USAGE)


@contextmanager
def _listening(options: Serving) -> Iterator[socket.socket]:
    """The address, taken before the model is loaded."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENT)
        try:
            listener.bind((options.host, options.port))
        except OSError as error:
            what = f"cannot listen on {options.host} port {options.port}: {error.strerror}"
            raise OptimError(what, "choose another --port, or 0 for a free one", MACHINE) from None
        yield listener


class _Uptime:
    """From the first request to the last signal.

    The address answers while the model is loaded, in a thread. On a signal what is written is
    finished, up to the grace; a second one does not wait.
    """

    def __init__(self, options: Serving, running: Running) -> None:
        from optim.cli.serve.app import Service
        from optim.cli.serve.metrics import Metrics

        self._options, self._running, self._code = options, running, 0
        self._service = Service(Metrics(), ui.note, options.send_timeout, self._hang_up)
        self._server: uvicorn.Server
        self._ending: asyncio.Task[None] | None = None

    async def run(self, source: str, listener: socket.socket, key: str | None) -> int:
        """Serve until a signal, or a failure; the exit code. Raises what `load` does."""
        self._server = _server(_application(self._service, self._options, key))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._asked, number)
        serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        try:
            loaded = await _in_thread(partial(load, source, self._running, AS_ADVISED))
            self._open(*loaded, listener)
        except BaseException:
            self._server.should_exit = self._server.force_exit = True
            raise
        finally:
            await serving
        assert self._service.engine is not None
        self._service.engine.close(GOODBYE if self._server.force_exit else CLOSING)
        return self._code

    def _open(
        self, sampling: Sampling, policy: Policy, model: Model, listener: socket.socket
    ) -> None:
        """Take requests."""
        from optim.cli.serve.asks import Asker
        from optim.cli.serve.engine import Engine
        from optim.runtime.engine.scheduler import Scheduler
        from optim.runtime.engine.slots import Slots

        options, running = self._options, self._running
        most = None if options.kv_memory is None else options.kv_memory << 20
        slots = Slots(model, options.slots, model.context(running.context), most, policy)
        name = options.name or model.checkpoint.name
        queue = 4 * options.slots if options.queue is None else options.queue
        loop, metrics = Scheduler(slots), self._service.metrics
        self._service.asker = Asker(model, slots, name, sampling, running.speculate)
        self._service.engine = Engine(loop, metrics, queue, options.queue_timeout, self._broke)
        _announce(listener, options, slots, name, running.json)

    def _asked(self, number: int) -> None:
        code = INTERRUPTED if number == signal.SIGINT else 0
        engine = self._service.engine
        if engine is None:  # a thread that loads cannot be stopped
            os._exit(code)
        if self._ending is None:
            self._code, engine.stopping = code, True
            grace = self._options.grace
            ui.note(f"stopping: what is being written is finished, for {grace:g} s at most")
            self._ending = asyncio.create_task(self._end(engine, grace))
        else:
            engine.end_all()
            self._server.should_exit = self._server.force_exit = True
            asyncio.get_running_loop().call_later(GOODBYE / 2, self._hang_up)

    def _broke(self, why: str) -> None:
        ui.note(why, style="red")
        assert self._service.engine is not None
        self._code, self._service.engine.stopping = 1, True
        self._server.should_exit = True

    async def _end(self, engine: Engine, grace: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + grace
        while engine.live and loop.time() < end:
            await asyncio.sleep(0.05)
        engine.end_all()
        self._server.should_exit = True

    def _hang_up(self, scope: Scope | None = None) -> None:
        """Break off the connection of `scope`, or all: what was sent and not read is let go."""
        for connection in list(self._server.server_state.connections):
            if scope is None or getattr(connection, "client", None) == scope["client"]:
                connection.transport.abort()


async def _in_thread(work: Callable[[], T]) -> T:
    """What `work` gives or raises; the thread is not waited for when the program ends."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            loop.call_soon_threadsafe(done.set_result, work())
        except BaseException as problem:
            loop.call_soon_threadsafe(done.set_exception, problem)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await done


def _application(service: Service, options: Serving, key: str | None) -> ASGIApp:
    """The routes behind their door; pages of the origins asked for may read the answers."""
    from starlette.middleware.cors import CORSMiddleware

    from optim.cli.serve.app import application
    from optim.cli.serve.guard import Guard

    hosts = None if options.host in ANYWHERE else (*LOOPBACK, options.host.lower())
    guard = Guard(application(service), hosts, key, service.metrics.requests)
    if not options.cors:
        return guard
    told = ("X-Request-Id", "Retry-After")
    return CORSMiddleware(
        guard,
        allow_origins=options.cors,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=told,
    )


def _server(app: ASGIApp) -> uvicorn.Server:
    """A server that leaves signals to us."""
    import uvicorn

    class Quiet(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app, http="h11", log_config=None, access_log=False, log_level="critical", lifespan="off"
    )
    config.ws, config.timeout_graceful_shutdown = "none", 5
    return Quiet(config)


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
