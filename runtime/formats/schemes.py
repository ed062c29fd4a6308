"""Which module is stored how: `quantization_config` <-> a scheme for each linear.

The block is compressed-tensors' own (`quant_method` "compressed-tensors", format "pack-quantized").
A module's scheme is that of the first target which matches it: its exact name, then `re:` patterns
(matched from the start of the name, in sorted order), then the class target "Linear"; `ignore`
wins over all. What this runtime cannot compute exactly is refused with the reason.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optim.recipes.errors import USAGE, OptimError
from optim.recipes.patterns import check_pattern, matches

FORMAT = "pack-quantized"
LAYOUT_VERSION = "0.19.0"  # the compressed-tensors release whose dense bit layout is written

BITS = (2, 3, 4, 5, 6, 8)

SchemeOf = Callable[[str], "Scheme | None"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one linear is stored: `group_size` inputs share a scale (-1: a whole output channel).

    With an `offset` a float is added where else an integer zero point is taken away: formats of
    others have that (GGUF, MLX), compressed-tensors does not. `blocks` names the type of GGUF's
    blocks (formats/blocks.py) in which codes and scales are to be stored, if they are.
    """

    bits: int
    group_size: int
    symmetric: bool
    offset: bool = False
    blocks: str | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise OptimError(f"{self.bits} bits are not supported", "use 2 to 6, or 8", USAGE)
        if self.group_size != -1 and self.group_size < 1:
            raise OptimError(f"group size {self.group_size} makes no sense", "use -1 or 16 to 256")

    def groups(self, inputs: int) -> int:
        """Number of scales a row has; OptimError if the group size does not divide `inputs`."""
        size = self.group_size if self.group_size > 0 else inputs
        if inputs % size:
            divisors = [g for g in (256, 128, 64, 32, 16) if inputs % g == 0]
            fix = f"group sizes that fit: {', '.join(map(str, divisors)) or '-1 (per channel)'}"
            raise OptimError(f"group size {size} does not divide {inputs} inputs", fix, USAGE)
        return inputs // size

    def __str__(self) -> str:
        if self.blocks is not None:
            return self.blocks.upper()
        size = f"g{self.group_size}" if self.group_size > 0 else "per channel"
        kind = "sym" if self.symmetric else "offset" if self.offset else "asym"
        return f"{self.bits}-bit {size} {kind}"


def parse_config(config: Mapping[str, Any]) -> SchemeOf:
    """The scheme of each linear, from a checkpoint's `quantization_config`.

    Returns a function from the module name of a linear to its `Scheme`, None where it is plain.
    Raises OptimError (2) for another method or format, and for anything that would change results.
    """
    _refuse_foreign(config)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refused("it has no config_groups")
    schemes: dict[str, Scheme] = {}
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise _refused(f"{name} is not a mapping")
        scheme = _read_group(str(name), group)
        schemes.update({target: scheme for target in _targets(group.get("targets"), str(name))})
    patterns = [target for target in sorted(schemes) if target.startswith("re:")]
    ignored = _targets(config.get("ignore") or [], "ignore")

    def scheme_of(name: str) -> Scheme | None:
        if any(matches(target, name) for target in ignored):
            return None
        if name in schemes:
            return schemes[name]
        by_pattern = (schemes[pattern] for pattern in patterns if matches(pattern, name))
        return next(by_pattern, schemes.get("Linear"))

    return scheme_of


def write_config(schemes: Mapping[str, Scheme], ignored: Iterable[str] = ()) -> dict[str, Any]:
    """The `quantization_config` under which every reader gives each module its scheme.

    The most common scheme is targeted by class ("Linear"), the others by exact module names,
    which every reader prefers to classes. `ignored` are the linears that stay plain.
    Raises OptimError (2) if nothing is quantized.
    """
    if not schemes:
        raise OptimError("no module is quantized, so there is no scheme to write", code=USAGE)
    ordered = [scheme for scheme, _ in Counter(schemes.values()).most_common()]
    named = {s: [name for name, scheme in schemes.items() if scheme == s] for s in ordered[1:]}
    groups = [*named.items(), (ordered[0], ["Linear"])]
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        # Read by transformers alone: unpack at load. Its packed way rejects asymmetric weights
        # (compressed-tensors 0.20 expects their zero points unpacked), and unpacks all the same.
        # But this way takes every module for one of the first group: wrong where there are more.
        "dequantize": len(ordered) == 1,
        "version": LAYOUT_VERSION,
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "ignore": sorted(ignored),
        "config_groups": {
            f"group_{i}": _write_group(scheme, targets)
            for i, (scheme, targets) in enumerate(groups)
        },
    }


def _refuse_foreign(config: Mapping[str, Any]) -> None:
    method, layout = config.get("quant_method"), config.get("format")
    if method not in (None, "compressed-tensors"):
        raise _refused(f"its method is {method!r}")
    if layout not in (FORMAT, "mixed-precision"):
        raise _refused(f"its format is {layout!r}")
    if config.get("quantization_status", "compressed") != "compressed":
        raise _refused(f"its weights are {config['quantization_status']!r}, not compressed")
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            raise _refused(f"it has a {key}, which would change the results")
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise _refused(f"its weights are also stored sparse ({sparsity!r:.60})")


def _read_group(name: str, group: Mapping[str, Any]) -> Scheme:
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise _refused(f"{name} quantizes {key.replace('_', ' ')} too")
    if group.get("format") not in (None, FORMAT):
        raise _refused(f"{name} has the format {group['format']!r}")
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise _refused(f"{name} does not say how weights are stored")
    if weights.get("type", "int") != "int" or weights.get("dynamic"):
        raise _refused(f"{name} stores weights as {weights.get('type')!r}, dynamic or not integer")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise _refused(f"{name} orders groups by activations (actorder {weights['actorder']!r})")
    return Scheme(
        bits=_integer(weights.get("num_bits"), f"{name}: num_bits"),
        group_size=_group_size(name, weights),
        symmetric=bool(weights.get("symmetric", True)),
    )


def _group_size(name: str, weights: Mapping[str, Any]) -> int:
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("channel" if size in (None, -1) else "group")
    if strategy == "channel":
        return -1
    if strategy != "group":
        raise _refused(f"{name} has the strategy {strategy!r}")
    return _integer(size, f"{name}: group_size")


def _write_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    grouped = scheme.group_size > 0
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": scheme.group_size if grouped else None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    activations = {"input_activations": None, "output_activations": None}
    return {"format": FORMAT, "targets": targets, "weights": weights, **activations}


def _targets(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _refused(f"{where} has no list of target names")
    try:
        return [check_pattern(item) for item in value]
    except ValueError as error:
        raise _refused(f"{where}: {error}") from None


def _integer(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _refused(f"{what} is {value!r}")
    return value


def _refused(reason: str) -> OptimError:
    message = f"the checkpoint's quantization_config is not one that optim can run: {reason}"
    return OptimError(message, "use a compressed-tensors pack-quantized checkpoint", USAGE)
