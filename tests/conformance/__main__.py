"""`python -m tests.conformance [FAMILY ...]`: the table of families and variants."""

import logging
import sys
import tempfile
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from .compare import difference
from .variants import CASES, config_of

LIMIT = 1e-4


def main() -> int:
    """Print a row a variant; 1 if one is further from transformers than `LIMIT`."""
    logging.disable(logging.WARNING)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    wrong = 0
    rows = [row for row in CASES if len(sys.argv) == 1 or row[0] in sys.argv[1:]]
    for family, variant in rows:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = difference(config_of(family, variant), Path(folder))
                text, good = f"{found:.1e}", found < LIMIT
            except Exception as error:  # the table goes on
                text, good = f"{type(error).__name__}: {error}"[:160], False
        wrong += not good
        print(f"{family:12} {variant:28} {text}{'' if good else '   WRONG'}", flush=True)
    print(f"{wrong} of {len(rows)} rows are wrong" if wrong else f"all {len(rows)} rows agree")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
