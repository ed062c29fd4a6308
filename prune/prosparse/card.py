"""The model card of a ProSparse checkpoint: what it is, what it cost, how to make it again."""

from collections.abc import Sequence
from typing import Any

from optim.prune.pruner import Plan
from optim.recipes.build import to_yaml


def card(made: Plan, held_back: dict[str, Any], pictures: Sequence[str]) -> str:
    """The text of README.md; `pictures` are files beside it."""
    source = made.checkpoint.source
    recipe = to_yaml(made.recipe.model_copy(update={"output": None})).strip()
    shown = "\n".join(f"![{name}]({name})\n" for name in pictures)
    return f"""---
base_model: {source}
library_name: transformers
tags: [optim, sparsity, prosparse, relu]
---

# {made.output.name}

{made.checkpoint.name} with ReLU for its activation, trained by `optim prune -m prosparse` so that
{100 * held_back["sparsity"]:.1f} % of the products gate * up are exact zeros.

| on held-back text | this model | {made.checkpoint.name} |
|---|---:|---:|
| perplexity | {held_back["perplexity"]:.3f} | {held_back["base_perplexity"]:.3f} |
| ratio | {held_back["ppl_ratio"]:.3f} | 1 |
| zeros in gate * up | {100 * held_back["sparsity"]:.1f} % | 0 % |

Measured on {held_back["text"]}, {held_back["windows"]} windows of {held_back["window"]} tokens.
{_threshold_note(made)}
{shown}
## Run it

    optim run {made.output.name}

A plain checkpoint: transformers loads the folder as it is. `training.jsonl` has every step.

## Make it again

`optim prune --recipe recipe.yaml` with:

```yaml
{recipe}
```
"""


def _threshold_note(made: Plan) -> str:
    threshold = getattr(made.recipe.prune, "threshold", 0.0)
    if not threshold:
        return ""
    return (
        f"\nMeasured with the activation's threshold at {threshold:g} (`hidden_act_param`), which\n"
        "`optim run` applies; transformers runs plain ReLU, with somewhat fewer zeros.\n"
    )
