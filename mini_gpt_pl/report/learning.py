"""What a run logged under its own names: curves, a table and sentences."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import DISTINCT, WIDTH, line
from mini_gpt_pl.metrics.registry import find
from mini_gpt_pl.report.sheet import Row, Table, number, tabulate, word
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import METRICS, Run

_OF_PROBES = "mini_gpt_pl.callbacks."
_COUNTERS = ("epoch", "step")  # Lightning logs them beside everything
_MOST_PANELS, _MOST_SENTENCES = 8, 4
_SIDES = re.compile(r"(?:^|[/_.-])(train|training|val|valid|validation|test|eval)(?:ing)?(?=$|[/_.-])")
_OF_STEP = re.compile(r"_(step|epoch)$")


def own_metrics(run: Run) -> list[str]:
    """Names of what the run's own code logged: everything that no probe of this package logs."""
    if not (run.path / METRICS).is_file():
        return []
    logged = [name for name in map(str, run.metrics.columns) if name not in _COUNTERS and len(run.series(name))]
    numbers = [name for name in logged if pd.api.types.is_numeric_dtype(run.metrics[name])]
    return [name for name in numbers if (entry := find(name)) is None or not entry.source.startswith(_OF_PROBES)]


def panels(names: list[str]) -> dict[str, list[str]]:
    """Put metrics into one panel that are of one quantity, such as `train/loss` and `val_loss`."""
    shared: dict[str, list[str]] = {}
    for name in names:
        quantity = _SIDES.sub("", _OF_STEP.sub("", name)).strip("/_.-") or name
        shared.setdefault(quantity, []).append(name)
    return shared


def learning_curves(run: Run) -> Figure:
    """Draw what the run logged under its own names against the optimizer step, a panel for each quantity.

    Raises:
        UserError: It logged nothing of its own.
    """
    shown = list(panels(own_metrics(run)).items())[:_MOST_PANELS]
    if not shown:
        raise UserError(f"the run {run.path} logged nothing of its own")
    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(WIDTH, 0.6 + 2.6 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in list(grid.flat)[len(shown) :]:
        axes.remove()
    for axes, (quantity, names) in zip(grid.flat, shown, strict=False):
        for name, colour in zip(names, DISTINCT * (1 + len(names) // len(DISTINCT)), strict=False):
            series = run.series(name)
            few = len(series) <= 50
            line(axes, series, name, colour, lw=1.2 if few else 0.8, **({"marker": "o", "ms": 3} if few else {}))
        axes.set(xlabel="step", title=quantity)
        axes.legend()
    return figure


@dataclass(frozen=True)
class Course:
    """How one metric went: its name as it was logged, and its values by step."""

    name: str
    series: pd.Series[float]

    @property
    def lowest(self) -> int:
        """Step of the lowest value."""
        return int(self.series.index[int(self.series.argmin())])

    @property
    def highest(self) -> int:
        """Step of the highest value."""
        return int(self.series.index[int(self.series.argmax())])

    @property
    def sentence(self) -> str:
        """The course in one sentence."""
        first, last = float(self.series.iloc[0]), float(self.series.iloc[-1])
        low, high = self.series[self.lowest], self.series[self.highest]
        if len(self.series) == 1:
            return f"{self.name} was measured once: {last:.4g} at step {int(self.series.index[0]):,}."
        if low == high:
            return f"{self.name} stayed at {last:.4g}."
        went = "fell" if last < first else "rose" if last > first else "came back"
        best, step, which = (low, self.lowest, "lowest") if last < first else (high, self.highest, "highest")
        end = "" if step == self.series.index[-1] else f"; its {which} was {best:.4g} at step {step:,}"
        return f"{self.name} {went} from {first:.4g} to {last:.4g}{end}."


def courses(run: Run) -> list[Course]:
    """How each metric that the run logged under its own name went."""
    return [Course(name, run.series(name).groupby(level=0).last()) for name in own_metrics(run)]


def learned(subject: Subject) -> tuple[str, ...]:
    """Say how the first few of the run's own metrics went, losses before others and validation before training."""

    def order(course: Course) -> tuple[bool, bool]:
        return "loss" not in course.name, _SIDES.search(course.name) is None or "train" in course.name

    return tuple(course.sentence for course in sorted(courses(subject), key=order)[:_MOST_SENTENCES])


def learning_table(subject: Subject) -> list[Table]:
    """What the run logged under its own names: first, lowest, highest and last value, and a sentence of each."""
    rows: list[Row] = [
        {
            "metric": word(course.name),
            "first": number(float(course.series.iloc[0]), "{:.4g}"),
            "lowest": number(float(course.series.min()), "{:.4g}"),
            "at step": number(course.lowest, "{:,.0f}"),
            "highest": number(float(course.series.max()), "{:.4g}"),
            "at step ": number(course.highest, "{:,.0f}"),
            "last": number(float(course.series.iloc[-1]), "{:.4g}"),
            "in words": word(course.sentence),
        }
        for course in courses(subject)
    ]
    return [tabulate("learning", "What the run logged under its own names", rows)] if rows else []
