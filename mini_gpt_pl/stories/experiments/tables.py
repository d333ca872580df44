"""Tables of the experiments that train again from a run's checkpoints, each number beside its null and its error."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import permutation_test

from mini_gpt_pl.report.sheet import Cell, Row, Table, number, word
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.evaluation import binomial_error
from mini_gpt_pl.stories.experiments.records import Records
from mini_gpt_pl.stories.experiments.relaxation import Answers
from mini_gpt_pl.stories.study.words import laid_out

REACHED = 0.6
"""Accuracy that recovery is to reach, as published."""
_DRAWS = 2000


# ------------------------------------------------------------------------------------------------- recovery


def recovery_tables(run: Run) -> list[Table]:
    """How soon training brings the probe back, from peaks and troughs and from their nulls."""
    return [*_recovery(run, "recovery"), *_recovery(run, "recovery_original")]


def _recovery(run: Run, name: str) -> list[Table]:
    records = Records(run, name)
    rows: list[Row] = []
    for trial in records.trials.values():
        labels, answers = trial["labels"], [Answers(*row) for row in trial["answers"]]
        best = max(answers, key=lambda row: row.p_ood)
        reached = next((row.step for row in answers if row.p_ood >= REACHED), None)
        questions = int(records.settings["questions"])
        rows.append(
            {
                "start": word(str(labels["start"])),
                "peak": number(labels.get("peak"), "{:,.0f}"),
                "trough": number(labels.get("trough"), "{:,.0f}"),
                "before": number(answers[0].p_ood, "{:.3f}", binomial_error(answers[0].p_ood, questions)),
                f"steps to {REACHED:g}": word("never") if reached is None else number(float(reached), "{:,.0f}"),
                "highest": number(best.p_ood, "{:.3f}", binomial_error(best.p_ood, questions)),
                "at": number(float(best.step), "{:,.0f}"),
            }
        )
    return laid_out(name, rows, **records.settings)


# ---------------------------------------------------------------------------------------------------- depth


class Depth(NamedTuple):
    """How p_ood after training falls with the noise put into a checkpoint.

    Attributes:
        kind: peak, trough or last.
        step: Of the checkpoint.
        sigmas: Sizes of the noise, the first 0.
        restored: p_ood after training, one row a trial, one column a sigma.
        before: p_ood of the checkpoint itself.
    """

    kind: str
    step: int
    sigmas: tuple[float, ...]
    restored: np.ndarray
    before: float = math.nan

    @property
    def defined(self) -> bool:
        """Whether there is a depth: not where training loses half of the accuracy without any noise."""
        return not float(self.restored[:, 0].mean()) < self.before / 2

    def half(self, rows: Sequence[int] | None = None) -> float:
        """sigma_1/2: where the mean over trials falls below half of its value without noise, interpolated linearly.

        Args:
            rows: Trials to take the mean over, for a bootstrap; all for None.

        Returns:
            Infinity where it never does.
        """
        means = (self.restored if rows is None else self.restored[list(rows)]).mean(0)
        level = means[0] / 2
        for (low, before), (high, after) in itertools.pairwise(zip(self.sigmas, means, strict=True)):
            if after < level:
                return low + (high - low) * float((before - level) / (before - after))
        return math.inf

    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of sigma_1/2 over the trials."""
        count = len(self.restored)
        rng = np.random.Generator(np.random.Philox(key=0))
        drawn = [self.half(rng.integers(count, size=count).tolist()) for _ in range(_DRAWS if count > 1 else 0)]
        if not drawn:
            return math.nan, math.nan
        low, high = np.quantile(drawn, [0.025, 0.975], method="nearest")
        return float(low), float(high)


