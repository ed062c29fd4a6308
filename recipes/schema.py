"""The recipe: what to do, as strict, frozen data.

A recipe has one section a command and no code. Adding a method is a class here and its row in
`METHODS` and `Quantize`; adding a section is a class and a field of `Recipe`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from optim.recipes.patterns import Pattern

VERSION = 1

Bits = Literal[2, 3, 4, 8]
# "auto" is the largest of 128, 64, 32 and 16 that divides every input; -1 is one group per row.
GroupSize = Literal["auto", -1, 16, 32, 64, 128, 256]
# Files give lists; a frozen recipe holds tuples.
Patterns = Annotated[tuple[Pattern, ...], Field(strict=False)]


class Section(BaseModel):
    """What every part of a recipe is: frozen, with no key it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Calibration(Section):
    """The text that is run through the model: `builtin:NAME`, `self`, a path or a hub id."""

    dataset: str = Field(default="builtin:mixed", min_length=1)
    split: str | None = None
    text_column: str = "text"
    num_samples: int = Field(default=64, ge=1, le=1_000_000)
    seq_len: int = Field(default=512, ge=16, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**63)


class Override(Section):
    """Another format for the linears that `targets` names; what it leaves out is the section's."""

    targets: Patterns = Field(min_length=1)
    bits: Bits | None = None
    group_size: GroupSize | None = None
    sym: bool | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Override":
        if self.bits is None and self.group_size is None and self.sym is None:
            raise ValueError("an override must give bits, group_size or sym")
        return self


class Rounding(Section):
    """What every weight-only method has: the grid, and which linears get it."""

    method: str
    bits: Bits = 4
    group_size: GroupSize = "auto"
    sym: bool = False
    targets: Patterns = Field(default=("Linear",), min_length=1)
    ignore: Patterns = ("lm_head",)
    lm_head_bits: Literal[8] | None = None
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = ()


class Rtn(Rounding):
    """Plain rounding to the nearest: the baseline."""

    method: Literal["rtn"]


class Gptq(Rounding):
    """Error feedback over the columns (Frantar et al. 2022)."""

    method: Literal["gptq"]
    damping: float = Field(default=0.01, gt=0, lt=1)


class Awq(Rounding):
    """Activation-aware scales and clipping (Lin et al. 2023), then GPTQ's error feedback."""

    method: Literal["awq"]
    n_grid: int = Field(default=20, ge=1, le=1000)
    duo: Literal["both", True, False] = "both"
    clip: bool = True
    compensate: bool = True
    damping: float = Field(default=0.01, gt=0, lt=1)


METHODS: dict[str, type[Rounding]] = {"awq": Awq, "rtn": Rtn, "gptq": Gptq}
Quantize = Annotated[Awq | Rtn | Gptq, Field(discriminator="method")]


class Recipe(Section):
    """The whole recipe, checked."""

    version: Literal[1]
    model: str | None = Field(default=None, min_length=1)
    output: str | None = Field(default=None, min_length=1)
    calibration: Calibration = Calibration()
    quantize: Quantize


def keys_of(path: tuple[str | int, ...], method: str | None) -> list[str]:
    """The keys allowed under `path`; `method` is the quantize section's, if it is a known one."""
    section: type[Section] = Recipe
    if path[:1] == ("calibration",):
        section = Calibration
    elif path[:2] == ("quantize", "overrides"):
        section = Override
    elif path[:1] == ("quantize",):
        section = METHODS.get(method or "", Rounding)
    return list(section.model_fields)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors."""
    return Recipe.model_json_schema()
