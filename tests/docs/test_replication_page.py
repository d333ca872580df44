"""Numbers on the replication's page are those of its tables and of the kept runs."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pytest

from mini_gpt_pl.geometry.path.nulls import calibrate
from mini_gpt_pl.report.statistics import t_interval
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run, runs_below
from mini_gpt_pl.stories.study.optimizers import window_of

FOLDER = Path(__file__).parents[2] / "docs" / "replication"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_SHOWN = re.compile(rf"(?P<mean>[+−-]?{_NUMBER}) ± (?P<half>{_NUMBER})(?P<power>\)e-?\d+)?")
_SCALES = (1.0, 100.0)  # shares are fractions in the tables and per cent on the page
# Of the replayed seed 42, with a standard error.
_OTHERS = {"7 ± 6"}


def oscillation(run: Run) -> dict[str, float]:
    """What section 2.3 says of p_ood and of the loss, measured on one run."""
    p_ood, loss = run.series("probe/p_ood"), run.series("val/loss")
    middle, changes = p_ood.loc[1800:6600], p_ood.diff().dropna()
    return {
        "lowest": middle.min(),
        "highest": middle.max(),
        "changes, early": changes.loc[:7000].std(),
        "changes, late": changes.loc[7001:].std(),
        "rises of the loss": float((loss.loc[: loss.idxmin()].diff() > 0).sum()),
    }


def pairs() -> set[tuple[float, float]]:
    """Mean and half interval of every cell of the tables over seeds, and of the oscillation."""
    seeds = [oscillation(Run(path)) for path in runs_below(FOLDER / "runs" / "live")]
    found = {t_interval([one[name] for one in seeds]) for name in seeds[0]}
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


_CELLS = re.compile(r"^\| `(?P<run>(?:beta2|optimizers)\w*/[\w.-]+)` \|(?P<cells>.*)\|$", re.MULTILINE)
OPTIMIZERS = {match["run"]: [cell.strip() for cell in match["cells"].split("|")[1:]] for match in _CELLS.finditer(PAGE)}


def test_the_page_shows_the_optimizers_that_learn() -> None:
    kept = {
        path.relative_to(FOLDER / "runs").as_posix() for path in runs_below(FOLDER / "runs" / "optimizers_learning")
    }
    assert kept < set(OPTIMIZERS) and len(OPTIMIZERS) == 8


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_numbers_of_an_optimizer_are_those_of_its_kept_run(name: str) -> None:
    subject = Subject.of(Run(FOLDER / "runs" / name))
    path = subject.trajectory
    whole, window = calibrate(path.gram(), path.survival), window_of(path, 600, 2000)
    assert window is not None
    numbers = [subject.series("val/loss").min(), subject.series("probe/p_ood").max()]
    for one in (whole["pc1"], whole["pc1_unit"], window.numbers["pc1"]):
        numbers += [100 * one.value, 100 * one.decay, 100 * one.excess]
    numbers.append(whole["cos_theta0"].value)
    for number, shown in zip(numbers, OPTIMIZERS[name], strict=True):
        assert as_shown(number, shown), (number, shown)


def test_the_rate_of_sgd_is_the_best_of_those_that_were_tried() -> None:
    losses = {path.name: Run(path).series("val/loss").iloc[-1] for path in runs_below(FOLDER / "runs" / "sgd_rates")}
    assert min(losses, key=losses.__getitem__) == "momentum_1.0"
    assert {f"{loss:.2f}" for loss in losses.values()} == {"6.09", "6.32", "6.49", "8.55"}
    assert "(6.09; 6.32 and 6.49 for 0.3 and 0.1, 8.55 for 3)" in PAGE


def test_the_error_of_an_evaluation_is_that_of_its_answers() -> None:
    shown = re.search(r"error of one evaluation: (\S+) at most", PAGE)
    assert shown is not None and as_shown(math.sqrt(0.25 / 2000), shown[1])
