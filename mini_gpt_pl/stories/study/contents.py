"""What a report on runs of stories is made of: its tables, its figures, its sections, and what several runs say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from mini_gpt_pl.report import comparison, general
from mini_gpt_pl.report.claims import Finding
from mini_gpt_pl.report.comparison import grouped, require_comparable
from mini_gpt_pl.report.contents import Contents, Plate, Section, plates, section_of, sections
from mini_gpt_pl.report.families import from_scratch, names, one_of_each_seed
from mini_gpt_pl.report.findings import findings, logged, sound_ones
from mini_gpt_pl.report.settings import OF_OPTIMIZER, diverged, optimizer_label
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.report.subject import Backdrop, Subject
from mini_gpt_pl.runs.folder import Run, require_reportable
from mini_gpt_pl.stories.experiments.figures import EXPERIMENT_FIGURES
from mini_gpt_pl.stories.experiments.tables import experiment_tables
from mini_gpt_pl.stories.study import beta2, learning, optimizers, overlays, reheats, replayed, switching
from mini_gpt_pl.stories.study.learning import LOSS, P_IN
from mini_gpt_pl.stories.study.pooled import over_seeds
from mini_gpt_pl.stories.study.runs import BOOK, lambda_change, main_run, one_beta2, story_facts
from mini_gpt_pl.stories.study.switch_series import switch_series
from mini_gpt_pl.stories.study.theory_tables import theory_tables
from mini_gpt_pl.stories.study.words import words
from mini_gpt_pl.stories.switches import P_OOD

_OUTCOMES = ((LOSS, "validation loss at the end", "last"), (P_OOD, "p_ood, highest", "highest"))


# ------------------------------------------------------------------------------------------------------- tables


def run_tables(run: Run) -> list[Table]:
    """Make every table of one run that its data allow, each number beside its nulls and the published value.

    Raises:
        UserError: The run has no trajectory, or a file of it is damaged.
    """
    require_reportable(run)
    subject, beside = Subject.of(run), main_run(run)
    tables = (learning.table(subject, beside) if subject.has_metrics else []) + general.general_tables(subject, beside)
    if subject.moved and subject.has_metrics:
        of_replay = replayed.tables(subject, beside)
        tables = [table for table in tables if table.name not in {other.name for other in of_replay}] + of_replay
        tables += switching.tables(subject, beside) + switching.significance(subject)
        tables += switch_series(subject) + theory_tables(subject) + experiment_tables(subject)
    return tables + reheats.table([subject])


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
    subjects = [subject for subject in comparison.subjects_of(runs, bootstrap) if subject.has_metrics]
    paths = [path for path in from_scratch(subjects) if path.moved]
    tables = comparison.overview(paths, [optimizers.outcome(path) for path in paths])
    whole = comparison.geometry(paths)
    for group in grouped(paths, (*OF_OPTIMIZER, "steps", "seed")):
        part = one_beta2(group)
        if len({optimizer_label(path.facts) for path in part}) > 1:
            tables += optimizers.tables(part, [path.label for path in group if path not in part])
            whole = [] if len(part) == len(paths) else whole  # its table of whole runs says the same
    tables[1:1] = whole
    for part in grouped(paths, ("beta2", "seed")):
        if len({path.facts["beta2"] for path in part} - {None}) > 1:
            tables += beta2.tables([path for path in part if path.facts["beta2"] is not None])
    for part in grouped(paths, ("seed",)):
        one_each = one_of_each_seed(part)
        if len(one_each) > 1:
            tables += comparison.seeds(one_each, _OUTCOMES) + over_seeds(one_each, run_tables)
    return comparison.unique(
        [*tables, *reheats.table(subjects, subjects, {subject: subject.label for subject in subjects})]
    )


# ----------------------------------------------------------------------------------------------------- findings


def story_findings(runs: Sequence[Run]) -> list[Finding]:
    """Collect what can be said across runs of stories."""
    called, sound = names(runs), sound_ones(runs)
    said = [*findings(runs), *optimizers.finding(logged(runs), sound, called), *beta2.finding(sound)]
    said += [*_over_fitting(runs, called), *reheats.gains(runs)]
    return sorted(said, key=lambda finding: finding.topic == "Diverged")  # it speaks of the sentences above it


def _over_fitting(runs: Sequence[Run], called: Mapping[Run, str]) -> Iterator[Finding]:
    sound = [run for run in logged(runs) if not diverged(run)]
    fits = {called[run]: fit for run in sound if (fit := learning.fit_of(run)) is not None}
    over = {name: fit for name, fit in fits.items() if fit.overfits}
    if over:
        worst = max(over, key=lambda name: over[name].rise)
        most = f"most in {worst}, by {over[worst].rise:.2f} nats since step {over[worst].best_step:,}"
        yield Finding("Over-fitting", f"validation loss rose again in {len(over)} of {len(fits)} runs, {most}.", "runs")


# --------------------------------------------------------------------------------------------- figures, sections

RUN_FIGURES: Mapping[str, Callable[[Run], Figure]] = {
    **general.RUN_FIGURES,
    "learning": learning.figure,
    "signed_bias": replayed.signed_bias_figure,
    "switching": switching.figure,
    "significance": switching.significance_figure,
    "logit_lens": replayed.logit_lens_figure,
    "reheating": lambda run: reheats.figure([run]),
    **EXPERIMENT_FIGURES,
}
"""Figures of one run; each raises a UserError where the run lacks the data."""
COMPARISON_FIGURES: Mapping[str, Callable[[Sequence[Run]], Figure]] = {
    "overview": overlays.overview,
    "optimizers": optimizers.figure,
    "beta2_pc1": beta2.pc1,
    "beta2_curves": beta2.curves,
    "seeds": overlays.seeds,
    "matched_loss": optimizers.matched_loss,
    "reheating": reheats.figure,
}
"""Figures of several runs; each raises a UserError where no two of the runs belong to it."""


def _of_path(section: Section[Run]) -> Section[Run]:
    """Let a section of the core claim its tables under the study's names, and show what a replay adds to it."""
    own = [table for name, (table, _) in BOOK.tables.items() if section.claims(name)]
    more = plates(RUN_FIGURES, **words("sections")["path"].get(section.anchor, {}))
    return replace(section, tables=(*section.tables, *own), plates=(*section.plates, *more))


_PATH = [_of_path(section) for section in general.PATH_SECTIONS]
RUN_SECTIONS: tuple[Section[Run], ...] = tuple(
    section
    for entry in words("sections")["run"]
    for section in (_PATH if entry == "path" else [section_of(entry, RUN_FIGURES)])
)
COMPARISON_SECTIONS: tuple[Section[Sequence[Run]], ...] = sections(__package__, "runs", COMPARISON_FIGURES)

CONTENTS = Contents(
    RUN_SECTIONS,
    run_tables,
    COMPARISON_SECTIONS,
    comparison_tables,
    story_findings,
    Plate("backbone", RUN_FIGURES["backbone"], "backbone and residual, with p_ood behind."),
    facts=story_facts,
    learned=lambda run: tuple(learning.learned(run)),
    closing={
        LOSS: "validation loss",
        P_IN: "p_in, exact match at short gaps",
        P_OOD: "p_ood, exact match at long gaps",
    },
    figures={"learning": RUN_FIGURES["learning"]},
    backdrop=Backdrop((P_OOD, "$p_{ood}$"), lambda_change, {"lm": "LM", "probe": "probe"}),
)
