"""Numbers with an interval on the replication's page are those of its tables over five seeds."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "replication"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_SHOWN = re.compile(rf"(?P<mean>[+−-]?{_NUMBER}) ± (?P<half>{_NUMBER})(?P<power>\)e-?\d+)?")
_SCALES = (1.0, 100.0)  # shares are fractions in the tables and per cent on the page
# Of the replayed seed 42, with a standard error.
_OTHERS = {"7 ± 6"}


def pairs() -> set[tuple[float, float]]:
    """Mean and half interval of every cell of the tables over seeds."""
    found = set()
    for file in (*FOLDER.glob("live/tables/seeds*.csv"), *FOLDER.glob("controls/tables/*.csv")):
        for row in csv.DictReader(file.open(encoding="utf-8")):
            for column, value in row.items():
                mean = column.removesuffix(" 95 %")
                if column != mean and value and row.get(mean):
                    found.add((float(row[mean]), float(value)))
                if column.endswith(" low") and value and row.get("mean" if column == "95 % low" else "excess"):
                    middle = float(row["mean" if column == "95 % low" else "excess"])
                    found.add((middle, middle - float(value)))
    return found


def as_shown(value: float, text: str) -> bool:
    """Whether a number rounds to what stands on the page."""
    plain = text.replace("−", "-").replace(",", "")
    digits = len(plain.partition(".")[2])
    return abs(value - float(plain)) <= 0.5 * 10.0**-digits * (1 + 1e-9)


SHOWN = [match for match in _SHOWN.finditer(PAGE) if match[0] not in _OTHERS]


def test_the_page_shows_many_intervals() -> None:
    assert len(SHOWN) > 50


@pytest.mark.parametrize("shown", list(dict.fromkeys(match[0] for match in SHOWN)))
def test_an_interval_on_the_page_is_in_a_table(shown: str) -> None:
    match = _SHOWN.fullmatch(shown)
    assert match is not None
    scales = (10.0 ** -int(match["power"][2:]),) if match["power"] else _SCALES
    assert any(
        as_shown(mean * scale, match["mean"]) and as_shown(half * scale, match["half"])
        for mean, half in pairs()
        for scale in scales
    )
