"""What several runs of stories say together: optimizers, beta2, over-fitting, and the gain of reheating."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.claims import Finding
from mini_gpt_pl.report.families import names
from mini_gpt_pl.report.findings import findings, logged, sound_ones, written_gap
from mini_gpt_pl.report.settings import diverged, facts, plain
from mini_gpt_pl.report.statistics import direction, spearman
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.families import beta2_of, optimizers_of
from mini_gpt_pl.stories.study.learning_tables import fit_of
from mini_gpt_pl.stories.study.reheat_tables import gains


def story_findings(runs: Sequence[Run]) -> list[Finding]:
    """Collect what can be said across runs of stories."""
    called, sound = names(runs), sound_ones(runs)
    said = [*findings(runs), *_optimizers(logged(runs), sound, called), *_beta2(sound)]
    said += [*_over_fitting(runs, called), *gains(runs)]
    return sorted(said, key=lambda finding: finding.topic == "Diverged")  # it speaks of the sentences above it


def _optimizers(
    runs: Sequence[Run], sound: dict[Run, dict[str, Calibrated]], called: dict[Run, str]
) -> Iterator[Finding]:
    chosen = {called[run]: sound[run]["pc1_unit"] for run in optimizers_of(runs) if run in sound}
    if len(chosen) < 2:
        return
    form = statistics()["pc1_unit"].format
    each = [
        f"{name} {form.format(found.value)} (decaying walk {form.format(found.decay)})"
        for name, found in sorted(chosen.items(), key=lambda pair: -pair[1].value)
    ]
    most = max(chosen, key=lambda name: chosen[name].excess)
    best = f"The excess is largest in {most}, {written_gap(chosen[most].excess, form)}."
    yield Finding("PC1 by optimizer (unit rows)", f"{', '.join(each)}. {best}", "optimizers")


def _beta2(sound: dict[Run, dict[str, Calibrated]]) -> Iterator[Finding]:
    """Whether the excess of PC1 follows beta2, over the means of runs of one value."""
    chosen = beta2_of(list(sound))
    values = sorted({float(facts(run)["beta2"]) for run in chosen})
    if len(values) < 3:
        return
    for name in ("pc1", "pc1_unit"):
        words, form = statistics()[name].title, statistics()[name].format
        found = [[sound[run][name].excess for run in chosen if facts(run)["beta2"] == value] for value in values]
        means = [math.fsum(excesses) / len(excesses) for excesses in found]
        shown = ", ".join(
            f"{written_gap(mean, form)} at {plain(value)}" for value, mean in zip(values, means, strict=True)
        )
        follows = {"rises": "rises with beta2 throughout", "falls": "falls with beta2 throughout"}
        verdict = follows.get(direction(means), "neither rises nor falls with beta2 throughout")
        rank = spearman(values, means)
        ranked = f"rank correlation {rank:+.2f}; {len(values)} values have {math.factorial(len(values)):,} orders"
        yield Finding(f"Excess of {words} by beta2", f"{verdict}: {shown} ({ranked}).", "beta2")


def _over_fitting(runs: Sequence[Run], called: dict[Run, str]) -> Iterator[Finding]:
    sound = [run for run in logged(runs) if not diverged(run)]
    fits = {called[run]: fit for run in sound if (fit := fit_of(run)) is not None}
    over = {name: fit for name, fit in fits.items() if fit.overfits}
    if over:
        worst = max(over, key=lambda name: over[name].rise)
        most = f"most in {worst}, by {over[worst].rise:.2f} nats since step {over[worst].best_step:,}"
        yield Finding("Over-fitting", f"validation loss rose again in {len(over)} of {len(fits)} runs, {most}.", "runs")
