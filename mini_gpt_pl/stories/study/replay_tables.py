"""Tables of what a replay alone measures at stored checkpoints: signed bias, interference, curvature of blocks."""

from __future__ import annotations

import math

from mini_gpt_pl.report.probe_tables import HERE, cosine_head, event_cell, interference_note
from mini_gpt_pl.report.published import Beside
from mini_gpt_pl.report.sheet import Row, Table, number, tabulate, word
from mini_gpt_pl.report.subject import Subject, dig, estimate


def replay_tables(subject: Subject, beside: Beside) -> list[Table]:
    """Make every table that a run's replay allows; each stands for the live one of its name."""
    made = (_signed_bias, _interference, _fisher_blocks)
    return [table for make in made for table in make(subject, beside)]


def _signed_bias(subject: Subject, beside: Beside) -> list[Table]:
    if not any(record.get("bias") for record in subject.replay.values()):
        return []
    labels, form = subject.labels, "{:+.4f}"
    rows: list[Row] = []
    sums, chances = dict.fromkeys(labels, 0.0), dict.fromkeys(labels, 0.0)
    for step, record in subject.replay.items():
        cells = {label: estimate(dig(record, "bias", label)) for label in labels}
        for label, (value, _) in cells.items():
            sums[label] += 0.0 if math.isnan(value) else value
            length = estimate(dig(record, "gradient", "combined", label, "norm"))[0]
            chances[label] += (0.0 if math.isnan(length) else length) * subject.floor(label) / len(subject.replay)
        row = {"step": word(f"{step:,}"), "event": event_cell(record), "source": HERE}
        rows.append({**row, **{label: number(value, form, spread) for label, (value, spread) in cells.items()}})
    summed = {label: number(value, form) for label, value in sums.items()}
    rows.append({"step": word("sum B"), "source": HERE, **summed})
    by_chance = {label: number(value or math.nan, "{:.4f}") for label, value in chances.items()}
    rows.append({"step": word("|b| by chance"), "source": HERE, **by_chance})
    keys = [f"bias_sum/{label}" for label in labels]
    prefixes = {f"{step:,}": f"bias/{step}" for step in beside.steps("bias")} | {"sum B": "bias_sum"}
    for name, prefix in prefixes.items():
        keys += [f"{prefix}/{label}" for label in labels]
        shown = {label: beside.number(f"{prefix}/{label}", form) for label in labels}
        if any(cell.value is not None for cell in shown.values()):
            rows.append({"step": word(name), "source": word(beside.column), **shown})
    notes = [
        "b = <g, v_b> of single-batch gradients of the combined loss, the group's own whole-run v_b, a(T) > 0, mean ± "
        "standard deviation over the same fixed batches at every checkpoint; B is its sum over these checkpoints only.",
        "By chance: the mean |<g, w>| of one batch and a random direction w, ||g|| sqrt(2 / (pi D)), averaged over the "
        "checkpoints. Negative b: the gradient step goes along +v_b.",
    ]
    return [beside.table("signed_bias", "Signed gradient bias along the backbone", rows, notes, keys)]


def _interference(subject: Subject, beside: Beside) -> list[Table]:
    rows: list[Row] = []
    for step, found in subject.replayed_at("interference", subject.trunk).items():
        value, spread = estimate(found)
        if math.isnan(value):
            continue
        record = subject.replay[step]
        row = {"steps": word(f"{step:,}"), "event": event_cell(record)}
        row[cosine_head(subject, *subject.backdrop.losses)] = number(value, "{:+.4f}", spread)
        batches = dig(record, "settings", "batches")
        if batches and spread > 0:
            row["/ standard error"] = number(value / (spread / math.sqrt(batches)), "{:+.1f}")
        rows.append(row | {"/ floor": number(abs(value) / subject.floor(subject.trunk), "{:.0f}")})
    notes = [interference_note(subject, "batches")]
    return [beside.table("interference", "Interference of the two objectives", rows, notes)] if rows else []


def _fisher_blocks(subject: Subject, beside: Beside) -> list[Table]:
    rows: list[Row] = []
    for label in subject.labels:
        found = subject.replayed_at("fisher", label, "anisotropy")
        cells = {
            f"step {step:,}": number(*_spread(found.get(step))) for step in subject.replayed_at("fisher", subject.trunk)
        }
        if any(cell.value is not None for cell in cells.values()):
            rows.append({"group": word(label), **cells})
    notes = ["q(v_b) over the mean of all directions, each group with its own v_b, ± standard error; 1 by chance."]
    title = "Fisher anisotropy along the backbone, block by block"
    return [tabulate("fisher_blocks", title, rows, notes)] if rows else []


def _spread(found: object) -> tuple[float, str, float, str]:
    value, error = estimate(found)
    return value, "{:.1f}", error, "se"
