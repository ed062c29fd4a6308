"""The table of methods: adding one is a class of the schema and a row here."""

from optim.quant.block_solver import AwqSolver, GptqSolver, NearestSolver
from optim.quant.mergequant.method import MERGEQUANT
from optim.quant.solver import Method

METHODS: dict[str, Method] = {
    "awq": Method(AwqSolver),
    "gptq": Method(GptqSolver),
    "rtn": Method(NearestSolver, reads_text=False),
    "mergequant": MERGEQUANT,
}
