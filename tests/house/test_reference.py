"""The reference lists every module of the package once, and what `mini_gpt_pl.callbacks` exports."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import mini_gpt_pl.callbacks

ROOT = Path(__file__).resolve().parents[2]
PAGES = {page.stem: page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md")}
# Triton's, which are not imported where there is no Triton; and the stand-ins of packages and of `python -m`.
LEFT_OUT = {
    "mini_gpt_pl.geometry.kernels.rows",
    "mini_gpt_pl.geometry.kernels.steps",
    "mini_gpt_pl.stories.scoring_kernel",
}
_ASIDE = ("__init__", "__main__")


def test_every_module_is_in_the_reference_once() -> None:
    listed = Counter(name for text in PAGES.values() for name in re.findall(r"^::: (mini_gpt_pl\S+)", text, re.M))
    files = [file.relative_to(ROOT) for file in (ROOT / "mini_gpt_pl").rglob("*.py")]
    files += [Path("mini_gpt_pl") / file.relative_to(ROOT) for file in (ROOT / "callbacks").glob("*.py")]
    modules = {".".join(file.with_suffix("").parts) for file in files if file.stem not in _ASIDE}
    assert len(modules) > 150
    assert set(listed) == modules - LEFT_OUT
    assert [name for name, times in listed.items() if times > 1] == []


def test_what_the_callbacks_export_is_listed_there() -> None:
    table = re.findall(r"^\| \[`(\w+)`\]\(([\w.]*)#(\S+)\)", PAGES["callbacks"], re.M)
    assert [name for name, _, _ in table] == mini_gpt_pl.callbacks.__all__
    for name, page, target in table:
        exported = getattr(mini_gpt_pl.callbacks, name)
        assert target == f"{exported.__module__}.{name}"
        assert f"::: {exported.__module__}\n" in PAGES[page.removesuffix(".md") or "callbacks"] + "\n"
