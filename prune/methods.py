"""The table of methods: adding one is a class of the schema and a row here."""

from optim.prune.coreinfer import COREINFER
from optim.prune.pruner import Pruner
from optim.prune.relu_exact import RELU_EXACT
from optim.prune.thresholds import THRESHOLD

METHODS: dict[str, Pruner] = {
    "threshold": THRESHOLD,
    "coreinfer": COREINFER,
    "relu-exact": RELU_EXACT,
    "prosparse": Pruner(lambda section: section.method, None),
}
