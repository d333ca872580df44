"""Tables of one run from what its probes measured: signed bias, Fisher curvature, alignment, interference.

Curvature and alignment are those of a replay, with the whole run's backbone at stored checkpoints; where a run was not
replayed, what was logged while it ran, with the backbone of the past, stands in, and a note says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from mini_gpt_pl.geometry.vectors.alignment import noise_floor
from mini_gpt_pl.metrics.registry import beside as null_of
from mini_gpt_pl.metrics.registry import data, find, title_of
from mini_gpt_pl.report.path_tables import PHASES, laid_out, phase_of
from mini_gpt_pl.report.published import Beside
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, word
from mini_gpt_pl.report.statistics import mean
from mini_gpt_pl.report.subject import Estimate, Subject, dig, estimate

_PAST = "Measured while the run went on, with the v_b of the snapshots before; the run has not been replayed."
HERE = word("this run")
"""Source of a row that stands beside published ones."""
_NOTHING: Estimate = (math.nan, math.nan)


def probe_tables(subject: Subject, beside: Beside) -> list[Table]:
    """Make every table of a run's probes that its metrics or its replay allow."""
    if not (subject.moved and subject.has_metrics):
        return []
    made = (signed_bias, fisher, gradient_alignment, interference, live_probes)
    return [table for make in made for table in make(subject, beside)]


def live_probes(subject: Subject, beside: Beside) -> list[Table]:
    """What the probes logged during the run: means over it, each beside its null and in units of it."""
    rows: list[Row] = []
    templates = [f"{family}/{name}" for family, names in data()["live"].items() for name in names]
    for name in (template.replace("{whole}", subject.trunk) for template in templates):
        values = subject.series(name).abs()
        if not len(values):
            continue
        expected, middle = _expected(subject, name), float(values.mean())
        ends = {"mean": middle, "first": float(values.iloc[0]), "last": float(values.iloc[-1])}
        row = {"quantity": word(title_of(name)), **{head: _shown(value, "{:.3g}") for head, value in ends.items()}}
        row["null"] = word("-") if expected is None else _shown(expected, "{:.3g}")
        row["mean / null"] = word("-") if expected is None else _shown(middle / expected, "{:.2f}")
        rows.append(row | {"times measured": _shown(len(values), "{}")})
    return laid_out(beside, "live_probes", rows)


def _shown(value: float, form: str) -> Cell:
    """A number of which the CSV has the digits that are shown."""
    return Cell(form.format(value), float(form.format(value)))


def _expected(run: Subject, name: str) -> float | None:
    """What chance gives for the absolute value of a metric: noise floor, a number, the mean of its null, or None."""
    metric = find(name)
    if metric is None:
        return None
    if metric.floor:
        return noise_floor(run.trajectory.dim)
    null = null_of(name, list(map(str, run.metrics.columns)))
    return metric.level if null is None or metric.level is not None else float(run.series(null).abs().mean())


def event_cell(record: Mapping[str, object]) -> Cell:
    """What happened at a replayed checkpoint."""
    return word(str(record.get("event") or "-"))


def signed_bias(subject: Subject, beside: Beside) -> list[Table]:
    """Signed projection b of training gradients on the past backbone, per group, and its running sum B."""
    rows: list[Row] = []
    keys = []
    for label in subject.labels:
        values, total, cosines = (
            subject.series(f"alignment/{label}/{name}") for name in ("bias", "bias_sum", "gradient")
        )
        if values.empty:
            continue
        cells = {f"b, {phase}": _of_phase(subject, values, phase, "{:+.4f}") for phase in PHASES}
        lengths = (values / cosines).abs()  # ||g|| = <g, v_b> / cos
        chance = float(lengths[lengths.notna()].mean()) * subject.floor(label)
        keys.append(f"bias_sum/{label}")
        rows.append(
            {
                "group": word(subject.in_words(label)),
                **cells,
                "sum B": number(float(total.iloc[-1]) if len(total) else None, "{:+.3f}"),
                "|b| by chance": number(chance, "{:.4f}"),
                **beside.cell(keys[-1], "{:+.2f}", "B, "),
            }
        )
    return laid_out(beside, "signed_bias_live", rows, keys, past=_PAST)


