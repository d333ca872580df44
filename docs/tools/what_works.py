"""Write docs/what-works.md: every combination that the tests try, with its verdict.

    python -m docs.tools.what_works

Each is trained and compared first; one that differs ends the command, and no page is written.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Try every combination and write the page."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "callbacks" / "zoo")]
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    from combinations import COMBINATIONS, WAYS, compare, compare_way, page

    for number, combination in enumerate(COMBINATIONS, start=1):
        print(f"{number}/{len(COMBINATIONS)} {combination.module}: {combination.optimizer}", flush=True)
        compare(combination)
    for name in WAYS:
        print(name, flush=True)
        compare_way(name)
    (ROOT / "docs" / "what-works.md").write_text(page())


if __name__ == "__main__":
    main()
