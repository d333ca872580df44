"""The package as it is installed, as a folder of links, for tools that read files instead of importing them.

In the repository `callbacks/` and `configs/` lie beside `mini_gpt_pl/`; an installed package has them inside. The type
checker, the checker of imports and the documentation read `build/house/mini_gpt_pl`, where they are inside too.

    python docs/tools/house.py
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOUSE = ROOT / "build" / "house"
BESIDE = ("callbacks", "configs")


def build() -> Path:
    """Make the folder, or bring it up to date, and return it."""
    package = HOUSE / "mini_gpt_pl"
    package.mkdir(parents=True, exist_ok=True)
    targets = {path.name: path for path in (ROOT / "mini_gpt_pl").iterdir() if path.name != "__pycache__"}
    targets |= {name: ROOT / name for name in BESIDE}
    for link in package.iterdir():
        if link.name not in targets:
            link.unlink()
    for name, target in targets.items():
        link = package / name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(target, package))
    return HOUSE


if __name__ == "__main__":
    print(build())