def _of_phase(subject: Subject, values: pd.Series[float], phase: str, form: str) -> Cell:
    """Mean and standard deviation of a metric over one phase of the run."""
    inside = values[[phase_of(float(step), subject.length) == phase for step in values.index]]
    return number(float(inside.mean()), form, float(inside.std()))


DIRECTIONS = {"backbone": "q(v_b)", "switch": "q(v_sw)", "pc2": "q(PC2)", "theta0": "q(theta_0)"}
"""Directions whose curvature is measured, and heads of their columns."""


def fisher_survey(subject: Subject) -> dict[int, dict[str, Estimate]]:
    """Collect Fisher quantities of the whole selection by step, replayed ones if there are any, else the live ones.

    Returns:
        Per step: `q_<direction>`, `trace`, `anisotropy`, `lambda_1`, `overlap` and `random`, each with its standard
        error; what was not measured is NaN.
    """
    replayed = subject.replayed_at("fisher", subject.trunk)
    if replayed:
        return {
            step: {f"q_{name}": estimate(dig(record, "q", name)) for name in dig(record, "q") or ()}
            | {name: estimate(dig(record, name)) for name in ("trace", "anisotropy", "overlap", "random")}
            | {"lambda_1": (estimate(dig(record, "lambda_1"))[0], estimate(dig(record, "lambda_1_se"))[0])}
            for step, record in replayed.items()
        }
    prefix = f"fisher/{subject.trunk}/batch_mean/"
    found: dict[int, dict[str, Estimate]] = {}
    for metric in map(str, subject.metrics if subject.has_metrics else ()):
        name = metric.removeprefix(prefix)
        if metric.startswith(prefix) and not name.endswith("_se"):
            for step, value in subject.estimates((), metric).values.items():
                found.setdefault(step, {})[name] = value
    for row in found.values():
        if "lambda_1" in row:
            row["lambda_1"] = (row["lambda_1"][0], math.nan)  # the table has the error of replayed batches only
        if "trace" in row and "q_backbone" in row:
            row["random"] = ((row["trace"][0] - row["q_backbone"][0]) / max(1, subject.trajectory.dim - 1), math.nan)
    return {step: row for step, row in found.items() if "trace" in row}


def fisher(subject: Subject, beside: Beside) -> list[Table]:
    """Curvature of the empirical Fisher along directions, and its anisotropy."""
    live = not subject.replayed_at("fisher", subject.trunk)
    rows: list[dict[str, Cell]] = []
    for step, estimates in fisher_survey(subject).items():
        shown = {f"q_{name}": (head, "{:.1e}") for name, head in DIRECTIONS.items()} | {
            "random": ("random", "{:.1e}"),
            "anisotropy": ("anisotropy", "{:.1f}"),
            "lambda_1": ("lambda_1", "{:.1e}"),
        }
        row = {"step": word(f"{step:,}")} | ({} if live else {"event": event_cell(subject.replay[step])})
        row["source"] = HERE
        for name, (head, form) in shown.items():
            value, error = estimates.get(name, _NOTHING)
            row[head] = number(value, form, error, "se")
        row["|<u_1, v_b>|"] = number(abs(estimates.get("overlap", _NOTHING)[0]), "{:.1e}")
        rows.append(row | {"by chance": number(subject.floor(subject.trunk), "{:.1e}")})
    if not rows:
        return []
    keys, heads = ["overlap"], {"anisotropy": "anisotropy"}
    heads |= {name: DIRECTIONS[name] for name in ("backbone", "switch", "pc2")}
    for step in beside.steps("fisher"):
        forms = {name: "{:.1f}" if name == "anisotropy" else "{:.1e}" for name in heads}
        cells = {head: beside.number(f"fisher/{step}/{name}", forms[name]) for name, head in heads.items()}
        keys += [f"fisher/{step}/{name}" for name in heads]
        rows.append({"step": word(f"{step:,}"), "source": word(beside.column), **cells})
    return laid_out(beside, "fisher", rows, keys, past=_PAST if live else "")


