"""Several runs of stories laid over one another: the curves of any path, and what these runs learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report import overlays as general
from mini_gpt_pl.report.families import seeds_of
from mini_gpt_pl.report.overlays import Look, Quantity, metric, named
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.learning import LOSS
from mini_gpt_pl.stories.switches import P_OOD

CURVES: Mapping[str, Quantity] = {
    **general.CURVES,
    "loss": Quantity("validation loss, nats", metric(LOSS), unbounded=True),
    "p_ood": Quantity("$p_{ood}$", metric(P_OOD)),
}


def panels(looks: Sequence[Look], *curves: str) -> Figure:
    """Draw four of the curves in two rows of panels."""
    return general.panels(looks, [CURVES[name] for name in curves])


def need(runs: Sequence[Run], what: str) -> Sequence[Run]:
    """Return runs that differ in something only.

    Raises:
        UserError: There are no two of them.
    """
    if len(runs) < 2:
        raise UserError(f"no two of the runs differ in {what} only")
    return runs


def overview(runs: Sequence[Run]) -> Figure:
    """Loss, p_ood, backbone coordinate and residual of all runs from scratch.

    Raises:
        UserError: There are fewer than two.
    """
    return panels(named(general.several(runs), runs), "loss", "p_ood", "a", "r")


def seeds(runs: Sequence[Run]) -> Figure:
    """Backbone coordinate, residual, fraction and p_ood of runs that differ in their seed.

    Raises:
        UserError: There are no two such runs.
    """
    return panels(named(need(seeds_of(runs), "seed"), runs), "a", "r", "fraction", "p_ood")
