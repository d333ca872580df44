"""Tables and sentences over several runs of stories, by what sets them apart: optimizer, beta2, seed, a reheat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mini_gpt_pl.report.claims import Finding
from mini_gpt_pl.report.comparison import geometry, grouped, overview, require_comparable, seeds, subjects_of, unique
from mini_gpt_pl.report.families import OF_OPTIMIZER, from_scratch, names, one_beta2, one_of_each_seed
from mini_gpt_pl.report.findings import findings
from mini_gpt_pl.report.pooled import over_seeds
from mini_gpt_pl.report.settings import diverged, optimizer_label
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.runs.folder import METRICS, Run
from mini_gpt_pl.stories.study.beta2_tables import beta2
from mini_gpt_pl.stories.study.learning_tables import LOSS, fit_of
from mini_gpt_pl.stories.study.optimizer_tables import optimizers, outcome
from mini_gpt_pl.stories.study.reheat_tables import gains, reheats
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


def story_findings(runs: Sequence[Run]) -> list[Finding]:
    """Collect what can be said across runs of stories."""
    said = [*findings(runs), *_over_fitting(runs), *gains(runs)]
    return sorted(said, key=lambda finding: finding.topic == "Diverged")  # it speaks of the sentences above it


def _over_fitting(runs: Sequence[Run]) -> Iterator[Finding]:
    called = names(runs)
    sound = [run for run in from_scratch(runs) if (run.path / METRICS).is_file() and not diverged(run)]
    fits = {called[run]: fit for run in sound if (fit := fit_of(run)) is not None}
    over = {name: fit for name, fit in fits.items() if fit.overfits}
    if over:
        worst = max(over, key=lambda name: over[name].rise)
        most = f"most in {worst}, by {over[worst].rise:.2f} nats since step {over[worst].best_step:,}"
        yield Finding("Over-fitting", f"validation loss rose again in {len(over)} of {len(fits)} runs, {most}.", "runs")