def gradient_alignment(subject: Subject, beside: Beside) -> list[Table]:
    """|cos| of single-batch gradients with the backbone, beside the noise floor."""
    rows: list[dict[str, Cell]] = []
    live, measured = True, False
    for label in subject.labels:
        floor = subject.floor(label)
        row = {"group": word(subject.in_words(label)), "floor": number(floor, "{:.1e}")}
        for metric, (part, words) in subject.gradient_parts.items():
            found = subject.estimates(("gradient", part, label, "abs_cos"), f"alignment/{label}/{metric}")
            live &= found.live or not found.values
            values = [abs(value) for value, _ in found.values.values()]
            value = mean(values) if not found.live else float(pd.Series(values, dtype=float).mean())
            measured |= not math.isnan(value)
            row[f"{words}, |cos|"] = number(value, "{:.4f}")
            row[f"{words}, / floor"] = number(value / floor, "{:.1f}")
        rows.append(row | beside.cell("gradient/combined" if label != subject.trunk else "", "{:.3f}"))
    if not measured:
        return []
    over = ", over the measured steps" if live else f" over batches, averaged over {len(subject.replay)} checkpoints"
    past = _PAST if live else ""
    return laid_out(beside, "gradient_alignment", rows, ["gradient/combined"], over=over, past=past)


def interference(subject: Subject, beside: Beside) -> list[Table]:
    """Cosines of the gradients of every two parts of the loss, whole selection, by phase, beside the noise floor."""
    pairs = _loss_pairs(subject)
    rows: list[Row] = []
    for phase in PHASES:
        row: dict[str, Cell] = {}
        for name, pair in pairs.items():
            cell = _of_phase(subject, subject.series(name), phase, "{:+.4f}")
            if isinstance(cell.value, float):
                over = "/ floor" if len(pairs) == 1 else f"/ floor, {' and '.join(_words(subject, *pair))}"
                row |= {cosine_head(subject, *pair): cell}
                row |= {over: number(abs(cell.value) / subject.floor(subject.trunk), "{:.0f}")}
        if row:
            rows.append({"steps": word(phase), **row})
    if not rows:
        return []
    title = "Interference of the tasks" if len(pairs) > 1 else "Interference of the two objectives"
    return [beside.table("interference", title, rows, [interference_note(subject, "measured steps")])]


def interference_note(subject: Subject, over: str) -> str:
    """Say what an interference, a mean over such steps or batches, stands beside."""
    return (
        f"Mean ± standard deviation over {over}; floor: sqrt(2 / (pi D)) = {subject.floor(subject.trunk):.1e}, the "
        "mean |cos| of independent isotropic vectors, a low bar: gradients of one batch differ from those of another "
        "by far more, as the standard deviation says."
    )


def _loss_pairs(subject: Subject) -> dict[str, list[str]]:
    """Metrics of the whole selection's interference, and the two losses of each."""
    prefix = f"alignment/{subject.trunk}/"
    found = {name: name.removeprefix(prefix).split("_vs_") for name in map(str, subject.metrics.columns)}
    return {name: pair for name, pair in found.items() if name.startswith(prefix) and len(pair) == 2}


def _words(subject: Subject, *losses: str) -> list[str]:
    return [subject.backdrop.losses.get(name, name) for name in losses]


def cosine_head(subject: Subject, *losses: str) -> str:
    """Head of a column of cosines between the gradients of losses."""
    return f"cos({', '.join(f'g_{name}' for name in _words(subject, *losses))})"
