"""What a recipe will do to a model, decided and checked before the first weight is read.

Only configuration and headers are looked at: each linear's format, sizes, memory, disk, the output
folder. All problems are found together and raised as one error.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from optim.quant.effort import products
from optim.quant.methods import METHODS
from optim.quant.needs import artifact_rows, guide_bytes, peak_bytes, state_bytes
from optim.quant.solver import Method
from optim.recipes.errors import MACHINE, USAGE, OptimError
from optim.recipes.patterns import matches
from optim.recipes.schema import Override, Recipe, Rounding
from optim.runtime.architecture.table import FAMILIES
from optim.runtime.formats.blocks import BLOCKS, INSTEAD
from optim.runtime.formats.pack_quantized import Scheme
from optim.runtime.storage.checkpoint import Checkpoint, require_plain
from optim.runtime.storage.join import MOST_BYTES
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.size_table import SizeRow, rounded_before, size_rows, stored
from optim.runtime.system.devices import pick_device
from optim.runtime.system.output import output_problems
from optim.runtime.text.windows import calibration_notes, windows_for
from optim.runtime.walk.walk import Walk

# Perplexity of `demo`, group 64, as docs/awq.md has it: 3 bits on text A, 2 bits on text B.
COST_OF_FEW_BITS = {
    3: "3 bits cost a small model much: perplexity of demo 23.3 -> 30.7 (4 bits: 24.6)",
    2: "2 bits break small models with every method here: perplexity of demo 19.7 -> 157.8",
}
GUIDE_COSTS = (
    "guide loss first walks the model forwards and backwards over the text ({:.2f} GB of disk), "
    "then solves one block of sixteen both ways, to see on held-back text whether it pays"
)
AUTO_GROUPS = (128, 64, 32, 16)
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked recipe for one model; `recipe` has every value resolved."""

    recipe: Recipe
    method: Method
    checkpoint: Checkpoint
    walk: Walk
    schemes: dict[str, Scheme]
    ignored: tuple[str, ...]
    output: Path
    force: bool
    groups: list[SizeRow]
    source_bytes: int
    output_bytes: int
    peak_bytes: int
    disk_bytes: int
    notes: tuple[str, ...]

    @property
    def products(self) -> int:
        """Multiplications of the work, for an estimate of its time."""
        shapes = linear_shapes(self.checkpoint, self.walk)
        solved = {name: shape for name, shape in shapes.items() if name in self.schemes}
        return products(self.method, self.recipe, solved, _active(self.checkpoint))

    def as_dict(self) -> dict[str, Any]:
        """For the screen and for `--json`."""
        text = self.recipe.calibration.summary
        return {
            "model": self.checkpoint.name,
            "blocks": len(self.walk),
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "peak_bytes": self.peak_bytes,
            "disk_bytes": self.disk_bytes,
            "products": self.products,
            "calibration": text if self.method.reads_text else "none",
            "groups": [asdict(row) for row in self.groups],
            "notes": list(self.notes),
            "output": str(self.output),
            "recipe": self.recipe.model_dump(mode="json"),
        }

    def check_text(self) -> None:
        """Read the calibration text as the run will; OptimError (2) says what is wrong with it.

        Text that the model writes itself is not written for that.
        """
        calibration = self.recipe.calibration
        if self.method.reads_text and calibration.dataset != "self":
            windows_for(calibration, self.checkpoint.tokenizer())


