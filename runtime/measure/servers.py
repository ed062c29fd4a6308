"""Servers in processes of their own, to be measured from outside: ours, and llama.cpp's."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from optim.recipes.errors import MACHINE, OptimError

ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")
LLAMA_CPP = """
import sys, xllamacpp
path, context, slots, threads = sys.argv[1], *map(int, sys.argv[2:])
asked = xllamacpp.CommonParams()
asked.model.path, asked.port = path, 0
asked.n_parallel, asked.n_ctx = slots, context * slots
asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(asked)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


def optim_server(source: str, context: int, slots: int, threads: int) -> list[str]:
    """The command that serves `source` with this program."""
    sizes = ["--slots", str(slots), "--context", str(context), "--threads", str(threads)]
    return [sys.executable, "-m", "optim.cli", "serve", source, "--port", "0", "--quiet", *sizes]


def llama_cpp_server(path: str, context: int, slots: int, threads: int) -> list[str]:
    """The command that serves a .gguf file with llama.cpp's server. OptimError (4) without it."""
    if find_spec("xllamacpp") is None:
        raise OptimError("xllamacpp is not installed", "pip install 'optim-llm[peers]'", MACHINE)
    return [sys.executable, "-c", LLAMA_CPP, path, str(context), str(slots), str(threads)]


@contextmanager
def started(command: list[str]) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """Run `command`, which prints its address when it is ready: the process, and the port.

    Raises OptimError (4), with what it said last, if it ends before.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        )
        try:
            assert process.stdout is not None
            found = next(filter(None, map(ADDRESS.search, process.stdout)), None)
            if found is None:
                said.seek(0)
                raise OptimError(f"the server did not start: {said.read()[-500:]}", code=MACHINE)
            yield process, int(found[1])
        finally:
            process.terminate()
            process.communicate()
