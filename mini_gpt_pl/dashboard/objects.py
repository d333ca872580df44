"""Layouts as the objects of `wandb-workspaces`, which saves them to a W&B server."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

from mini_gpt_pl.dashboard.layout import AXIS, Panel, Section
from mini_gpt_pl.dashboard.sweeps import SweepRuns
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.metrics.registry import find

_COLUMNS = 3
# A report is 24 units wide.
_WIDTH, _HEIGHT = 8, 6
_EXPLAINED = (
    "A random walk has a PC1 of 8/pi^2 = 81 % under this PCA (Antognini and Sohl-Dickstein, arXiv 1806.08805), and "
    "weight decay alone moves weights towards zero along one direction: every number about geometry stands beside its "
    "null, a decaying walk of the same step lengths. What exceeds it is the finding."
)


def _library(name: str) -> Any:
    """Import a module of the extra.

    Raises:
        UserError: The extra is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            "a dashboard is saved by wandb-workspaces, which is not installed: "
            "pip install 'mini_gpt_pl[dashboard]', or look at it with --dry_run"
        ) from None


def workspace(sections: Sequence[Section], name: str, entity: str, project: str) -> Any:
    """Build a workspace with sections, top to bottom; nothing is sent before its `save`.

    Raises:
        UserError: The extra is not installed.
    """
    ws = _library("wandb_workspaces.workspaces")
    parts = []
    for section in sections:
        layout = ws.SectionLayoutSettings(columns=_COLUMNS, rows=math.ceil(len(section.panels) / _COLUMNS))
        parts.append(
            ws.Section(
                name=section.name,
                panels=[_panel(panel) for panel in section.panels],
                is_open=True,
                layout_settings=layout,
                panel_settings=ws.SectionPanelSettings(x_axis=AXIS),
            )
        )
    settings = ws.WorkspaceSettings(x_axis=AXIS)
    return ws.Workspace(entity=entity, project=project, name=name, sections=parts, settings=settings)


def report(sections: Sequence[Section], sweep: SweepRuns, entity: str, project: str) -> Any:
    """Build a report whose run set is the sweep, grouped by what it varies; nothing is sent before its `save`.

    Raises:
        UserError: The extra is not installed.
    """
    wr = _library("wandb_workspaces.reports.v2")
    blocks = [wr.P(_EXPLAINED)]
    for section in sections:
        panels = [_panel(panel, place) for place, panel in enumerate(section.panels)]
        grid = wr.PanelGrid(runsets=[_run_set(wr, sweep, entity, project)], panels=panels)
        blocks += [wr.H2(section.name), grid]
    return wr.Report(project=project, entity=entity, title=sweep.title, blocks=blocks, width="fluid")


def _run_set(wr: Any, sweep: SweepRuns, entity: str, project: str) -> Any:
    expr = _library("wandb_workspaces.expr")
    own = expr.Metric("Sweep") == sweep.identifier if sweep.identifier else expr.Metric("Name").isin(list(sweep.names))
    grouped = [f"config.{key}" for key in sweep.varied]
    return wr.Runset(entity=entity, project=project, name=sweep.title, filters=expr.And(own), groupby=grouped)


def _panel(panel: Panel, place: int = 0) -> Any:
    """Make one panel, with its place in a grid; a workspace lays panels out itself."""
    wr = _library("wandb_workspaces.reports.v2")
    row, column = divmod(place, _COLUMNS)
    layout = wr.Layout(x=column * _WIDTH, y=row * _HEIGHT, w=_WIDTH, h=_HEIGHT)
    if panel.kind == "images":
        return wr.MediaBrowser(title=panel.heading, media_keys=list(panel.values), num_columns=1, layout=layout)
    if panel.kind == "bars":
        return wr.BarPlot(title=panel.heading, metrics=list(panel.metrics), layout=layout)
    if panel.kind == "scatter":
        x, y = wr.Config(panel.across[0]), wr.SummaryMetric(last_of(panel.values[0]))
        return wr.ScatterPlot(title=panel.heading, x=x, y=y, layout=layout)
    if panel.kind == "parallel":
        column_of = wr.ParallelCoordinatesPlotColumn
        settings = [column_of(wr.Config(key), display_name=key.rpartition(".")[2]) for key in panel.across]
        outcomes = [column_of(wr.SummaryMetric(last_of(name)), display_name=name) for name in panel.metrics]
        layout = wr.Layout(x=0, y=row * _HEIGHT, w=_COLUMNS * _WIDTH, h=_HEIGHT)
        return wr.ParallelCoordinatesPlot(title=panel.heading, columns=settings + outcomes, layout=layout)
    log = {"log_y": True} if panel.log_y else {}
    return wr.LinePlot(title=panel.heading, x=AXIS, y=list(panel.metrics), layout=layout, **log)


def last_of(metric: str) -> str:
    """Return where a run's summary keeps a metric: its best value where a best is defined, else the last."""
    entry = find(metric)
    return f"{metric}.{entry.best}" if entry is not None and entry.best else metric
