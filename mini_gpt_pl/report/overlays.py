"""Several runs in one figure: a look for each, and curves laid over one another with their nulls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import DISTINCT, NULL, WIDTH, log_if_dwarfed
from mini_gpt_pl.figures.trajectory_figures import growing
from mini_gpt_pl.geometry.path import growth, pca
from mini_gpt_pl.report.families import from_scratch, names
from mini_gpt_pl.report.figures import cos_theta0
from mini_gpt_pl.report.settings import diverged, progress
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run

STYLES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))
"""Of lines that share a colour."""
_LINE = 105  # characters of a legend that fit in one line
LINE_HEIGHT = 0.17
"""Of a legend, in inches."""


class Curve(NamedTuple):
    """One quantity along a run: where it was measured, its values, and those of the decaying walk if a walk has any."""

    steps: Sequence[int]
    values: Sequence[float]
    null: Sequence[float] | None = None


@dataclass(frozen=True)
class Quantity:
    """What a panel draws of every run.

    Args:
        title: Of the panel.
        measure: Reads it from a run; a UserError where a run never moved.
        unbounded: Whether one run may dwarf the others.
    """

    title: str
    measure: Callable[[Run], Curve]
    unbounded: bool = False


def metric(name: str) -> Callable[[Run], Curve]:
    """Read a logged metric from a run."""

    def read(run: Run) -> Curve:
        series = run.series(name)
        return Curve(series.index.tolist(), series.tolist())

    return read


def _of_path(read: Callable[[pca.Gram], Sequence[float]]) -> Callable[[Run], Curve]:
    """Numbers of a path at every snapshot but the first."""

    def measure(run: Run) -> Curve:
        paths = Subject.of(run).paths()
        return Curve(run.trajectory.steps[1:], read(paths.measured), read(paths.decaying))

    return measure


def _pc1(gram: pca.Gram) -> float:
    return 100 * pca.pca(gram, pca.drifts(len(gram))[1:]).pc1


def _split(gram: pca.Gram) -> pca.Decomposition:
    return growth.split_drift(gram, normalise=False)


CURVES: Mapping[str, Quantity] = {
    "a": Quantity("$a(t)=\\langle x(t),v_b\\rangle$", _of_path(lambda h: _split(h).coordinate.tolist()), True),
    "r": Quantity("$||r(t)||$", _of_path(lambda h: _split(h).residual_norm.tolist()), True),
    "fraction": Quantity("fraction $a^2/||x||^2$", _of_path(lambda h: _split(h).fraction.tolist())),
    "cos": Quantity("cos$(v_b,\\theta_0)$, $v_b$ of the past", _of_path(lambda h: growing(h, cos_theta0))),
    "pc1": Quantity("PC1 up to the step, %", _of_path(lambda h: growing(h, _pc1))),
}
"""Quantities of the path, each with its null."""


class Look(NamedTuple):
    """How a run is drawn in a figure of several: its name in the legend, and the colour, style and width of its lines.

    Nulls are dotted. The first lines are the broadest, so that curves that coincide are all seen.
    """

    run: Run
    name: str
    colour: Any
    style: Any = "-"
    width: float = 1.2

    @property
    def legend(self) -> str:
        """The name, and where the run diverged if it did: such a run is clipped."""
        return f"{self.name} (diverged at step {progress(self.run)[0]:,}: clipped)" if self.diverged else self.name

    @property
    def diverged(self) -> bool:
        """Whether limits must not be those of this run."""
        return diverged(self.run)


def looks_of(runs: Sequence[Run], called: Sequence[str]) -> list[Look]:
    """Give runs distinct colours, and other lines where there are more runs than colours."""
    count, last = len(DISTINCT), max(1, len(runs) - 1)
    return [
        Look(run, name, DISTINCT[k % count], STYLES[k // count % len(STYLES)], 1.9 - 0.8 * k / last)
        for k, (run, name) in enumerate(zip(runs, called, strict=True))
    ]


def named(chosen: Sequence[Run], runs: Sequence[Run]) -> list[Look]:
    """Looks of some of the runs of a report, by the names that they have there."""
    called = names(runs)
    return looks_of(chosen, [called[run] for run in chosen])


def draw(axes: Axes, looks: Sequence[Look], quantity: Quantity) -> None:
    """Draw one quantity of every run that has it, its null dotted in the same colour.

    Limits are those of the runs that did not diverge, if there are any.
    """
    limits = None
    for clipped in (False, True):
        for look in (look for look in looks if look.diverged is clipped):
            try:
                curve = quantity.measure(look.run)
            except UserError:
                continue  # a run that never moved
            axes.plot(curve.steps, curve.values, color=look.colour, ls=look.style, lw=look.width)
            if curve.null is not None:
                axes.plot(curve.steps, curve.null, ":", color=look.colour, lw=0.9)
        if not clipped:
            if quantity.unbounded:
                log_if_dwarfed(axes)
            limits = (axes.get_xlim(), axes.get_ylim()) if axes.lines else None
    if limits is not None:
        axes.set(xlim=limits[0], ylim=limits[1])
    axes.set_title(quantity.title, fontsize=9)


def panels(looks: Sequence[Look], shown: Sequence[Quantity]) -> Figure:
    """Draw four quantities in two rows of panels, against the step."""
    figure = Figure(figsize=(WIDTH, 4.6 + legend_rows(looks) * LINE_HEIGHT))
    grid = figure.subplots(2, 2, sharex=True)
    for axes, quantity in zip(grid.flat, shown, strict=True):
        draw(axes, looks, quantity)
    for axes in grid[1]:
        axes.set_xlabel("step")
    legend(figure, looks)
    return figure


def legend(figure: Figure, looks: Sequence[Look]) -> None:
    """Name all runs, and what the dotted lines are, under a figure."""
    handles = [Line2D([], [], color=look.colour, ls=look.style, lw=look.width, label=look.legend) for look in looks]
    handles.append(Line2D([], [], color=NULL, ls=":", lw=1.0, label="decaying walk of each"))
    figure.legend(handles=handles, loc="outside lower center", ncols=_columns(looks), columnspacing=1.2)


def _columns(looks: Sequence[Look]) -> int:
    longest = max((len(look.legend) for look in looks), default=0)
    return max(1, min(4, len(looks) + 1, _LINE // (longest + 8)))


def legend_rows(looks: Sequence[Look]) -> int:
    """Lines that the legend takes: what a figure must be higher by."""
    return math.ceil((len(looks) + 1) / _columns(looks))


def several(runs: Sequence[Run]) -> Sequence[Run]:
    """Return the runs from scratch.

    Raises:
        UserError: There are fewer than two.
    """
    chosen = from_scratch(runs)
    if len(chosen) < 2:
        raise UserError("fewer than two of the runs are from scratch: there is nothing to lay over one another")
    return chosen


def overview(runs: Sequence[Run]) -> Figure:
    """Backbone coordinate, residual, fraction and first share of all runs from scratch."""
    return panels(named(several(runs), runs), [CURVES[name] for name in ("a", "r", "fraction", "pc1")])
