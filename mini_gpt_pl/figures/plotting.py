"""What all figures share: style, colours, how they are written, and the marks that they have in common."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from mini_gpt_pl.atomic import write_bytes

WIDTH = 6.5
"""Inches: the text width of a page."""
BACKBONE, RESIDUAL, PROBE, PC2, SWITCH = "#1f5fa8", "#c0392b", "#7f8c8d", "#2e8b57", "#d68910"
GREY, NULL, CHANGE = "#b0b7bd", "#222222", "#c9ced2"
DISTINCT = (BACKBONE, RESIDUAL, PC2, SWITCH, "#7d3c98", "#16a5c4", "#8c564b", "#e36bb5", "#a3a91d", "#5d6d7e")
"""Colours of things without an order, such as runs."""
STYLE: Any = {
    "font.family": "serif",
    "mathtext.fontset": "dejavuserif",
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    # The same data give the same files.
    "svg.hashsalt": "mini_gpt_pl",
}
_DPI = 150
# Beyond this ratio of the largest to the middle curve, the others would lie on the axis.
_DWARFED = 15.0


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write a figure as NAME.FORMAT into a folder, which is made if need be, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.{kind}" for kind in formats]
    for file in files:
        write_bytes(file, render(figure, file.suffix[1:]))
    return files


def lay_out(figure: Figure) -> None:
    """Lay a figure out once for all of the files that it is written to."""
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")


def render(figure: Figure, kind: str) -> bytes:
    """Return a figure's png, pdf or svg; without the time of day, so that the same figure is the same file.

    The canvas is asked directly: `Figure.savefig` draws everything twice, the first time for a layout that is there.
    """
    buffer, known = io.BytesIO(), figure.dpi
    figure.dpi = _DPI  # of images inside vector graphics too
    with mpl.rc_context(STYLE):
        if kind == "png":
            FigureCanvasAgg(figure).print_png(buffer)
        elif kind == "pdf":
            FigureCanvasPdf(figure).print_pdf(buffer, metadata={"CreationDate": None})
        else:
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    figure.dpi = known
    return buffer.getvalue()


def line(axes: Axes, series: pd.Series[float], label: str, colour: str, **style: object) -> None:
    """Draw a metric against its steps; nothing if it was never logged."""
    if len(series):
        axes.plot(series.index.to_numpy(), series.to_numpy(), label=label, color=colour, **style)  # type: ignore[arg-type]


def dots(axes: Axes, x: Sequence[float], y: Sequence[float], spread: Sequence[float], **style: Any) -> None:
    """Draw points with error bars of half length `spread`, NaN for none; on a log axis a bar never reaches zero."""
    values, bars = np.asarray(y, dtype=float), np.nan_to_num(np.asarray(spread, dtype=float))
    below = np.minimum(bars, 0.9 * np.abs(values)) if axes.get_yscale() == "log" else bars
    axes.errorbar(x, values, yerr=np.stack([below, bars]), **{"ms": 4, "lw": 1, "elinewidth": 0.8, **style})


def legend_below(axes: Axes, columns: int = 2, *, drop: float = 34.0) -> None:
    """Put a legend under the axis labels, where it hides no curve: `drop` points below the axes."""
    figure = axes.get_figure(root=True)
    if figure is None or not axes.get_legend_handles_labels()[1]:
        return
    below = axes.transAxes + ScaledTranslation(0, -drop / 72, figure.dpi_scale_trans)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=below,
        ncols=columns,
        borderaxespad=0.0,
        columnspacing=1.2,
        handlelength=1.8,
    )


class Change(NamedTuple):
    """The step from which a run trains for something else, and what changes; an empty label is not drawn."""

    step: int
    label: str


def mark_change(change: Change | None, *all_axes: Axes) -> None:
    """Draw the step where the objective changes as a dashed vertical line, labelled on the first axes."""
    if change is None or not change.label:
        return
    for axes in all_axes:
        axes.axvline(change.step, color=CHANGE, ls="--", lw=1, zorder=0)
    all_axes[0].annotate(
        change.label,
        (change.step, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-3, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=7,
        color=PROBE,
        bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.6},
    )


def plain_log_steps(axes: Axes, steps: Sequence[int]) -> None:
    """Make the step axis logarithmic with a few whole numbers on it, which also works for less than a decade."""
    first, last = max(1, steps[0]), steps[-1]
    wanted = [m * 10**k for k in range(9) for m in ((1, 2, 5) if last < 30 * first else (1, 3))]
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    shown = [step for step in wanted if first <= step <= last]
    axes.set_xticks(shown, [f"{step:,}" for step in shown])


def log_if_dwarfed(axes: Axes) -> bool:
    """Make the value axis logarithmic where one curve dwarfs the others, and return whether one does."""
    curves = [y for part in axes.lines if (y := np.asarray(part.get_ydata(), dtype=float)).size > 1]
    tops = [float(np.nanmax(np.abs(y))) for y in curves if np.isfinite(y).any()]
    if len(tops) < 2 or max(tops) <= _DWARFED * float(np.median(tops)):
        return False
    if all(np.nanmin(y) > 0 for y in curves if np.isfinite(y).any()):
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=float(np.median(tops)) / 10)
    return True


def palette(count: int) -> list[Any]:
    """Return colours of the viridis map, without its near-white end."""
    return [mpl.colormaps["viridis"](x) for x in np.linspace(0.0, 0.88, max(count, 1))]
