"""What the sections of a recipe are made of."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from optim.recipes.patterns import check_pattern

Pattern = Annotated[str, AfterValidator(check_pattern)]
# Files give lists; a frozen recipe holds tuples.
Patterns = Annotated[tuple[Pattern, ...], Field(strict=False)]


@dataclass(frozen=True, slots=True)
class Spelled:
    """How a key is typed on the command line; without one it is `--` and the key's name.

    With no names at all the key has no flag of its own: `--set SECTION.KEY=VALUE` gives it.
    """

    names: tuple[str, ...]


SET_ONLY = Spelled(())


class Section(BaseModel):
    """What every part of a recipe is: frozen, with no key it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
