"""Tables of one run: each geometric number beside its nulls, and beside the published value where there is one."""

from __future__ import annotations

from collections.abc import Callable

from mini_gpt_pl.report.measures import RecordedPath
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.runs.folder import METRICS, Run, require_reportable
from mini_gpt_pl.stories.study import gradient_tables, learning_tables, path_tables
from mini_gpt_pl.stories.study.beside import Setting, setting_of
from mini_gpt_pl.stories.study.reheat_tables import reheats

_OF_PATH: tuple[Callable[[RecordedPath, Setting], list[Table]], ...] = (
    path_tables.overview,
    path_tables.pc1_by_block,
    path_tables.updates,
    path_tables.windows,
    path_tables.fraction,
    path_tables.growth_laws,
    path_tables.autocorrelation,
)
_OF_METRICS: tuple[Callable[[RecordedPath, Setting], list[Table]], ...] = (
    gradient_tables.bias,
    gradient_tables.fisher,
    gradient_tables.gradient_alignment,
    gradient_tables.interference,
    gradient_tables.logit_lens,
    learning_tables.switches,
    learning_tables.live_probes,
)


def run_tables(run: Run, bootstrap: int = 200) -> list[Table]:
    """Make every table that a run's data allow; a missing ingredient leaves its table out.

    Args:
        run: The run.
        bootstrap: Resamples behind the 95 % intervals; 0 for none.

    Raises:
        UserError: The run has no trajectory, or a file of it is damaged.
    """
    require_reportable(run)
    path, setting = RecordedPath(run, bootstrap), setting_of(run)
    measured = (run.path / METRICS).is_file()
    found = learning_tables.learning(run, setting) if measured else []
    if path.moved:
        for make in _OF_PATH + (_OF_METRICS if measured else ()):
            found += make(path, setting)
    return found + (reheats([run]) if run.reheated is not None else [])
