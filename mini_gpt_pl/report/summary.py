"""The short table that closes a run."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry import pca
from mini_gpt_pl.runs import Run


@dataclass(frozen=True)
class Line:
    """One row of the closing table.

    Args:
        quantity: What was measured, in words.
        value: As it is shown.
        null: What a walk with the same step lengths in random directions gives; empty where that says nothing.
    """

    quantity: str
    value: str
    null: str = ""


def lines(run: Run) -> list[Line]:
    """Collect the rows: loss and probe, then the geometry if the run recorded a trajectory."""
    table = [
        Line("validation loss (nats per token)", _last(run, "val/loss")),
        Line("p_in, exact match at short gaps", _last(run, "probe/p_in")),
        Line("p_ood, exact match at long gaps", _last(run, "probe/p_ood")),
    ]
    try:
        return table + geometry_lines(run)
    except UserError:
        return table


def _last(run: Run, name: str) -> str:
    return f"{run.last(name):.3f}" if len(run.series(name)) else "-"


def geometry_lines(run: Run) -> list[Line]:
    """Rows of the whole selection's trajectory, each beside the random walk with the same step lengths.

    Raises:
        UserError: The run has no trajectory, or one without movement.
    """
    trajectory = run.trajectory
    n, rows, gram = len(trajectory), run.drift_rows, trajectory.gram()
    walk = gram.diag().diag()
    raw, unit = pca.pca(gram, rows), pca.pca(gram, rows, normalise=True)
    raw_walk, unit_walk = pca.pca(walk, rows), pca.pca(walk, rows, normalise=True)
    drift, drift_walk = (float(pca.norms(g, rows[-1:])) for g in (gram, walk))
    past = pca.past_update_alignment(gram)[1:]
    updates = f"{float(past.mean()):+.3f}" if len(past) else "-"
    cos0 = pca.cosine(gram, raw.backbone, pca.theta0(n))
    return [
        Line("PC1 of the drift, raw", f"{100 * raw.pc1:.1f} %", f"{100 * raw_walk.pc1:.1f} %"),
        Line("PC1 of the drift, unit rows", f"{100 * unit.pc1:.1f} %", f"{100 * unit_walk.pc1:.1f} %"),
        Line("k95, raw", str(raw.components_for(0.95)), str(raw_walk.components_for(0.95))),
        Line("drift ||x(T)||", f"{drift:.2f}", f"{drift_walk:.2f}"),
        Line("update alignment with the past's v_b, mean", updates, "0"),
        Line("cos(v_b, theta_0)", f"{cos0:+.3f}", "0"),
        Line("initial weights left by weight decay", f"{100 * trajectory.survival[-1]:.0f} %"),
    ]


def print_summary(run: Run, console: Console | None = None) -> None:
    """Print the closing table."""
    table = Table(title=f"{run.path}", title_justify="left")
    table.add_column("quantity")
    table.add_column("measured", justify="right")
    table.add_column("random walk*", justify="right")
    for line in lines(run):
        table.add_row(line.quantity, line.value, line.null)
    console = console or Console()
    console.print(table)
    console.print("* the same step lengths in mutually orthogonal directions, without weight decay", style="dim")
