"""Tables over several runs of stories, by what sets them apart: optimizer, beta2, seed, a reheat."""

from __future__ import annotations

from collections.abc import Sequence

from mini_gpt_pl.report.comparison import geometry, grouped, overview, require_comparable, seeds, subjects_of, unique
from mini_gpt_pl.report.families import from_scratch, one_of_each_seed
from mini_gpt_pl.report.pooled import over_seeds
from mini_gpt_pl.report.settings import optimizer_label
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.beta2_tables import beta2
from mini_gpt_pl.stories.study.families import OF_OPTIMIZER, one_beta2
from mini_gpt_pl.stories.study.learning_tables import LOSS
from mini_gpt_pl.stories.study.optimizer_tables import optimizers, outcome
from mini_gpt_pl.stories.study.reheat_tables import reheats
from mini_gpt_pl.stories.study.tables import run_tables
from mini_gpt_pl.stories.switches import P_OOD

_OUTCOMES = ((LOSS, "validation loss at the end", "last"), (P_OOD, "p_ood, highest", "highest"))


def comparison_tables(runs: Sequence[Run], bootstrap: int | None = None) -> list[Table]:
    """Make every table that at least two of the runs belong to.

    Args:
        runs: All runs of the report.
        bootstrap: Resamples behind the 95 % intervals; 0 for none, None for those of the runs.

    Raises:
        UserError: The runs do not belong together; see `require_comparable`.
    """
    require_comparable(runs)
    if len(runs) < 2:
        return []
    # Of a run that broke off before it logged anything, nothing can be said here.
    logged = [subject for subject in subjects_of(runs, bootstrap) if subject.has_metrics]
    paths = [path for path in from_scratch(logged) if path.moved]
    tables, whole = overview(paths, [outcome(path) for path in paths]), geometry(paths)
    for group in grouped(paths, (*OF_OPTIMIZER, "steps", "seed")):
        part = one_beta2(group)
        if len({optimizer_label(path.facts) for path in part}) > 1:
            tables += optimizers(part, [path.label for path in group if path not in part])
            whole = [] if len(part) == len(paths) else whole  # its table of whole runs says the same
    tables[1:1] = whole
    for part in grouped(paths, ("beta2", "seed")):
        if len({path.facts["beta2"] for path in part} - {None}) > 1:
            tables += beta2([path for path in part if path.facts["beta2"] is not None])
    for part in grouped(paths, ("seed",)):
        kept = one_of_each_seed(part)
        if len(kept) > 1:
            tables += seeds(kept, _OUTCOMES) + over_seeds(kept, run_tables)
    return unique([*tables, *reheats(logged, logged, {subject: subject.label for subject in logged})])
