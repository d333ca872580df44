"""What a run of stories learned, as sentences, a table and a figure: losses, over-fitting, the probe's accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from mini_gpt_pl.figures.plotting import BACKBONE, GREY, RESIDUAL, WIDTH, legend_below, line
from mini_gpt_pl.report.published import Beside
from mini_gpt_pl.report.sheet import Row, Table, number, word
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.words import laid_out, numbers
from mini_gpt_pl.stories.switches import P_OOD

LOSS, TRAIN, P_IN = "val/loss", "train/lm_loss", "probe/p_in"


@dataclass(frozen=True)
class Fit:
    """Where validation and training loss part.

    Args:
        best: Lowest validation loss.
        best_step: Its step.
        last: Validation loss at the end.
        train: Mean training loss since the evaluation before the last; NaN if it was not logged.
        parted: First evaluation from which on validation lies above training loss; None where it does not at the end.
    """

    best: float
    best_step: int
    last: float
    train: float
    parted: int | None

    @property
    def rise(self) -> float:
        """Validation loss at the end above its lowest."""
        return self.last - self.best

    @property
    def overfits(self) -> bool:
        """Whether validation loss has risen by more than 1 % of its lowest: less is noise of single evaluations."""
        return self.rise > 0.01 * abs(self.best)


def fit_of(run: Run) -> Fit | None:
    """Compare validation loss with the mean training loss of the steps since the evaluation before; None without.

    Both in nats per token.
    """
    loss, train = run.series(LOSS), run.series(TRAIN)
    if loss.empty:
        return None
    means = pd.Series(math.nan, index=loss.index)
    before = -1
    for step in loss.index:
        means.loc[step] = train[(train.index > before) & (train.index <= step)].mean()
        before = step
    parted = None
    for step in reversed(loss.index):
        if not loss[step] > means[step]:
            break
        parted = int(step)
    best = int(loss.argmin())
    return Fit(float(loss.iloc[best]), int(loss.index[best]), float(loss.iloc[-1]), float(means.iloc[-1]), parted)


def learned(run: Subject) -> Iterator[str]:
    """Best and last validation loss and p_ood, one sentence each."""
    if (fit := fit_of(run)) is not None:
        end = f"it has risen by {fit.rise:.3f} since" if fit.rise > 0 else "the last evaluation"
        end += ": over-fitting" if fit.overfits else ""
        yield f"Validation loss was lowest, {fit.best:.3f} nats per token, at step {fit.best_step:,} ({end})."
    if len(retrieved := run.series(P_OOD)):
        best = int(retrieved.index[int(retrieved.argmax())])
        yield (
            f"Retrieval at long gaps, p_ood, was highest, {retrieved[best]:.3f}, at step {best:,}, "
            f"and is {retrieved.iloc[-1]:.3f} at the end."
        )


def table(run: Subject, beside: Beside) -> list[Table]:
    """Loss, over-fitting and the probe's accuracy: best, and at the end."""
    fit = fit_of(run)
    measured: dict[str, tuple[float, float]] = {}  # each with its step
    if fit is not None:
        measured = {
            "best": (fit.best, fit.best_step),
            "last": (fit.last, run.series(LOSS).index[-1]),
            "rise": (fit.rise, math.nan),
            "train": (fit.train, math.nan),
            "gap": (fit.last - fit.train, math.nan),
            "parted": (math.nan if fit.parted is None else fit.parted, math.nan),
        }
    for metric in (P_OOD, P_IN):
        if len(values := run.series(metric)):
            name, best = metric.rpartition("/")[2], int(values.argmax())
            measured[f"{name}_best"] = float(values.iloc[best]), int(values.index[best])
            measured[f"{name}_last"] = float(values.iloc[-1]), int(values.index[-1])
    shown = [one for one in numbers("learning") if one.key in measured and not math.isnan(measured[one.key][0])]
    rows: list[Row] = []
    for one in shown:
        value, step = measured[one.key]
        row = {"quantity": word(one.words), "measured": number(value, one.form), "at step": number(step, "{:,.0f}")}
        rows.append({**row, **beside.cell(one.published_key, one.form)})
    published = beside.notes(*(one.published_key for one in shown))
    return laid_out("learning", rows, published, overfit=fit if fit is not None and fit.overfits else None)


def figure(run: Run) -> Figure:
    """Loss on the left, probe accuracy on the right, against the optimizer step.

    Where the validation loss has its minimum is marked: what it rises afterwards is over-fitting.
    """
    drawn = Figure(figsize=(WIDTH, 3.6))
    left, right = drawn.subplots(1, 2)
    line(left, run.series(TRAIN), "training, LM", GREY, lw=1)
    line(left, run.series("train/probe_loss"), "training, probe", "#e5b8a0", lw=1)
    validation = run.series(LOSS)
    line(left, validation, "validation, LM", BACKBONE, marker="o", ms=3)
    if (fit := fit_of(run)) is not None:
        best, label = fit.best_step, f"best validation: step {fit.best_step:,}"
        if fit.overfits:
            over = f"over-fitting: {fit.rise:+.2f} since"
            left.axvspan(best, int(validation.index[-1]), color=RESIDUAL, alpha=0.07, lw=0, label=over)
            right.axvspan(best, int(validation.index[-1]), color=RESIDUAL, alpha=0.07, lw=0)
        left.plot([best], [fit.best], "*", ms=11, color=BACKBONE, mec="white", mew=0.6, label=label)
    left.set(xlabel="step", ylabel="nats per token", title="Loss")
    left.set_ylim(bottom=0)
    line(right, run.series(P_IN), "$p_{in}$, short gap", BACKBONE, marker="o", ms=3)
    line(right, run.series(P_OOD), "$p_{ood}$, long gap", RESIDUAL, marker="o", ms=3)
    right.set(xlabel="step", ylabel="exact match", title="Key retrieval", ylim=(-0.03, 1.03))
    Subject.of(run).mark(right, left)
    for axes in (left, right):
        legend_below(axes, 1)
    return drawn
