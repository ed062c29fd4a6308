"""`optim doctor`: versions, memory, devices, a self-test of each kernel, and a proof of each path.

A kernel is a file of `runtime/kernels`; its `check()` compares it with its reference on small odd
shapes and returns what it runs on, or raises NoKernel with the reason why it cannot be used here.
A path is a kind of model, decoded with a cache in one of the ways of this machine (paths.py).
"""

import os
import pkgutil
import platform
import shutil
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from optim.cli import ui
from optim.cli.paths import Proof, prove
from optim.recipes.errors import CHECK_FAILED, OptimError

PACKAGES = ("optim-llm", "torch", "triton", "transformers", "safetensors", "tokenizers", "numba")


def doctor(as_json: bool, levels: bool = False) -> None:
    """Print what this machine can run; raises OptimError (3) if a path does not hold."""
    proofs = _prove(levels)
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "memory": _memory(),
        "disk": {"free": shutil.disk_usage(".").free},
        "gpus": _gpus(),
        "packed_without_loss": _packed(),
        "kernels": [result for name in _kernels() if (result := _check(name))],
        "paths": [proof.as_dict() for proof in proofs],
    }
    if as_json:
        ui.emit(found)
    else:
        _show(found)
        _show_paths(proofs)
    if wrong := [proof for proof in proofs if not proof.holds]:
        first = wrong[0]
        what = (
            f"{len(wrong)} of {len(proofs)} paths do not hold, such as {first.model} {first.route}"
        )
        fix = "do not trust such models here, and report it with `optim doctor --json`"
        raise OptimError(what, fix, CHECK_FAILED)


def _prove(levels: bool) -> list[Proof]:
    from optim.runtime.system import instructions

    ui.status("proving every path, some 15 s ...")
    try:
        return prove(instructions.levels() if levels else ())
    finally:
        ui.status()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    from optim.runtime.system.instructions import has_bf16_units

    names = _fields("/proc/cpuinfo")
    return {
        "name": names.get("model name") or platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": has_bf16_units(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
    }


def _cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> dict[str, int | None]:
    """Bytes of memory; None where the system does not say."""
    lines = _fields("/proc/meminfo")
    found = {"total": lines.get("MemTotal"), "available": lines.get("MemAvailable")}
    return {key: int(text.split()[0]) * 1024 if text else None for key, text in found.items()}


def _fields(path: str) -> dict[str, str]:
    """The `key: value` lines of a file; of a key that comes twice, the first."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in reversed(lines))
    return {key.strip(): value.strip() for key, _, value in pairs}


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{card.major}.{card.minor}"
        found.append({"name": card.name, "capability": capability, "total": total, "free": free})
    return found


def _packed() -> str:
    """What models packed without loss gain on the device that `auto` takes."""
    from optim.runtime.decoder.linears.bf12 import prospect
    from optim.runtime.system.devices import pick_device

    device = pick_device("auto")
    return f"{device.type}: {prospect(device)[1]}"


def _kernels() -> list[str]:
    """The modules of `runtime/kernels`."""
    from optim.runtime import kernels

    found = pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
    return sorted(module.name.removeprefix(f"{kernels.__name__}.") for module in found)


def _check(name: str) -> dict[str, Any] | None:
    """One kernel's self-test: whether it works here, and on what or why not; None if no kernel."""
    try:
        check = getattr(import_module(f"optim.runtime.kernels.{name}"), "check", None)
        detail = check() if check else ""
    except Exception as problem:  # whatever is wrong with one kernel, the others are still tested
        return {"name": name, "works": False, "detail": str(problem) or type(problem).__name__}
    return {"name": name, "works": True, "detail": detail} if check else None


def _show(found: dict[str, Any]) -> None:
    cpu, memory = found["cpu"], found["memory"]
    bf16 = "bf16 units" if cpu["bf16"] else "no bf16 units"
    amounts = [f"{ui.size(value)} {key}" for key, value in memory.items() if value]
    rows = [
        ("python", f"{found['python']} on {found['system']}"),
        *((name, number or "not installed") for name, number in found["packages"].items()),
        ("cpu", f"{cpu['name']}, {cpu['capability']}, {bf16}"),
        ("threads", f"{cpu['threads']} on {cpu['cores']} cores"),
        ("memory", ", ".join(amounts) or "unknown"),
        ("disk", f"{ui.size(found['disk']['free'])} free here"),
    ]
    for gpu in found["gpus"]:
        free = f"{ui.size(gpu['free'])} of {ui.size(gpu['total'])} free"
        rows.append(("gpu", f"{gpu['name']}, capability {gpu['capability']}, {free}"))
    rows += [] if found["gpus"] else [("gpu", "none")]
    rows.append(("packed models", found["packed_without_loss"]))
    ui.table(("machine", ""), rows, left=2)
    kernels = ((k["name"], "works" if k["works"] else "no", k["detail"]) for k in found["kernels"])
    ui.table(("kernel", "here", "detail"), kernels, left=3)


def _show_paths(proofs: list[Proof]) -> None:
    """A row for each model and route: of all caches the largest difference."""
    rows = []
    for model, route in dict.fromkeys((proof.model, proof.route) for proof in proofs):
        some = [p for p in proofs if (p.model, p.route) == (model, route)]
        worst = max(some, key=lambda proof: proof.share)
        detail = worst.problem or f"at most {worst.bound:g}"
        holds = "holds" if all(proof.holds for proof in some) else "NO"
        rows.append((model, route, holds, str(len(some)), f"{worst.share:.1g}", detail))
    ui.say(
        "logits beside those of torch alone: the largest difference, as a share of a row's length"
    )
    ui.table(("path", "route", "here", "caches", "difference", ""), rows, left=3)