def plan(
    recipe: Recipe,
    *,
    force: bool = False,
    device: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    suffix: str = "",
) -> Plan:
    """Open the recipe's model and check everything that can be checked without its weights.

    `suffix` comes behind the output's name, given or made up.
    Raises OptimError: 2 for what the recipe or the model gets wrong, 4 for what the machine lacks.
    """
    assert recipe.model is not None
    if recipe.quantize is None:
        raise OptimError("the recipe has no section quantize", "give a method: -m awq", USAGE)
    if threads:
        torch.set_num_threads(threads)
    checkpoint = open_checkpoint(recipe.model, trust_remote_code=trust_remote_code)
    require_plain(checkpoint)
    method = METHODS[recipe.quantize.method]
    method.check(recipe.quantize, checkpoint)
    walk = Walk(checkpoint, pick_device(device))
    shapes = linear_shapes(checkpoint, walk)
    recipe = _resolve(recipe, checkpoint, shapes)
    assert recipe.quantize is not None
    schemes = assign(recipe.quantize, shapes)
    output = _output(recipe, method, checkpoint, suffix)
    rows = artifact_rows(checkpoint, shapes, schemes)
    output_bytes = sum(row.nbytes for row in rows)
    state = state_bytes(method, recipe, checkpoint)
    guide = guide_bytes(recipe, state, len(walk), len(shapes))
    disk = output_bytes + 2 * state + guide
    disk += output_bytes if output_bytes <= MOST_BYTES else 0  # the shards and the one file of them
    inputs = [*checkpoint.inputs(), *recipe.calibration.places]
    problems = [*_pattern_problems(recipe.quantize, shapes), *_shape_problems(shapes, schemes)]
    problems += output_problems(output, force, disk, inputs)
    if problems:
        raise _together(problems)
    return Plan(
        recipe=recipe.model_copy(update={"output": str(output)}),
        method=method,
        checkpoint=checkpoint,
        walk=walk,
        schemes=schemes,
        ignored=tuple(sorted(shapes.keys() - schemes.keys())),
        output=output,
        force=force,
        groups=size_rows(rows),
        source_bytes=sum(row.nbytes for row in stored(checkpoint)),
        output_bytes=output_bytes,
        peak_bytes=peak_bytes(method, recipe, checkpoint, shapes, walk),
        disk_bytes=disk,
        notes=(
            *method.notes(recipe, shapes, schemes),
            *_notes(method, checkpoint, schemes, output_bytes),
            *([GUIDE_COSTS.format(guide / 1e9)] if guide else []),
        ),
    )


def _active(checkpoint: Checkpoint) -> float:
    """The share of the experts that a token runs through; 1 where there are none."""
    config = checkpoint.text_config
    chosen = config.get("num_experts_per_tok")
    there = config.get("num_experts") or config.get("num_local_experts")
    return chosen / there if chosen and there else 1.0


def _output(recipe: Recipe, method: Method, checkpoint: Checkpoint, suffix: str) -> Path:
    section = recipe.quantize
    assert section is not None
    name = f"./{checkpoint.name}-{section.method}-{method.form(section)}"
    return Path((recipe.output or name) + suffix)


def _notes(
    method: Method, checkpoint: Checkpoint, schemes: Mapping[str, Scheme], output_bytes: int
) -> Iterator[str]:
    """What one should know beforehand, though nothing is wrong."""
    yield from _source_notes(checkpoint, output_bytes)
    if method.reads_text:
        yield from calibration_notes(checkpoint.tokenizer())
    family = checkpoint.family
    if family not in FAMILIES:
        yield f"family {family} is not in the table: its groups are found from the graph"
    if why := only_ours(schemes):
        yield f"transformers will not load {why}; `optim run` does"
    formats = set(schemes.values())
    fewest = min((scheme.bits for scheme in formats), default=16)
    if fewest in COST_OF_FEW_BITS:
        yield COST_OF_FEW_BITS[fewest]


def only_ours(schemes: Mapping[str, Scheme]) -> str | None:
    """What it is in a packed model that transformers refuses, if there is something."""
    formats = set(schemes.values())
    if any(scheme.blocks for scheme in formats):
        return "blocks of GGUF: `optim export` makes the file that llama.cpp reads"
    if mixes_experts(schemes):
        return "experts in a model of several formats"
    if all(scheme.symmetric for scheme in formats):
        return None
    if len(formats) > 1:
        return "linears of several asymmetric formats"
    experts = any(".experts." in name for name in schemes)
    return "experts with zero points (--sym makes a folder that it loads)" if experts else None


def mixes_experts(schemes: Mapping[str, Scheme]) -> bool:
    """Whether a model of several formats has experts: transformers reads some of those wrongly."""
    return len(set(schemes.values())) > 1 and any(".experts." in name for name in schemes)


def _source_notes(checkpoint: Checkpoint, output_bytes: int) -> Iterator[str]:
    """What to know of a source that is integers already, as most GGUF files are."""
    if (held := rounded_before(checkpoint)) is None:
        return
    yield (
        f"the source is already {held}: what it lost stays lost, and errors are measured against "
        "it; the original weights would give a better model"
    )
    nbytes = sum(row.nbytes for row in stored(checkpoint))
    if output_bytes > nbytes:
        yield f"the result is larger than the source's {nbytes / 1e6:.0f} MB"


