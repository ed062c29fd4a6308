"""`python -m tests.conformance [FAMILY ...]`: the table of families and variants."""

import logging
import sys
import tempfile
from pathlib import Path

from .compare import difference
from .variants import CASES, config_of

LIMIT = 1e-4


def main() -> int:
    """Print a row a variant; 1 if one is further from transformers than `LIMIT`."""
    logging.disable(logging.WARNING)
    wrong = 0
    for family, variant in CASES:
        if len(sys.argv) > 1 and family not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = difference(config_of(family, variant), Path(folder))
                text, good = f"{found:.1e}", found < LIMIT
            except Exception as error:  # the table goes on
                text, good = f"{type(error).__name__}: {error}"[:160], False
        wrong += not good
        print(f"{family:12} {variant:28} {text}{'' if good else '   WRONG'}", flush=True)
    print(f"{wrong} of the rows are wrong" if wrong else "all rows agree")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
