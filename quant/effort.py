"""How many products a run multiplies and adds: what its time is estimated from before any work.

Products of matrices are counted, nothing else: for a model of some size they are nearly all of it.
"""

from collections.abc import Mapping

from optim.quant.solver import Method
from optim.recipes.schema import Awq, Guided, Recipe

WALKS = 3  # of the text through each block: as it was, to see its inputs, and compressed
BACKWARDS = 3  # forwards once and backwards at twice the price, where the end loss guides
NEAR = 4  # points that the search for scales tries around the best of every fourth one


def products(
    method: Method, recipe: Recipe, shapes: Mapping[str, tuple[int, int]], active: float = 1.0
) -> int:
    """Multiplications of solving linears of `shapes` `(out, in)` with the recipe's text.

    `active` is the share of the experts that a token runs through.
    """
    if not method.reads_text:
        return 0
    section, calibration = recipe.quantize, recipe.calibration
    tokens = calibration.num_samples * calibration.seq_len
    guided = isinstance(section, Guided) and section.guides
    each, total = WALKS + BACKWARDS * guided, 0.0
    grams: set[tuple[str, int]] = set()
    for name, (out, columns) in shapes.items():
        seen = tokens * (active if ".experts." in name else 1)
        total += each * seen * out * columns
        total += (_tries(recipe) + 1) * out * columns**2
        own = name if guided else name.rpartition(".")[0]
        if (own, columns) not in grams:
            grams.add((own, columns))
            total += seen * columns**2 + columns**3 / 3  # its Gram matrix, and that one's factor
    return round(total)


def _tries(recipe: Recipe) -> int:
    """Outputs that are computed from a Gram matrix to compare scales."""
    section = recipe.quantize
    if not isinstance(section, Awq):
        return 0
    return (section.n_grid // 4 + 1 + NEAR) * (2 if section.duo == "both" else 1)
