"""Tables of one run of stories: each geometric number beside its nulls, and beside the published value."""

from __future__ import annotations

from mini_gpt_pl.report.general import general_tables
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run, require_reportable
from mini_gpt_pl.stories.experiments.tables import experiment_tables
from mini_gpt_pl.stories.study.beside import main_run
from mini_gpt_pl.stories.study.learning_tables import learning, logit_lens
from mini_gpt_pl.stories.study.reheat_tables import reheats
from mini_gpt_pl.stories.study.replay_tables import replay_tables
from mini_gpt_pl.stories.study.switch_noise import significance
from mini_gpt_pl.stories.study.switch_series import switch_series
from mini_gpt_pl.stories.study.switch_tables import switches
from mini_gpt_pl.stories.study.theory_tables import theory_tables


def run_tables(run: Run) -> list[Table]:
    """Make every table that a run's data allow; a missing ingredient leaves its table out.

    Raises:
        UserError: The run has no trajectory, or a file of it is damaged.
    """
    require_reportable(run)
    subject, beside = Subject.of(run), main_run(run)
    found = (learning(subject, beside) if subject.has_metrics else []) + general_tables(subject, beside)
    if subject.moved and subject.has_metrics:
        replayed = replay_tables(subject, beside)
        found = [table for table in found if table.name not in {other.name for other in replayed}] + replayed
        found += logit_lens(subject, beside) + switches(subject, beside)
        found += significance(subject) + switch_series(subject) + theory_tables(subject) + experiment_tables(subject)
    return found + (reheats([subject]) if run.lineage is not None else [])
