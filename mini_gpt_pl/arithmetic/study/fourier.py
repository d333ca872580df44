"""Tables of Fourier power: how much of each product of weights lies at one frequency, and how much by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mini_gpt_pl.arithmetic.study.moments import MOMENTS_NOTE, logged, recorded_at
from mini_gpt_pl.report.families import names
from mini_gpt_pl.report.settings import facts, plain
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate, word
from mini_gpt_pl.runs.folder import Run

_LOGGED = r"fourier/(\w+)/(.+)/largest"
_PRODUCTS = {"query": "E W_Q'", "value_output": "E W_V' W_O'"}
_SHARE = "{:.1%}"
_NOTE = (
    "Share of the squared length of a table of residues at its strongest frequency k, over the characters of the "
    "additive group or, along powers of a generator, of the multiplicative one. By chance: median, and what 95 % stay "
    "under, of the largest share of a table with the same singular values whose residues are turned at random; the "
    "mean of a single frequency is {chance}. Effective: 1 / sum of squared shares."
)
_CONTROL = "The axis of the other group is a control: an addition has no reason to be sparse in it, nor has a product."


def fourier_table(run: Run) -> list[Table]:
    """Strongest frequency of every table of residues at the moments of a run; nothing for a run that logged none."""
    rows: list[Row] = []
    for match in logged(run, _LOGGED):
        axis, table = match[1], match[2]
        for step, words in recorded_at(run, match[0]).items():
            rows.append(
                {
                    "characters": word(axis),
                    "table": word(product(table)),
                    "moment": word(words),
                    "step": number(step, "{:,.0f}"),
                    **_spectrum(run, f"fourier/{axis}/{table}/", step),
                }
            )
    title = "Which frequencies the weights hold"
    notes = [_NOTE.format(chance=_single(run)), _CONTROL, MOMENTS_NOTE]
    return [tabulate("grokking_fourier", title, rows, notes)] if rows else []


def _spectrum(run: Run, prefix: str, step: int) -> dict[str, Cell]:
    def at(name: str) -> float:
        return float(run.series(prefix + name).get(step, math.nan))

    return {
        "k": number(at("frequency"), "{:.0f}"),
        "share at k": number(at("largest"), _SHARE),
        "by chance": number(at("largest_null"), _SHARE),
        "95 % of chance": number(at("largest_level"), _SHARE),
        "effective": number(at("effective"), "{:.1f}"),
        "effective, by chance": number(at("effective_null"), "{:.1f}"),
    }


def _single(run: Run) -> str:
    """Expected share of one frequency on both axes: 2 / (m - 1) for m residues."""
    p = facts(run)["modulus"]
    if not isinstance(p, int):
        return "2 / (residues - 1)"
    return f"{2 / (p - 1):.2%} over {p} residues, {2 / (p - 2):.2%} over the {p - 1} without 0"


def product(table: str) -> str:
    """Words for a table of residues, such as `E W_Q', block 0` for `blocks.0.query`."""
    parts = table.split(".")
    if parts[0] == "blocks":
        return f"{_PRODUCTS.get(parts[2], parts[2])}, block {parts[1]}"
    if parts[0] == "head":
        return "head" if len(parts) == 1 else f"head of {'.'.join(parts[1:])}"
    return "E" if table == "embedding" else table


def fourier_runs(runs: Sequence[Run]) -> list[Table]:
    """Share at the strongest frequency over its median by chance, at the end of every run that logged it."""
    rows: list[Row] = []
    for run, label in names(runs).items():
        spectra = logged(run, _LOGGED)
        settings = facts(run)
        for axis in dict.fromkeys(match[1] for match in spectra):
            row = {"run": word(label), "operation": word(str(settings["operation"] or run.task))}
            row |= {"decay": word(plain(settings["weight decay"])), "characters": word(axis)}
            for match in spectra:
                if match[1] == axis:
                    row[product(match[2])] = number(_over_chance(run, match[0]), "{:.1f} ×")
            rows.append(row)
    notes = ["Share of the strongest frequency at the end, over its median by chance: 1 × says nothing.", _CONTROL]
    title = "Frequencies at the end, over chance"
    return [tabulate("grokking_fourier_runs", title, rows, notes)] if rows else []


def _over_chance(run: Run, metric: str) -> float:
    null = run.last(f"{metric}_null")
    return run.last(metric) / null if null > 0 else math.nan
