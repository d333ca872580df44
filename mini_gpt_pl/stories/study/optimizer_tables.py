"""Runs of different optimizers: the same window, the same step, the same loss (paper, Tables 9 and 10)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.comparison import ending
from mini_gpt_pl.report.settings import diverged, optimizer_label, progress
from mini_gpt_pl.report.sheet import NULLS, Cell, Row, Table, beside_nulls, number, tabulate, word
from mini_gpt_pl.report.subject import Subject, Window
from mini_gpt_pl.stories.study.beside import BOOK, COLUMN, control_of, notes_of_runs
from mini_gpt_pl.stories.study.learning_tables import LOSS
from mini_gpt_pl.stories.switches import P_OOD

STANDARD = (600, 2000)
"""Steps of the paper's window for comparisons."""
_WINDOWS = ((0, 400), (0, 600), (200, 600), (200, 1000), STANDARD, (1800, 2600), (2000, 2400))
_WHOLE_RUN = ("pc1", "pc1_unit", "k95_unit", "pc1_corrected", "cos_theta0", "persistence")


def optimizers(paths: Sequence[Subject], left_out: Sequence[str] = ()) -> list[Table]:
    """Tables 9 and 10: the standard window, the whole run, the paper's windows, and pairs at matched step and loss.

    Args:
        paths: Runs that differ in their optimizer, its settings, their length and seed.
        left_out: Names of runs that differ from one of them in beta2 only.
    """
    found = [_outcome(paths, left_out), _whole_run(paths), _windows(paths), _matched(paths)]
    return [table for table in found if table is not None]


def common_window(paths: Iterable[Subject]) -> tuple[int, int] | None:
    """Window that runs are compared in: the paper's, steps 600 to 2,000, if two of them were there.

    Else the same shares of the shortest; None if there are no such snapshots. Runs that diverged have no say.
    """
    paths = list(paths)
    paths = [path for path in paths if not diverged(path)] or paths
    if sum(set(STANDARD) <= set(path.trajectory.steps) for path in paths) > 1:
        return STANDARD
    common = sorted(set.intersection(*(set(path.trajectory.steps) for path in paths)))
    last = min(path.last_step for path in paths)
    lo, hi = (min(common, key=lambda step: abs(step - share * last), default=0) for share in (0.15, 0.5))
    return (lo, hi) if lo < hi else None


def window_note(paths: Iterable[Subject], chosen: tuple[int, int] | None) -> str | None:
    """Name the runs that have no path over a window; None if all have one."""
    if chosen is None:
        return None
    lacking = [_ending(path) for path in paths if path.window(*chosen) is None]
    return f"Without the window of steps {chosen[0]:,} to {chosen[1]:,}: {', '.join(lacking)}." if lacking else None


def _ending(path: Subject) -> str:
    how = f"diverged at step {progress(path)[0]:,}, " if diverged(path) else ""
    return f"{path.label} ({how}last snapshot at step {path.last_step:,})"


def identity(path: Subject) -> dict[str, Cell]:
    """Cells that say which run a row is."""
    found = path.facts
    cells = {"run": word(path.label), "optimizer": word(optimizer_label(found, beta2=True))}
    return cells | ({} if found["seed"] is None else {"seed": word(str(found["seed"]))})


def outcome(path: Subject) -> dict[str, Cell]:
    """Cells that say how a run ended: steps, loss, its lowest, best p_ood and where, and whether it diverged."""
    loss, p_ood = (path.series(name) for name in (LOSS, P_OOD))
    return {
        **ending(path),
        "final loss": number(float(loss.iloc[-1]) if len(loss) else None),
        "lowest loss": number(float(loss.min()) if len(loss) else None),
        "best p_ood": number(float(p_ood.max()) if len(p_ood) else None),
        "best p_ood at": number(float(p_ood.index[int(p_ood.argmax())]) if len(p_ood) else None, "{:,.0f}"),
    }


def window_cells(found: Window) -> dict[str, Cell]:
    """Cells of a window: its shape, each number beside its nulls, and how far decay alone goes."""
    k95, k99 = found.numbers["k95"], found.numbers["k99"]
    return {
        "rows": number(float(found.rows), "{:.0f}"),
        **{f"PC1, {name}": cell for name, cell in beside_nulls(found.numbers["pc1"], "{:.1%}").items()},
        "k95": _beside(k95),
        "k99": _beside(k99),
        "drift": number(found.numbers["drift"].value, "{:.2f}"),
        "drift, decaying walk": number(found.numbers["drift"].decay, "{:.2f}"),
        "drift, decay alone": number(found.decay, "{:.2f}"),
    }


def _beside(count: Calibrated) -> Cell:
    """A count with both nulls in brackets."""
    text = f"{count.value:.0f} ({count.walk:.0f}, {count.decay:.0f})"
    return Cell(text, count.value, {"walk": count.walk, "decaying walk": count.decay})


_WINDOW_NOTES = (
    "PC1, k95 and k99 of unit drifts from the window's first snapshot; in brackets those of the walk and of the "
    "decaying walk. Decay alone: how far weight decay by itself moves theta_0 over the window.",
    "PC1 and k95 depend on the number of rows, for the nulls as for the run: the published window has 28.",
)


