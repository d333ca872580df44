"""Draw, tabulate and lay out: from run folders to the text of one self-contained HTML page."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import STYLE, lay_out, render, save
from mini_gpt_pl.report.comparison import require_comparable, subjects_of
from mini_gpt_pl.report.contents import MORE, Plate, Section, Shown, claimed, contents_of
from mini_gpt_pl.report.headline import Headline, headline
from mini_gpt_pl.report.progress import Steps
from mini_gpt_pl.report.sheet import NULLS, Table, write_tables
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run, require_reportable

# Vector graphics stay sharp, but one with thousands of points would be most of the page.
_LARGEST_SVG = 110_000
_PIXELS_PER_INCH = 96
_EMPHASIS = re.compile(r"\*\*(.+?)\*\*")


@dataclass(frozen=True)
class Picture:
    """A figure as the page holds it.

    Args:
        anchor: Unique on the page.
        caption: What is seen.
        source: The image itself, as a `data:` address.
        width: In CSS pixels.
        height: In CSS pixels.
    """

    anchor: str
    caption: str
    source: str
    width: int
    height: int


@dataclass(frozen=True)
class Part:
    """A section of the page."""

    anchor: str
    title: str
    sentence: str
    figures: tuple[Picture, ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Entry:
    """One of several runs on the page."""

    anchor: str
    label: str
    headline: Headline
    figures: tuple[Picture, ...]


def assemble(runs: Sequence[Run], folder: Path, page: Mapping[str, Any], steps: Steps) -> str:
    """Write figures and tables into a folder and return the text of the page that holds them.

    Args:
        runs: One run, or several that belong together.
        folder: Gets `figures/` and `tables/`.
        page: Values of the template that do not come from the runs' data: title and commands.
        steps: Told of every step.

    Raises:
        UserError: A run cannot be reported on, or runs do not belong together.
        OSError: The folder cannot be written to.
    """
    for run in runs:
        require_reportable(run)
    if len(runs) == 1:
        steps.expect(2 + sum(len(section.plates) for section in contents_of(runs).of_run))
        content = _of_one(Subject.of(runs[0]), folder, steps)
    else:
        require_comparable(runs)
        steps.expect(1 + len(runs) + sum(len(section.plates) for section in contents_of(runs).of_runs))
        content = _of_several(subjects_of(runs), folder, steps)
    return _template().render(**page, **content, nulls=NULLS, style=_asset("page.css"))


def _of_one(run: Subject, folder: Path, steps: Steps) -> dict[str, Any]:
    steps.begin("headline")
    single = headline(run)
    steps.begin("tables")
    contents = contents_of([run])
    tables = contents.run_tables(run)
    write_tables(tables, folder / "tables")
    return {
        "single": single,
        "findings": [],
        "sections": _parts(contents.of_run, run, tables, folder, steps),
        "entries": [],
    }


def _of_several(runs: Sequence[Subject], folder: Path, steps: Steps) -> dict[str, Any]:
    steps.begin("tables")
    contents = contents_of(runs)
    tables = contents.comparison(runs)
    write_tables(tables, folder / "tables")
    parts = _parts(contents.of_runs, runs, tables, folder, steps)
    entries = []
    for number, run in enumerate(runs, 1):
        label = run.label
        steps.begin(f"run {label}")
        anchor = f"run-{number}"
        plate = replace(contents.entry, caption=f"{label}: {contents.entry.caption}")
        drawn = _draw(plate, run, folder, f"{anchor}-{plate.name}")
        entries.append(Entry(anchor, label, headline(run), (drawn,) if drawn else ()))
    return {"single": None, "findings": contents.findings(runs), "sections": parts, "entries": entries}


def _parts(
    sections: Sequence[Section[Shown]], subject: Shown, tables: Sequence[Table], folder: Path, steps: Steps
) -> list[Part]:
    """Make every section that has a figure or a table."""
    by_name = {table.name: table for table in tables}
    shared = claimed(sections, list(by_name))
    parts = []
    for section in sections:
        figures = []
        for plate in section.plates:
            steps.begin(f"figure {plate.name}")
            if (picture := _draw(plate, subject, folder, plate.name)) is not None:
                figures.append(picture)
        grids = tuple(by_name[name] for name in shared[section.anchor])
        if figures or grids:
            parts.append(Part(section.anchor, section.title, section.sentence, tuple(figures), grids))
    if left := shared.get(MORE[0]):
        parts.append(Part(*MORE, (), tuple(by_name[name] for name in left)))
    return parts


def _draw(plate: Plate[Shown], subject: Shown, folder: Path, name: str) -> Picture | None:
    """Draw a figure and write its files; None where the data for it are missing."""
    try:
        with mpl.rc_context(STYLE):
            figure = plate.draw(subject)
            lay_out(figure)
    except UserError:
        return None
    png, _ = save(figure, folder / "figures", name, ("png", "pdf"))
    width, height = (round(_PIXELS_PER_INCH * float(inches)) for inches in figure.get_size_inches())
    return Picture(name, plate.caption, _source(figure, png), width, height)


def _source(figure: Figure, png: Path) -> str:
    """Return a figure as a `data:` address: vectors, or pixels where vectors are many."""
    vectors = render(figure, "svg")
    kind, content = ("png", png.read_bytes()) if len(vectors) > _LARGEST_SVG else ("svg+xml", vectors)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


# -------------------------------------------------------------------------------------------------- template


def _loader() -> jinja2.PackageLoader:
    return jinja2.PackageLoader("mini_gpt_pl.report", "assets")


def _template() -> jinja2.Template:
    """Everything that comes from a run or from the command line is escaped."""
    environment = jinja2.Environment(
        loader=_loader(), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["strong"] = _strong
    return environment.get_template("page.html")


def _strong(text: str) -> Markup:
    """Let the **emphasis** of Markdown, which tables share with their other format, be that of HTML."""
    return Markup(_EMPHASIS.sub(r"<strong>\1</strong>", str(escape(text))))


def _asset(name: str) -> str:
    return (Path(__file__).parent / "assets" / name).read_text()