def depths(run: Run) -> list[Depth]:
    """Every checkpoint of the depth experiment, with the trials that all of its sizes of noise have."""
    by_place: dict[tuple[str, int], dict[int, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    before: dict[int, float] = {}
    for trial in Records(run, "depth").trials.values():
        labels = trial["labels"]
        place = by_place[labels["kind"], int(labels["step"])]
        place[int(labels["trial"])][float(labels["sigma"])] = Answers(*trial["answers"][-1]).p_ood
        if labels["sigma"] == 0:
            before[int(labels["step"])] = Answers(*trial["answers"][0]).p_ood
    found = []
    for (kind, step), rows in by_place.items():
        sigmas = tuple(sorted(set().union(*rows.values())))
        whole = [[row[sigma] for sigma in sigmas] for row in rows.values() if len(row) == len(sigmas)]
        if whole:
            found.append(Depth(kind, step, sigmas, np.array(whole), before.get(step, math.nan)))
    return sorted(found, key=lambda depth: (depth.kind != "peak", depth.kind != "trough", depth.step))


def depth_tables(run: Run) -> list[Table]:
    """How much noise a checkpoint's probe survives, peaks against troughs, and how far these lie from one another."""
    found = depths(run)
    if not found:
        return []
    rows: list[Row] = []
    for depth in found:
        half, (low, high) = depth.half(), depth.interval()
        means, spread = depth.restored.mean(0), depth.restored.std(0, ddof=1) if len(depth.restored) > 1 else None
        cells: dict[str, Cell] = {"checkpoint": word(f"{depth.kind} {depth.step:,}"), "before": number(depth.before)}
        for index, sigma in enumerate(depth.sigmas):
            error = None if spread is None else float(spread[index])
            cells[f"sigma {sigma:g}"] = number(float(means[index]), "{:.3f}", error)
        largest = depth.sigmas[-1]
        if depth.defined:
            cells["sigma 1/2"] = Cell(_size(half, largest), half if math.isfinite(half) else None)
        if depth.defined and not math.isnan(low):
            cells["95 %"] = Cell(f"{_size(low, largest)} to {_size(high, largest)}", None, {"low": low, "high": high})
        cells["trials"] = number(float(len(depth.restored)), "{:.0f}")
        rows.append(cells)
    tables = laid_out("depth", rows, [_peaks_against_troughs(found)], **Records(run, "depth").settings)
    return [*tables, *_distances(run, found)]


def _size(sigma: float, largest: float) -> str:
    return f"{sigma:.3f}" if math.isfinite(sigma) else f"> {largest:g}"


def _peaks_against_troughs(found: Sequence[Depth]) -> str | None:
    """Compare sigma_1/2 of both kinds by exchanging their names; what never falls counts with the largest sigma."""
    kinds = {
        kind: [min(depth.half(), depth.sigmas[-1]) for depth in found if depth.kind == kind and depth.defined]
        for kind in ("peak", "trough")
    }
    if min(map(len, kinds.values())) < 2:
        return None
    peaks, troughs = kinds["peak"], kinds["trough"]
    tested = permutation_test((peaks, troughs), lambda x, y: np.mean(x) - np.mean(y), permutation_type="independent")
    return (
        f"Peaks {np.mean(peaks):.3f}, troughs {np.mean(troughs):.3f} in the mean; by exchanging the names of "
        f"{len(peaks)} peaks and {len(troughs)} troughs a difference as large has probability {tested.pvalue:.2f}."
    )


def _distances(run: Run, found: Sequence[Depth]) -> list[Table]:
    """Distances between the checkpoints, beside all stretches of the path that are as long."""
    trajectory = run.trajectory
    steps, weights = trajectory.steps, np.tril(np.ones((len(trajectory), len(trajectory))))
    gram = weights @ trajectory.gram().numpy() @ weights.T
    squares = np.diag(gram)[:, None] + np.diag(gram) - 2 * gram
    distance = np.sqrt(np.maximum(squares, 0))
    chosen = [depth for depth in found if depth.step in steps]
    groups: dict[str, list[tuple[int, int]]] = {
        "peak to next peak": list(itertools.pairwise(d.step for d in chosen if d.kind == "peak")),
        "trough to next trough": list(itertools.pairwise(d.step for d in chosen if d.kind == "trough")),
        "peak to nearest trough": [
            (d.step, min(troughs, key=lambda step: abs(step - d.step)))
            for d in chosen
            if d.kind == "peak" and (troughs := [other.step for other in chosen if other.kind == "trough"])
        ],
    }
    rows: list[Row] = []
    for name, pairs in groups.items():
        for a, b in pairs:
            first, last = sorted((a, b))
            controls = [
                float(distance[i, j])
                for i, j in itertools.combinations(range(len(steps)), 2)
                if steps[j] - steps[i] == last - first and i > 0
            ]
            own = float(distance[steps.index(first), steps.index(last)])
            row = {
                "between": word(name),
                "from": number(float(a), "{:,.0f}"),
                "to": number(float(b), "{:,.0f}"),
                "distance": number(own, "{:.2f}"),
            }
            if len(controls) > 1:
                row["equal stretches"] = number(float(np.mean(controls)), "{:.2f}", float(np.std(controls, ddof=1)))
                row["rank"] = number(float(np.mean([c < own for c in controls])), "{:.2f}")
            rows.append(row)
    return laid_out("depth_distances", rows)


# --------------------------------------------------------------------------------------------------- blocks


def blocks_tables(run: Run) -> list[Table]:
    """What the probe loses when one block moves towards the trough, beside moves as long in random directions."""
    return [*_blocks(run, "blocks"), *_blocks(run, "blocks_original")]


def _blocks(run: Run, name: str) -> list[Table]:
    records = Records(run, name)
    start: dict[float, float] = {}
    moved: dict[tuple[float, float, str], dict[str, float]] = defaultdict(dict)
    for trial in records.trials.values():
        labels, value = trial["labels"], Answers(*trial["answers"][-1]).p_ood
        if labels["share"] == 0:
            start[labels["peak"]] = value
        else:
            moved[labels["peak"], labels["share"], labels["block"]][labels["direction"]] = value
    rows = [
        _block_row(place, values, start, int(records.settings["questions"]))
        for place, values in moved.items()
        if "switch" in values and len(values) > 2
    ]
    trained = records.settings["protocol"]["steps"] if rows else 0
    return laid_out(name, rows, after=f" after {trained} steps of training" if trained else "")


def _block_row(
    place: tuple[float, float, str], values: Mapping[str, float], start: Mapping[float, float], questions: int
) -> Row:
    peak, share, block = place
    others = np.array([value for kind, value in values.items() if kind != "switch"])
    own, mean, spread = values["switch"], float(others.mean()), float(others.std(ddof=1))
    noise = math.hypot(binomial_error(own, questions), binomial_error(mean, questions))
    error = math.hypot(spread * math.sqrt(1 + 1 / len(others)), noise)
    return {
        "peak": number(peak, "{:,.0f}"),
        "block": word(block),
        "share": number(share, "{:g}"),
        "at the peak": number(start.get(peak)),
        "towards the trough": number(own, "{:.3f}", binomial_error(own, questions)),
        "random": number(mean, "{:.3f}", spread),
        "difference": number(own - mean, "{:+.3f}"),
        "z": number((own - mean) / error if error else math.nan, "{:+.1f}"),
    }


EXPERIMENTS: Mapping[str, Callable[[Run], list[Table]]] = {
    "recovery": recovery_tables,
    "depth": depth_tables,
    "blocks": blocks_tables,
}
"""What makes each experiment's tables; none where it was not done."""


def experiment_tables(run: Run) -> list[Table]:
    """Every table that a run's experiments allow."""
    made: Any = EXPERIMENTS.values()
    return [table for make in made for table in make(run)]
