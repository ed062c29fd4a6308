"""The model card of a ProSparse checkpoint: what it is, what it cost, how to make it again."""

from collections.abc import Sequence
from typing import Any

from optim.prune.pruner import Plan
from optim.recipes.build import to_yaml
from optim.runtime.storage.card import Card, card_of


def card(made: Plan, held_back: dict[str, Any], pictures: Sequence[str]) -> str:
    """The text of README.md; `pictures` are files beside it."""
    shown = "".join(f"\n![{name}]({name})\n" for name in pictures)
    about = f"""{made.checkpoint.name} with ReLU for its activation, trained by
`optim prune -m prosparse` so that {100 * held_back["sparsity"]:.1f} %
of the products gate * up are exact zeros.

| on held-back text | this model | {made.checkpoint.name} |
|---|---:|---:|
| perplexity | {held_back["perplexity"]:.3f} | {held_back["base_perplexity"]:.3f} |
| ratio | {held_back["ppl_ratio"]:.3f} | 1 |
| zeros in gate * up | {100 * held_back["sparsity"]:.1f} % | 0 % |

Measured on {held_back["text"]}, {held_back["windows"]} windows of {held_back["window"]} tokens.
{_threshold_note(made)}{shown}""".rstrip()
    recipe = to_yaml(made.recipe.model_copy(update={"output": None}))
    remark, again = "`training.jsonl` has every step.", "optim prune --recipe recipe.yaml"
    tags = ("optim", "sparsity", "prosparse", "relu")
    programs = ("optim", "transformers")
    made_card = Card(made.output.name, about, tags, programs, remark, again, recipe)
    return card_of(made_card, made.checkpoint)


def _threshold_note(made: Plan) -> str:
    threshold = getattr(made.recipe.prune, "threshold", 0.0)
    if not threshold:
        return ""
    return (
        f"\nMeasured with the activation's threshold at {threshold:g} (`hidden_act_param`), which\n"
        "`optim run` applies; transformers runs plain ReLU, with somewhat fewer zeros.\n"
    )
