"""What a replay alone measures at stored checkpoints: signed bias, interference, curvature of blocks, logit lens.

Each of these tables stands for the live one of its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import NULL, WIDTH, palette
from mini_gpt_pl.report.probe_tables import HERE, cosine_head, event_cell, interference_note
from mini_gpt_pl.report.published import Beside
from mini_gpt_pl.report.sheet import Row, Table, number, word
from mini_gpt_pl.report.subject import Subject, dig, estimate
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.words import laid_out


def tables(subject: Subject, beside: Beside) -> list[Table]:
    """Make every table that a run's replay allows."""
    bias = signed_bias(subject, beside) if any(subject.replayed_at("bias").values()) else []
    return bias + interference(subject) + fisher_blocks(subject) + logit_lens(subject)


# -------------------------------------------------------------------------------------------------- signed bias


def signed_bias(subject: Subject, beside: Beside) -> list[Table]:
    """Signed projection of batch gradients on each group's own v_b, its sum, and what chance gives."""
    labels, form, records = subject.labels, "{:+.4f}", subject.replay
    biases = {step: {one: estimate(dig(record, "bias", one)) for one in labels} for step, record in records.items()}
    lengths = {
        label: [estimate(dig(record, "gradient", "combined", label, "norm"))[0] for record in records.values()]
        for label in labels
    }
    rows: list[Row] = [
        {
            "step": word(f"{step:,}"),
            "event": event_cell(records[step]),
            "source": HERE,
            **{label: number(value, form, spread) for label, (value, spread) in cells.items()},
        }
        for step, cells in biases.items()
    ]
    sums = {label: number(_sum(cells[label][0] for cells in biases.values()), form) for label in labels}
    rows.append({"step": word("sum B"), "source": HERE, **sums})
    by_chance = {
        label: number(_sum(x * subject.floor(label) / len(records) for x in of_label) or math.nan, "{:.4f}")
        for label, of_label in lengths.items()
    }
    rows.append({"step": word("|b| by chance"), "source": HERE, **by_chance})
    keys = [f"bias_sum/{label}" for label in labels]
    prefixes = {f"{step:,}": f"bias/{step}" for step in beside.steps("bias")} | {"sum B": "bias_sum"}
    for name, prefix in prefixes.items():
        keys += [f"{prefix}/{label}" for label in labels]
        shown = {label: beside.number(f"{prefix}/{label}", form) for label in labels}
        if any(cell.value is not None for cell in shown.values()):
            rows.append({"step": word(name), "source": word(beside.column), **shown})
    return laid_out("signed_bias", rows, beside.notes(*keys))


def _sum(values: Iterable[float]) -> float:
    return sum((value for value in values if not math.isnan(value)), 0.0)


def signed_bias_figure(run: Run) -> Figure:
    """Signed projection of batch gradients on each group's own v_b at replayed checkpoints, and its running sum.

    Raises:
        UserError: The run was not replayed.
    """
    run = Subject.of(run)
    biases = {step: record for step, record in run.replayed_at("bias").items() if record}
    if not biases:
        raise UserError(f"the run {run.path} has no replay: replay it for the signed bias of its gradients")
    figure = Figure(figsize=(WIDTH, 3.8))
    left, right = figure.subplots(1, 2)
    groups = [name for name in run.trajectory.groups if all(name in row for row in biases.values())]
    steps = list(biases)
    for name, colour in zip(groups, palette(len(groups)), strict=True):
        mean, spread = (np.array([estimate(row[name])[k] for row in biases.values()]) for k in (0, 1))
        left.plot(steps, mean, "o-", ms=3, color=colour, label=name)
        left.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.06, lw=0)
        right.plot(steps, np.cumsum(mean), "o-", ms=3, color=colour)
    for axes, label in ((left, "$b_l=\\langle g,v_b\\rangle$, mean and sd"), (right, "$B_l$, running sum")):
        axes.axhline(0, color=NULL, lw=1.2, ls=":")
        axes.set(xlabel="step")
        axes.set_title(label, fontsize=9)
    run.mark(left, right)
    left.plot([], [], ":", color=NULL, lw=1.2, label="no bias")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


# -------------------------------------------------------------------------------------- interference, curvature


def interference(subject: Subject) -> list[Table]:
    """Cosine of the gradients of the two objectives, in units of its standard error and of the noise floor."""
    rows: list[Row] = []
    for step, pair in subject.replayed_at("interference", subject.trunk).items():
        value, spread = estimate(pair)
        if math.isnan(value):
            continue
        record = subject.replay[step]
        row = {"steps": word(f"{step:,}"), "event": event_cell(record)}
        row[cosine_head(subject, *subject.backdrop.losses)] = number(value, "{:+.4f}", spread)
        batches = dig(record, "settings", "batches")
        if batches and spread > 0:
            row["/ standard error"] = number(value / (spread / math.sqrt(batches)), "{:+.1f}")
        rows.append(row | {"/ floor": number(abs(value) / subject.floor(subject.trunk), "{:.0f}")})
    return laid_out("interference", rows, note=interference_note(subject, "batches"))


def fisher_blocks(subject: Subject) -> list[Table]:
    """Curvature along the backbone over the mean of all directions, block by block."""
    rows: list[Row] = []
    for label in subject.labels:
        ratios = subject.replayed_at("fisher", label, "anisotropy")
        steps = subject.replayed_at("fisher", subject.trunk)
        pairs = {f"step {step:,}": estimate(ratios.get(step)) for step in steps}
        cells = {head: number(value, "{:.1f}", error, "se") for head, (value, error) in pairs.items()}
        if any(cell.value is not None for cell in cells.values()):
            rows.append({"group": word(label), **cells})
    return laid_out("fisher_blocks", rows)


# --------------------------------------------------------------------------------------------------- logit lens


def logit_lens(subject: Subject) -> list[Table]:
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
    codewords = _codewords(subject)
    return laid_out("logit_lens", rows, codewords=codewords, guess=1 / codewords if codewords else None)


def logit_lens_figure(run: Run) -> Figure:
    """Probe accuracy read off after the embedding and after each block, at replayed checkpoints.

    Raises:
        UserError: No replay read the logit lens.
    """
    records = {step: record for step, record in run.replayed.items() if record.get("logit_lens")}
    if not records:
        raise UserError(f"the run {run.path} has no logit lens: replay it")
    figure = Figure(figsize=(WIDTH, 3.8))
    sides = figure.subplots(1, 2, sharey=True)
    shades = palette(len(records))
    for axes, key, title in zip(sides, ("in", "ood"), ("$p_{in}$, short gap", "$p_{ood}$, long gap"), strict=True):
        for (step, record), shade in zip(records.items(), shades, strict=True):
            event, values = record.get("event") or "", record["logit_lens"][key]
            style = {"peak": "^-", "trough": "v--"}.get(event, "o:")
            label = f"{step:,}{event and f', {event}'}"
            axes.plot(range(len(values)), values, style, color=shade, ms=4, lw=1, label=label)
        if codewords := _codewords(run):
            axes.axhline(1 / codewords, color=NULL, ls=":", lw=1, label=f"chance, 1/{codewords}")
        axes.set(xlabel="after block (0: embedding)", title=title, ylim=(-0.03, 1.03))
        axes.xaxis.get_major_locator().set_params(integer=True)
    sides[0].set_ylabel("exact match")
    figure.legend(*sides[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _codewords(run: Run) -> Any:
    settings: Mapping[str, Any] = run.settings
    return dig(settings, "data", "probe", "n_codewords")
