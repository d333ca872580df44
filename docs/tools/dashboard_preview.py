"""Draw the workspace as W&B lays it out, from a run's own files: sections, three panels a row.

python -m docs.tools.dashboard_preview docs/h100_full --out docs/dashboard.png
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from mini_gpt_pl.command_line import one_line_errors
from mini_gpt_pl.dashboard.layout import Logged, Panel, Section, workspace_sections
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import DISTINCT, GREY, NULL, STYLE, palette, render
from mini_gpt_pl.figures.trajectory_figures import draw
from mini_gpt_pl.runs.folder import Run

_COLUMNS = 3
_WIDTH, _ROW, _HEADER = 10.5, 2.15, 0.34  # inches
_DPI = 80
_COLOURS = 128  # of the palette: the file is a third of what all of them would take
_FEW = 6  # curves that have room for a legend


def draw_preview(run: Run, wanted: Sequence[str] = ()) -> Figure:
    """Draw the workspace of one run.

    Args:
        run: Its metrics and its trajectory are drawn; the pictures as they would be at its end.
        wanted: Names of sections; all of them for none.

    Raises:
        UserError: The run has no metrics, or a section is not there.
    """
    logged = Logged.of([run])
    # The run may be older than the pictures, which follow from its trajectory.
    logged = Logged(logged.names, logged.whole, logged.groups, logged.probes | {"GeometryPictures"})
    sections = workspace_sections(logged)
    if unknown := set(wanted) - {section.name for section in sections}:
        known = ", ".join(section.name for section in sections)
        raise UserError(f"no section {', '.join(sorted(unknown))}: {run.path} fills {known}")
    shown = [section for section in sections if not wanted or section.name in wanted]
    rows = [-(-len(section.panels) // _COLUMNS) for section in shown]
    heights = [_HEADER + _ROW * count for count in rows]
    with mpl.rc_context(STYLE | {"font.family": "sans-serif", "mathtext.fontset": "dejavusans"}):
        figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained", facecolor="#f2f3f4")
        parts = figure.subfigures(len(shown), 1, squeeze=False, height_ratios=heights, hspace=0.0)[:, 0]
        for part, section, count in zip(parts, shown, rows, strict=True):
            _draw_section(part, section, count, run, logged.whole)
    return figure


def _draw_section(part: SubFigure, section: Section, rows: int, run: Run, whole: str) -> None:
    part.set_facecolor("#f2f3f4")
    title = f"▾ {section.name}   {len(section.panels)} panel{'s' if len(section.panels) > 1 else ''}"
    part.suptitle(title, x=0.008, ha="left", fontsize=10, fontweight="bold")
    grid = part.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes, panel in zip(grid, section.panels, strict=False):
        axes.set_title(fill(panel.heading, 56), fontsize=7.5, loc="left")
        if panel.kind == "images":
            _picture(axes, panel, run, whole)
        else:
            _curves(axes, panel, run)
    for axes in grid[len(section.panels) :]:
        axes.axis("off")


def _curves(axes: Axes, panel: Panel, run: Run) -> None:
    """Values in colours, nulls dotted, the level of chance as a line."""
    many = len(panel.values) > _FEW
    colours = palette(len(panel.values)) if many else DISTINCT
    for name, colour in zip(panel.values, colours, strict=False):
        _line(axes, run, name, color=colour, lw=0.9, ls="-")
    for name, colour in zip(panel.nulls, palette(len(panel.nulls)) if many else (NULL, GREY, "#7d3c98"), strict=False):
        _line(axes, run, name, color=colour, lw=1.2, ls=":")
    if panel.level is not None:
        axes.axhline(panel.level, color=NULL, lw=0.8, ls=(0, (4, 3)))
    if panel.log_y:
        axes.set_yscale("log")
    axes.tick_params(which="both", labelsize=6)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if not many:
        axes.legend(fontsize=5.5, loc="best", handlelength=1.4, labelspacing=0.2, frameon=True, framealpha=0.7)


def _line(axes: Axes, run: Run, name: str, **style: object) -> None:
    series = run.series(name)
    marker = "." if len(series) < 12 else ""
    label = name.split("/", 1)[1] if "/" in name else name
    axes.plot(series.index.to_numpy(), series.to_numpy(), label=label, marker=marker, ms=4, **style)  # type: ignore[arg-type]


def _picture(axes: Axes, panel: Panel, run: Run, whole: str) -> None:
    """The image that the run would have logged last."""
    axes.axis("off")
    try:
        figure = draw(panel.values[0].rpartition("/")[2], run.trajectory, whole)
    except UserError as reason:
        axes.text(0.5, 0.5, str(reason), ha="center", wrap=True, fontsize=6)
        return
    with Image.open(io.BytesIO(render(figure, "png"))) as image:
        axes.imshow(np.asarray(image.convert("RGB")), aspect="equal", interpolation="antialiased")


def write_preview(figure: Figure, file: Path) -> None:
    """Write a preview as a PNG of few colours.

    Args:
        figure: The preview.
        file: Its folder must be there.
    """
    buffer = io.BytesIO()
    figure.dpi = _DPI
    FigureCanvasAgg(figure).print_png(buffer)
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)


def main(args: Sequence[str] | None = None) -> None:
    """Draw the preview that a command line asks for."""
    parser = argparse.ArgumentParser(description="Draw the W&B workspace of a run from its own files.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, default=Path("dashboard.png"), help="PNG to write (default: dashboard.png)")
    parser.add_argument("--sections", nargs="+", default=[], metavar="NAME", help="only these sections")
    given = parser.parse_args(args)
    with one_line_errors():
        write_preview(draw_preview(Run(given.run), given.sections), given.out)


if __name__ == "__main__":
    main()
