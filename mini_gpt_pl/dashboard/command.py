"""The command `dashboard`: a W&B workspace, and a report for a sweep."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mini_gpt_pl.command_line import CommandParser
from mini_gpt_pl.dashboard import objects
from mini_gpt_pl.dashboard.layout import Logged, Section, workspace_sections
from mini_gpt_pl.dashboard.sweeps import find_sweep, report_sections
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.page import expand
from mini_gpt_pl.runs.folder import METRICS, Run

_NAME = "geometry"
_PROJECT = "mini_gpt_pl"
_OFFLINE = ("offline", "dryrun", "disabled")
_EPILOG = """\
Panels follow from what the given runs logged; without a run, from what configs/probes/standard.yaml logs. Every command
makes a new view of the project; no run is changed. W&B draws the runs that it has: send offline ones with `wandb sync`.
"""


def main(args: Sequence[str]) -> None:
    """Build a workspace, and a report if a sweep is named; `args` are the command line behind `dashboard`.

    Raises:
        UserError: An option or a run folder is not as it should be, the extra is missing, or W&B does not take it.
    """
    parser = CommandParser("dashboard", description="Build a W&B workspace, and a report for a sweep.", epilog=_EPILOG)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="run folder, or folder of runs: their metrics get panels")
    add("--project", help="W&B project (default: the first run's, WANDB_PROJECT, or mini_gpt_pl)")
    add("--entity", help="W&B user or team (default: WANDB_ENTITY, or that of the login)")
    add("--sweep", metavar="NAME_OR_ID", help="also a report: a sweep file, its name in configs/sweeps, or a W&B id")
    add("--name", default=_NAME, help=f"of the workspace view (default: {_NAME})")
    add("--dry_run", "--dry-run", action="store_true", help="print sections, panels and metrics, and send nothing")
    options = parser.parse_args(args)
    runs = find_runs(options.runs)
    logged = Logged.of(runs) if runs else Logged.standard()
    project = options.project or _project_of(runs) or os.environ.get("WANDB_PROJECT") or _PROJECT
    sections = workspace_sections(logged)
    sweep = find_sweep(options.sweep, runs) if options.sweep else None
    pages = report_sections(logged, sweep) if sweep else []
    if options.dry_run:
        print("\n".join(describe(sections, f"workspace {options.name!r} in project {project}")))
        if sweep:
            which = f"W&B sweep {sweep.identifier}" if sweep.identifier else f"runs {', '.join(sweep.names)}"
            varied = f", grouped by {', '.join(sweep.varied)}" if sweep.varied else ""
            print("\n".join(describe(pages, f"report {sweep.title!r} in project {project}: {which}{varied}")))
        return
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode in _OFFLINE:
        raise UserError(f"a dashboard is saved on a W&B server, but WANDB_MODE is {mode}: unset it, or use --dry_run")
    entity = options.entity or os.environ.get("WANDB_ENTITY") or _ask_entity()
    views = {"workspace": objects.workspace(sections, options.name, entity, project)}
    if sweep:
        views["report"] = objects.report(pages, sweep, entity, project)
    for what, view in views.items():
        _asking(view.save, f"W&B did not take the {what}")
        print(f"{what}: {view.url}")


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Return runs with metrics: folders that hold them, or that hold such folders.

    Raises:
        UserError: A folder does not exist, or holds no run.
    """
    # A run of one's own Trainer has metrics and no configuration.
    runs = ([Run(folder)] if (folder / METRICS).is_file() else expand([folder]) for folder in folders)
    return list(chain.from_iterable(runs))


def describe(sections: Sequence[Section], title: str) -> list[str]:
    """Say in lines of text what sections hold, below a title: every panel with its metrics."""
    lines = [title]
    for section in sections:
        lines.append(f"  {section.name}")
        for panel in section.panels:
            parts = [f"    {panel.heading}: {', '.join(panel.values)}"]
            parts += [f"{word} {', '.join(n)}" for word, n in (("null", panel.nulls), ("over", panel.across)) if n]
            lines.append("; ".join(parts + ["images"] * (panel.kind == "images")))
    return lines


def _project_of(runs: Sequence[Run]) -> str | None:
    """The project that the first run's own logger names."""
    for run in runs:
        loggers = (run.settings.get("trainer") or {}).get("logger")
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, dict) and (logger.get("init_args") or {}).get("project"):
                return str(logger["init_args"]["project"])
    return None


def _ask_entity() -> str:
    """Return the login's own entity."""
    import wandb

    entity = _asking(lambda: wandb.Api().default_entity, "a dashboard needs a W&B login")
    if not entity:
        raise UserError("the W&B login has no entity of its own: give --entity")
    return str(entity)


def _asking(action: Callable[[], Any], trouble: str) -> Any:
    """Do something that talks to the server.

    Raises:
        UserError: It failed: no login, no network, no such entity or project.
    """
    try:
        return action()
    except Exception as error:  # the library and its transports raise plain exceptions of every kind
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = "log in with `wandb login`, check --entity and --project, or use --dry_run"
        raise UserError(f"{trouble} ({reason.rstrip('.')}): {hint}") from None