def _outcome(paths: Sequence[Subject], left_out: Sequence[str]) -> Table:
    chosen = common_window(paths)
    settings = {path.label: control_of(path) for path in paths}
    rows, keys = [], ["loss_last", "p_ood_best"]
    for path in paths:
        cells = identity(path) | outcome(path)
        found = path.window(*chosen) if chosen else None
        cells |= window_cells(found) if found else {}
        shown = [("final loss", "loss_last", "{:.2f}"), ("best p_ood", "p_ood_best", "{:.3f}")]
        if chosen == STANDARD:
            shown += [("PC1", "pc1/600_2000", "{:.1%}"), ("k95", "k95/600_2000", "{:.0f}")]
            shown += [("drift", "drift/600_2000", "{:.1f}")]
        keys += [key for _, key, _ in shown]
        setting = settings[path.label]
        if setting is not None:
            cells |= {f"{c}, {COLUMN}": setting.only(key, form) for c, key, form in shown}
        rows.append(cells)
    where = f", window of steps {chosen[0]:,} to {chosen[1]:,}" if chosen else ""
    notes = [NULLS, *_WINDOW_NOTES, window_note(paths, chosen), *notes_of_runs(settings, keys)]
    if left_out:
        notes.append(f"Left out, as they differ from a run here in beta2 only: {', '.join(left_out)}.")
    if any("SGD" in str(path.facts["optimizer"]) for path in paths):
        notes.append(BOOK.notes["sgd"])
    return tabulate("table9_optimizers", f"Optimizers{where} (paper, Table 9)", rows, notes)


def _whole_run(paths: Sequence[Subject]) -> Table | None:
    rows: list[Row] = []
    for name in _WHOLE_RUN:
        words, form = statistics()[name].title, statistics()[name].format
        for path in paths:
            if found := path.calibrated():
                rows.append({"quantity": word(words), **identity(path), **beside_nulls(found[name], form)})
    notes = [
        NULLS,
        "Rows from the start of each run to its own end; runs of other lengths have other rows.",
    ]
    return tabulate("table9_whole_runs", "Optimizers, whole runs", rows, notes) if rows else None


def _windows(paths: Sequence[Subject]) -> Table | None:
    settings = {path.label: control_of(path) for path in paths}
    rows: list[Row] = []
    keys = []
    for lo, hi in _WINDOWS:
        for path in paths:
            found = path.window(lo, hi)
            if found is None:
                continue
            cells = identity(path) | {"window": word(f"{lo:,} to {hi:,}")} | window_cells(found)
            setting = settings[path.label]
            for column, form in (("PC1", "{:.1%}"), ("k95", "{:.0f}"), ("k99", "{:.0f}"), ("drift", "{:.2f}")):
                key = f"{column.lower()}/{lo}_{hi}"
                keys.append(key)
                if setting is not None:
                    cells |= {f"{column}, {COLUMN}": setting.only(key, form)}
            rows.append(cells)
    notes = [NULLS, *_WINDOW_NOTES, BOOK.notes["few_rows"], *notes_of_runs(settings, keys)]
    title = "Optimizers, the paper's windows (paper, Table 10)"
    return tabulate("table10_windows", title, rows, notes) if rows else None


# ----------------------------------------------------------------------------------------------- matched pairs


def _matched(paths: Sequence[Subject]) -> Table | None:
    rows: list[Row] = []
    first: dict[str, Subject] = {}
    left_out = [path.label for path in paths if diverged(path)]
    kept = [path for path in paths if path.label not in left_out]
    for path in kept:
        first.setdefault(optimizer_label(path.facts), path)
    for a, b in itertools.combinations(first.values(), 2):
        pair = f"{a.label} and {b.label}"
        common = sorted(set(a.trajectory.steps) & set(b.trajectory.steps))
        if len(common) > 1:
            rows += [_matched_row(pair, "step", path, common[-1]) for path in (a, b)]
        level = matched_level(a, b)
        if not math.isnan(level):
            rows += [_matched_row(pair, f"loss {level:.2f}", path, first_below(path, level)) for path in (a, b)]
    notes = [
        NULLS,
        "From the start of each run to the step shown. Matched step: the last snapshot that both have. Matched loss: "
        "the best validation loss of the worse of the two, where each first reaches it at an evaluation; the path is "
        "that of the snapshots up to there.",
        *_WINDOW_NOTES[:1],
        "Of several runs of one optimizer, the first that was named." if len(first) < len(kept) else None,
        f"Without what diverged: {', '.join(left_out)}." if left_out else None,
    ]
    return tabulate("table10_matched", "Optimizers at matched step and at matched loss", rows, notes) if rows else None


def matched_level(a: Subject, b: Subject) -> float:
    """Loss that both runs reach: the best of the worse one; NaN where one was never evaluated."""
    bests = [path.series(LOSS).min() for path in (a, b)]
    return math.nan if any(math.isnan(best) for best in bests) else float(max(bests))


def first_below(path: Subject, level: float) -> int:
    """First evaluation at which the validation loss is at or below a level that it reaches."""
    loss = path.series(LOSS)
    return int(loss.index[loss <= level][0])


def _matched_row(pair: str, matched: str, path: Subject, step: int) -> Row:
    trajectory = path.trajectory
    last = max(at for at in trajectory.steps if at <= step) if step >= trajectory.steps[0] else trajectory.steps[0]
    found = path.window(trajectory.steps[0], last)
    loss, p_ood = (path.series(name).get(step, math.nan) for name in (LOSS, P_OOD))
    cells = {"pair": word(pair), "matched": word(matched), "run": word(path.label), "step": word(f"{step:,}")}
    cells |= {"loss": number(float(loss)), "p_ood": number(float(p_ood))}
    return cells | (window_cells(found) if found else {})
