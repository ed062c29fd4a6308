"""The section `tune`: what is trained after rounding, in the format that rounding has made."""

from typing import Annotated, Literal

from pydantic import Field

from optim.recipes.section import SET_ONLY, Section, Spelled


class Tune(Section):
    """Scales and norms trained until the output is the original's again, as far as it goes."""

    loss: Annotated[Literal["end"], Spelled(("--tune",))] = Field(
        default="end",
        description="train scales and norms after rounding, towards the original's output (end)",
    )
    epochs: Annotated[int, SET_ONLY] = Field(
        default=3, ge=1, le=10_000, description="passes over the text"
    )
    lr: Annotated[float, SET_ONLY] = Field(
        default=1e-3, gt=0, le=1, description="highest learning rate, relative to a scale"
    )