def linear_shapes(checkpoint: Checkpoint, walk: Walk) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear of the model by canonical name, experts one by one."""
    names = walk.linear_names() | {walk.head_name}
    shapes = {}
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module in names:
            shapes[module] = (info.shape[0], info.shape[1])
    if walk.head_name not in shapes:  # tied: the embedding is the head
        vocab, hidden = walk.model.get_input_embeddings().weight.shape
        shapes[walk.head_name] = (vocab, hidden)
    return shapes


def assign(quantize: Rounding, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Scheme]:
    """The scheme of each linear that the recipe quantizes."""
    found = {}
    for name in shapes:
        is_head = not _in_block(name)
        if is_head and quantize.lm_head_bits:
            found[name] = _scheme(quantize, None, shapes[name][1], quantize.lm_head_bits)
        elif _matches_any(quantize.targets, name) and not _matches_any(quantize.ignore, name):
            override = next((o for o in quantize.overrides if _matches_any(o.targets, name)), None)
            found[name] = _scheme(quantize, override, shapes[name][1])
    return found


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _matches_any(patterns: tuple[str, ...], name: str) -> bool:
    return any(matches(pattern, name) for pattern in patterns)


def _scheme(
    quantize: Rounding, override: Override | None, inputs: int, bits: int | None = None
) -> Scheme:
    def pick(key: str) -> Any:
        value = getattr(override, key, None)
        return getattr(quantize, key) if value is None else value

    grid = pick("grid")
    if grid is None:
        return Scheme(bits or pick("bits"), pick("group_size"), pick("sym"))
    kind = BLOCKS["q8_0" if bits == 8 else grid]
    kind = kind if inputs % kind.size == 0 else BLOCKS[INSTEAD.get(grid, grid)]
    return Scheme(kind.bits, kind.group, not kind.offset, kind.offset, kind.name)


def _resolve(
    recipe: Recipe, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, int]]
) -> Recipe:
    """The recipe with its `auto` group sizes replaced by the largest that fits every linear."""
    inputs = {columns for _, columns in shapes.values()}
    fits = [g for g in AUTO_GROUPS if all(n % g == 0 for n in inputs)]
    auto = fits[0] if fits else -1

    def settle(section: Any) -> Any:
        open_ = section.group_size == "auto" and section.grid is None
        return section.model_copy(update={"group_size": auto} if open_ else {})

    quantize = settle(recipe.quantize)
    overrides = tuple(settle(o) for o in quantize.overrides)
    quantize = quantize.model_copy(update={"overrides": overrides})
    return recipe.model_copy(update={"quantize": quantize})


def _pattern_problems(quantize: Rounding, names: Collection[str]) -> list[OptimError]:
    """Patterns that name no linear at all: most likely a slip, and it would go unnoticed."""
    given = [*quantize.targets, *(p for p in quantize.ignore if p != "lm_head")]
    given += [pattern for override in quantize.overrides for pattern in override.targets]
    fix = f"names are like {next(iter(names), '')}, expressions like re:.*down_proj"
    return [
        OptimError(f"{pattern!r} matches none of the {len(names)} linears", fix, USAGE)
        for pattern in given
        if not any(matches(pattern, name) for name in names)
    ]


def _shape_problems(
    shapes: Mapping[str, tuple[int, int]], schemes: Mapping[str, Scheme]
) -> list[OptimError]:
    """Nothing to do; or one problem a group size that does not divide, alike layers together."""
    if not schemes:
        return [OptimError("the recipe leaves every linear as it is", code=USAGE)]
    bad: dict[int, list[str]] = defaultdict(list)
    for name, scheme in schemes.items():
        if scheme.group_size > 0 and shapes[name][1] % scheme.group_size:
            bad[scheme.group_size].append(name)
    problems = []
    for width, names in bad.items():
        inputs = sorted({shapes[name][1] for name in names})
        fits = [g for g in (256, *AUTO_GROUPS) if all(shapes[n][1] % g == 0 for n in schemes)]
        fix = f"--group-size {fits[0]} divides all of them" if fits else "--group-size -1"
        fix = "GGUF has no blocks for these" if schemes[names[0]].blocks else fix
        example = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
        message = (
            f"group_size {width} does not divide the inputs ({', '.join(map(str, inputs))}) of "
            f"{len(names)} of the {len(schemes)} linears: {example}"
        )
        problems.append(OptimError(message, f"{fix}; or name them in ignore or overrides", USAGE))
    return problems


def _together(problems: list[OptimError]) -> OptimError:
    if len(problems) == 1:
        return problems[0]
    code = max(p.code for p in problems if p.code in (USAGE, MACHINE))
    lines = [f"  {p.message}" + (f"\n    fix: {p.fix}" if p.fix else "") for p in problems]
    return OptimError(f"{len(problems)} problems\n" + "\n".join(lines), code=code)
