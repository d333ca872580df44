"""At which steps a report looks at what was logged: the first record, memorisation, generalisation, the end."""

from __future__ import annotations

import re

from mini_gpt_pl.arithmetic.milestones import GENERALISED, MEMORISED
from mini_gpt_pl.arithmetic.study.runs import TEST, TRAIN
from mini_gpt_pl.runs.folder import METRICS, Run

_MARKERS = re.compile(r"eval/m(\d+)_accuracy")


def logged(run: Run, pattern: str) -> list[re.Match[str]]:
    """Names of metrics that match a pattern as a whole, in the order of the file; none without metrics."""
    if not (run.path / METRICS).is_file():
        return []
    return [match for name in run.metrics if (match := re.fullmatch(pattern, str(name)))]


def markers(run: Run) -> dict[int, str]:
    """Numbers of markers that a run was evaluated on, and the metrics of their accuracies."""
    metrics = {int(match[1]): match[0] for match in logged(run, _MARKERS.pattern)}
    return dict(sorted(metrics.items()))


def moments(run: Run) -> dict[str, int | None]:
    """Steps by name, None for one that was not reached; the first and the last record are added by `recorded_at`."""
    if markers(run):
        return {f"90 % with m = {m}": GENERALISED.in_series(run.series(name)) for m, name in markers(run).items()}
    return {
        "99 % of the training set": MEMORISED.in_series(run.series(TRAIN)),
        "90 % of the test set": GENERALISED.in_series(run.series(TEST)),
    }


def recorded_at(run: Run, metric: str) -> dict[int, str]:
    """Steps of the records of a metric at or last before each moment, with the moments' names.

    Args:
        run: Its metrics.
        metric: Was logged at least once.
    """
    steps = [int(step) for step in run.series(metric).index]
    words_at: dict[int, list[str]] = {steps[0]: ["first"]}
    for words, step in moments(run).items():
        if step is not None:
            words_at.setdefault(max((s for s in steps if s <= step), default=steps[0]), []).append(words)
    words_at.setdefault(steps[-1], []).append("end")
    return {step: ", ".join(words) for step, words in sorted(words_at.items())}


MOMENTS_NOTE = (
    "Each row is the last record up to its moment, at the step given; moments that were never reached are left out."
)
