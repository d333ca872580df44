"""One HTML page about one run or several, with its figures and tables as files beside it.

mini_gpt_pl report runs/mine
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from mini_gpt_pl.atomic import write_text
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.progress import Steps
from mini_gpt_pl.runs.folder import CONFIG, REPORT, TRAJECTORY, Run, runs_below
from mini_gpt_pl.tasks import tasks

_SEVERAL = Path("reports")
_PAGE = "report.html"


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
    console = Console()
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
    runs = []
    for folder in folders:
        inside = runs_below(folder)
        if inside == [folder]:
            runs.append(Run(folder))
            continue
        kept = [Run(path) for path in inside if (path / TRAJECTORY).is_file()]
        for path in inside:
            if not (path / TRAJECTORY).is_file():
                tell(f"left out: {path} has no {TRAJECTORY}")
        if not kept:
            raise UserError(f"{folder} is no run folder and holds none: no folder in it has {CONFIG} and {TRAJECTORY}")
        runs += kept
    return runs


def write_report(runs: Sequence[Run], folder: Path, title: str | None, steps: Steps) -> Path:
    """Write figures, tables and the page.

    Args:
        runs: One run, or several that belong together.
        folder: Where to; made if need be.
        title: Of the page; None for the runs' names.
        steps: Told of every figure, table and run.

    Returns:
        The page.

    Raises:
        UserError: A run cannot be reported on, runs do not belong together, or the folder cannot be written to.
    """
    from mini_gpt_pl.report.assemble import assemble  # late: it imports all that draws

    single = len(runs) == 1
    told = {
        "title": title or (f"Run {runs[0].path.resolve().name}" if single else f"{len(runs)} runs"),
        "command": _command("report", *(run.path for run in runs), *_options(out=folder, title=title)),
        "retrain": _retrain(runs[0]) if single else None,
    }
    page = folder / _PAGE
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_text(page, assemble(runs, folder, told, steps))
    except OSError as error:
        raise UserError(f"the report cannot be written to {folder} ({error.strerror}): give another --out") from None
    return page


def _retrain(run: Run) -> str | None:
    """Write the command that trains a run again; None for a run that no `fit` of a listed task has started."""
    if run.task not in tasks() or run.lineage is not None:
        return None
    return _command("fit", *_options(config=run.path / CONFIG, run_dir=f"{run.path}-again"))


def _options(**values: object) -> list[str]:
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def _command(*words: object) -> str:
    return shlex.join(["mini_gpt_pl", *map(str, words)])
