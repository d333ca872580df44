"""What a run of stories learned: loss and over-fitting, the probe's accuracy, and where in the network the key is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mini_gpt_pl.report import learning as general
from mini_gpt_pl.report.learning import Fit
from mini_gpt_pl.report.probe_tables import event_cell
from mini_gpt_pl.report.published import Beside
from mini_gpt_pl.report.sheet import Row, Table, number, tabulate, word
from mini_gpt_pl.report.subject import Subject, dig, estimate
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.switches import P_OOD

LOSS, TRAIN, P_IN = "val/loss", "train/lm_loss", "probe/p_in"


def fit_of(run: Run) -> Fit | None:
    """Where validation and training loss of a run part, in nats per token."""
    return general.fit_of(run, LOSS, TRAIN)


def learned(run: Subject) -> tuple[str, ...]:
    """Best and last validation loss and p_ood, one sentence each."""
    return tuple(_sentences(run))


def _sentences(run: Subject) -> Iterator[str]:
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


def learning(run: Subject, beside: Beside) -> list[Table]:
    """Loss, over-fitting and the probe's accuracy: best, and at the end."""
    rows: list[Row] = []

    def add(words: str, value: float, form: str, key: str = "", step: float = math.nan) -> None:
        if not math.isnan(value):
            row = {"quantity": word(words), "measured": number(value, form), "at step": number(step, "{:,.0f}")}
            rows.append({**row, **beside.cell(key, form)})
            keys.append(key)

    keys: list[str] = []
    fit = fit_of(run)
    if fit is not None:
        add("validation loss, lowest (nats per token)", fit.best, "{:.3f}", "loss_best", fit.best_step)
        add("validation loss at the end", fit.last, "{:.3f}", "loss_last", run.series(LOSS).index[-1])
        add("rise since its lowest", fit.rise, "{:+.3f}")
        add("training loss on language at the end", fit.train, "{:.3f}")
        add("validation minus training loss at the end", fit.last - fit.train, "{:+.3f}")
        parted = math.nan if fit.parted is None else fit.parted
        add("step from which validation stays above training loss", parted, "{:,.0f}")
    for metric, words, key in ((P_OOD, "p_ood", "p_ood"), (P_IN, "p_in", "p_in")):
        values = run.series(metric)
        if len(values):
            best = int(values.argmax())
            add(f"{words}, highest", float(values.iloc[best]), "{:.3f}", f"{key}_best", int(values.index[best]))
            add(f"{words} at the end", float(values.iloc[-1]), "{:.3f}", f"{key}_last", int(values.index[-1]))
    if not rows:
        return []
    notes = [
        "Training loss: mean over the logged steps since the evaluation before, without the probe's share.",
        f"Over-fitting: validation loss has risen by {fit.rise:.2f} nats per token since step {fit.best_step:,}, while "
        f"training loss went on to {fit.train:.2f}; what the run does later, it does on stories that it knows."
        if fit is not None and fit.overfits
        else None,
        *beside.notes(*keys),
    ]
    return [tabulate("learning", "Learning and over-fitting", rows, notes)]


def logit_lens(subject: Subject, beside: Beside) -> list[Table]:
    """Probe accuracy read off after the embedding and after each block, at the replayed checkpoints."""
    rows: list[Row] = []
    for step, record in subject.replay.items():
        for name in ("ood", "in"):
            layers = dig(record, "logit_lens", name)
            if isinstance(layers, Sequence) and layers:
                heads = ["embedding", *(f"block {index}" for index in range(len(layers) - 1))]
                shown = {head: number(estimate(value)[0]) for head, value in zip(heads, layers, strict=True)}
                row = {"step": word(f"{step:,}"), "event": event_cell(record), "set": word(f"p_{name}")}
                rows.append({**row, **shown})
    codewords = dig(subject.settings, "data", "probe", "n_codewords")
    notes = [
        "Exact match of the final LayerNorm and head applied to each layer's output.",
        f"Guessing one of {codewords} codewords gives {1 / codewords:.4f}." if codewords else None,
    ]
    return [tabulate("logit_lens", "Logit lens: where in the network the key is", rows, notes)] if rows else []
