"""torch, imported sooner: for commands whose start is felt. Figures: benchmarks/startup.py."""

import ctypes
import gc
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Thread


def map_library() -> None:
    """Begin to map torch's largest library, in a thread that other imports need not wait for."""
    torch = find_spec("torch") if sys.platform == "linux" else None
    if torch is not None and torch.origin is not None:
        library = Path(torch.origin).parent / "lib" / "libtorch_cpu.so"
        mode = os.RTLD_NOW | os.RTLD_GLOBAL
        opened = ctypes.CDLL(None).dlopen  # as ctypes.CDLL does it, but Python goes on meanwhile
        opened.argtypes, opened.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
        Thread(target=opened, args=(bytes(library), mode), daemon=True).start()


def import_torch() -> None:
    """Import torch without looking for garbage among modules that all stay, now and later.

    All of it: what seems to be of no use here (`torch._meta_registrations`, a fifth of the time)
    imports what `torch.Generator` needs.
    """
    if "torch" in sys.modules:
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        import_module("torch")
    finally:
        gc.freeze()
        if collects:
            gc.enable()
