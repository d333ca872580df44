"""One HTML page about one run or several, with its figures and tables as files beside it.

mini_gpt_pl report runs/mine
"""

from __future__ import annotations

import argparse
import base64
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jinja2
from markupsafe import Markup, escape
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mini_gpt_pl.atomic import write_text
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import render, save
from mini_gpt_pl.report.comparison import require_comparable, subjects_of
from mini_gpt_pl.report.contents import MORE, Plate, Section, Shown, claimed, contents_of
from mini_gpt_pl.report.figures import drawn
from mini_gpt_pl.report.sheet import NULLS, Table, write_tables
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.report.summary import headline
from mini_gpt_pl.runs.folder import CONFIG, REPORT, TRAJECTORY, Run, require_reportable, runs_below
from mini_gpt_pl.tasks import tasks

_SEVERAL = Path("reports")
_PAGE = "report.html"
# Vector graphics stay sharp, but one with thousands of points would be most of the page.
_LARGEST_SVG = 110_000
_PIXELS_PER_INCH = 96
_EMPHASIS = re.compile(r"\*\*(.+?)\*\*")


def main(args: Sequence[str]) -> None:
    """Write the report that a command line asks for.

    Raises:
        UserError: A run cannot be reported on, runs do not belong together, or the folder cannot be written to.
    """
    parser = argparse.ArgumentParser(
        prog="mini_gpt_pl report", description="Write tables, figures and one HTML page about one run or several."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or folder of runs (a sweep's)")
    parser.add_argument("--out", type=Path, help=f"folder to write to (default: RUN/{REPORT}; {_SEVERAL}/ for several)")
    parser.add_argument("--title", help="title of the page (default: the run's name)")
    options = parser.parse_args(args)
    console = Console(markup=False)
    runs = expand(options.runs, lambda line: console.print(line, highlight=False, soft_wrap=True))
    folder = options.out or (runs[0].path / REPORT if len(runs) == 1 else _SEVERAL)
    with Steps(console) as steps:
        page = write_report(runs, folder, options.title, steps)
    console.print(f"{page} ({page.stat().st_size / 2**20:.1f} MiB)", highlight=False, soft_wrap=True)


def expand(folders: Sequence[Path], tell: Callable[[str], object] = print) -> list[Run]:
    """Replace folders of runs by the runs in them.

    Args:
        folders: Run folders, or folders that hold some at any depth; nested runs are not included.
        tell: Takes a line about each run that is left out because it recorded no path.

    Raises:
        UserError: A folder does not exist, or holds no run.
    """
    runs: list[Run] = []
    for folder in folders:
        inside = runs_below(folder)
        recorded = [path for path in inside if inside == [folder] or (path / TRAJECTORY).is_file()]
        for path in inside:
            if path not in recorded:
                tell(f"left out: {path} has no {TRAJECTORY}")
        if not recorded:
            raise UserError(f"{folder} is no run folder and holds none: no folder in it has {CONFIG} and {TRAJECTORY}")
        runs += map(Run, recorded)
    return runs


class Steps:
    """Count the steps of a long command, one after the other: a bar on a terminal, else a line for each step.

    Example:
        >>> with Steps(Console()) as steps:
        ...     steps.expect(1)
        ...     steps.begin("figure backbone")
        1/1 figure backbone
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total = self._begun = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("report", total=None)

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def expect(self, total: int) -> None:
        """Say how many steps there are."""
        self._total = total

    def begin(self, what: str) -> None:
        """Begin the next step; the ones before are done."""
        self._bar.update(self._task, description=what, completed=self._begun, total=self._total)
        self._begun += 1
        if self._bar.disable:
            self._console.print(f"{self._begun}/{self._total} {what}", highlight=False, soft_wrap=True)


# ------------------------------------------------------------------------------------------- from runs to a page


Values = dict[str, Any]
"""What the template takes for one thing on the page."""


def write_report(runs: Sequence[Run], folder: Path, title: str | None, steps: Steps) -> Path:
    """Write figures, tables and the page, and return the page.

    Args:
        runs: One run, or several that belong together.
        folder: Where to; made if need be. It gets `figures/` and `tables/` too.
        title: Of the page; None for the runs' names.
        steps: Counts every figure, table and run.

    Raises:
        UserError: A run cannot be reported on, runs do not belong together, or the folder cannot be written to.
    """
    single = len(runs) == 1
    words = ["report", *(str(run.path) for run in runs), *_options(out=folder, title=title)]
    named = title or (f"Run {runs[0].path.resolve().name}" if single else f"{len(runs)} runs")
    page = folder / _PAGE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = (_of_one if single else _of_several)(runs, folder, steps)
        style = (Path(__file__).parent / "assets" / "page.css").read_text()
        values = {"title": named, "command": _command(*words), "retrain": _retrain(runs[0]) if single else None}
        write_text(page, _template().render(**values, **made, nulls=NULLS, style=style))
    except OSError as error:
        raise UserError(f"the report cannot be written to {folder} ({error.strerror}): give another --out") from None
    return page


def _of_one(runs: Sequence[Run], folder: Path, steps: Steps) -> Values:
    require_reportable(runs[0])
    run, contents = Subject.of(runs[0]), contents_of(runs)
    steps.expect(2 + sum(len(section.plates) for section in contents.of_run))
    steps.begin("headline")
    single = headline(run)
    steps.begin("tables")
    parts = _parts(contents.of_run, run, contents.run_tables(run), folder, steps)
    return {"single": single, "findings": [], "sections": parts, "entries": []}


def _of_several(runs: Sequence[Run], folder: Path, steps: Steps) -> Values:
    require_comparable(runs)
    subjects, contents = subjects_of(runs), contents_of(runs)
    steps.expect(1 + len(runs) + sum(len(section.plates) for section in contents.of_runs))
    steps.begin("tables")
    parts = _parts(contents.of_runs, subjects, contents.comparison(subjects), folder, steps)
    entries = []
    for number, run in enumerate(subjects, 1):
        steps.begin(f"run {run.label}")
        anchor, plate = f"run-{number}", contents.entry
        figures = _picture(plate, run, folder, f"{anchor}-{plate.name}", f"{run.label}: {plate.caption}")
        entries.append({"anchor": anchor, "label": run.label, "headline": headline(run), "figures": figures})
    return {"single": None, "findings": contents.findings(subjects), "sections": parts, "entries": entries}


def _parts(
    sections: Sequence[Section[Shown]], subject: Shown, tables: Sequence[Table], folder: Path, steps: Steps
) -> list[Values]:
    """Write the tables, and make every section that has a figure or a table."""
    write_tables(tables, folder / "tables")
    by_name = {table.name: table for table in tables}
    shared = claimed(sections, list(by_name))
    parts = []
    for section in (*sections, MORE):
        figures = []
        for plate in section.plates:
            steps.begin(f"figure {plate.name}")
            figures += _picture(plate, subject, folder, plate.name, plate.caption)
        grids = [by_name[name] for name in shared.get(section.anchor, ())]
        if figures or grids:
            head = {"anchor": section.anchor, "title": section.title, "sentence": section.sentence}
            parts.append({**head, "figures": figures, "tables": grids})
    return parts


def _picture(plate: Plate[Shown], subject: Shown, folder: Path, name: str, caption: str) -> list[Values]:
    """Draw a figure and write its files; nothing where the data for it are missing."""
    if (figure := drawn(plate.draw, subject)) is None:
        return []
    png, _ = save(figure, folder / "figures", name, ("png", "pdf"))
    vectors = render(figure, "svg")
    kind, content = ("png", png.read_bytes()) if len(vectors) > _LARGEST_SVG else ("svg+xml", vectors)
    width, height = (round(_PIXELS_PER_INCH * float(inches)) for inches in figure.get_size_inches())
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return [{"anchor": name, "caption": caption, "source": source, "width": width, "height": height}]


def _template() -> jinja2.Template:
    """Everything that comes from a run or from the command line is escaped."""
    loader = jinja2.PackageLoader("mini_gpt_pl.report", "assets")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # The **emphasis** of Markdown, which tables share with their other format, becomes that of HTML.
    environment.filters["strong"] = lambda text: Markup(_EMPHASIS.sub(r"<strong>\1</strong>", str(escape(text))))
    return environment.get_template("page.html")


def _retrain(run: Run) -> str | None:
    """Write the command that trains a run again; None for a run that no `fit` of a listed task has started."""
    if run.task not in tasks() or run.lineage is not None:
        return None
    return _command("fit", *_options(config=run.path / CONFIG, run_dir=f"{run.path}-again"))


def _options(**values: object) -> list[str]:
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def _command(*words: str) -> str:
    return shlex.join(["mini_gpt_pl", *words])
