"""Tables of what probes logged at the moments of a run: its first record, memorisation, generalisation, its end."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mini_gpt_pl.arithmetic.milestones import GENERALISED, MEMORISED
from mini_gpt_pl.arithmetic.routing import routing
from mini_gpt_pl.arithmetic.study.runs import TEST, TRAIN, settings_of, step_of
from mini_gpt_pl.arithmetic.study.words import Value, Values, lay, words
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.families import names
from mini_gpt_pl.report.settings import facts, plain
from mini_gpt_pl.report.sheet import Table, number
from mini_gpt_pl.runs.folder import METRICS, TRAJECTORY, Run


def logged(run: Run, pattern: str) -> list[re.Match[str]]:
    """Names of metrics that match a pattern as a whole, in the order of the file; none without metrics."""
    if not (run.path / METRICS).is_file():
        return []
    return [match for name in run.metrics if (match := re.fullmatch(pattern, str(name)))]


def markers(run: Run) -> dict[int, str]:
    """Numbers of markers that a run was evaluated on, and the metrics of their accuracies."""
    metrics = {int(match[1]): match[0] for match in logged(run, r"eval/m(\d+)_accuracy")}
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
    """Steps of the records of a metric, logged at least once, at or last before each moment, with their names."""
    steps = [int(step) for step in run.series(metric).index]
    words_at: dict[int, list[str]] = {steps[0]: ["first"]}
    for name, step in moments(run).items():
        if step is not None:
            words_at.setdefault(max((s for s in steps if s <= step), default=steps[0]), []).append(name)
    words_at.setdefault(steps[-1], []).append("end")
    return {step: ", ".join(listed) for step, listed in sorted(words_at.items())}


def _at(run: Run, name: str, step: int) -> float:
    return float(run.series(name).get(step, math.nan))


def moment_tables(run: Run) -> list[Table]:
    """Attention, moves along the path, and frequencies: every table of `tables.yaml` that has `logged` metrics."""
    layouts = words("tables")
    tables = [lay(name, _rows(run, layouts[name]), chance=_single(run)) for name in layouts["at moments"]]
    return [table for table in (*tables, _scores(run)) if not table.frame.empty]


def _rows(run: Run, layout: Mapping[str, Any]) -> Iterator[Values]:
    """A row for each metric that the layout's pattern matches, and each moment of it."""
    for match in logged(run, layout["logged"]):
        prefix = match[0].rpartition("/")[0]
        heads = {column: product(name) if column == "table" else name for column, name in match.groupdict().items()}
        for step, moment in recorded_at(run, match[0]).items():
            row: dict[str, Value] = {**heads, "moment": moment, "step": step}
            for pattern, form, columns in layout["columns"]:
                for metric in logged(run, f"{re.escape(prefix)}/{pattern}"):
                    for column, suffix in columns.items():
                        row[column.format(*metric.groups())] = number(_at(run, metric[0] + suffix, step), form)
            yield row


def _scores(run: Run) -> Table:
    """Changes of path scores against changes of entropy, from memorisation or a tenth of the run on."""
    last = int(run.metrics.index[-1]) if logged(run, r"attention/.+") else 0
    # Series are stationary enough for surrogates behind the first moment, or a tenth of the run.
    start = min((step for step in moments(run).values() if step is not None and step < last / 2), default=last // 10)
    try:
        pairs = routing(run, start=start).to_dict("records") if (run.path / TRAJECTORY).is_file() else []
    except UserError:
        pairs = []  # too few records, or no attention was logged
    columns = words("tables")["grokking_routing_scores"]["columns"]
    rows = [{column: pair[name] for column, name in columns.items()} for pair in pairs]
    for row in rows:
        row["entropy of"] = str(row["entropy of"]).removeprefix("attention/").removesuffix("/entropy")
    return lay("grokking_routing_scores", rows, start=start)


_PRODUCTS = {"query": "E W_Q'", "value_output": "E W_V' W_O'"}


def product(table: str) -> str:
    """Words for a table of residues, such as `E W_Q', block 0` for `blocks.0.query`."""
    parts = table.split(".")
    if parts[0] == "blocks":
        return f"{_PRODUCTS.get(parts[2], parts[2])}, block {parts[1]}"
    if parts[0] == "head":
        return "head" if len(parts) == 1 else f"head of {'.'.join(parts[1:])}"
    return "E" if table == "embedding" else table


def _single(run: Run) -> str:
    """Expected share of one frequency on both axes: 2 / (m - 1) for m residues."""
    p = facts(run)["modulus"]
    if not isinstance(p, int):
        return "2 / (residues - 1)"
    return f"{2 / (p - 1):.2%} over {p} residues, {2 / (p - 2):.2%} over the {p - 1} without 0"


def fourier_runs(runs: Sequence[Run]) -> list[Table]:
    """Share at the strongest frequency over its median by chance, at the end of every run that logged it."""
    rows: list[Values] = []
    for run, label in names(runs).items():
        spectra = logged(run, words("tables")["grokking_fourier"]["logged"])
        settings = facts(run)
        for axis in dict.fromkeys(match[1] for match in spectra):
            row: dict[str, Value] = {"run": label, "operation": str(settings["operation"] or run.task)}
            row |= {"decay": plain(settings["weight decay"]), "characters": axis}
            for match in spectra:
                if match[1] == axis:
                    null = run.last(f"{match[0]}_null")
                    over = run.last(match[0]) / null if null > 0 else math.nan
                    row[product(match[2])] = number(over, "{:.1f} ×")
            rows.append(row)
    return [lay("grokking_fourier_runs", rows)] if rows else []


def marker_table(run: Run) -> list[Table]:
    """Accuracy by number of markers at the moments of a run; nothing for a run of another task."""
    metrics = markers(run)
    if not metrics:
        return []
    rows: list[Values] = []
    for step, moment in recorded_at(run, next(iter(metrics.values()))).items():
        row: dict[str, Value] = {"moment": moment, "step": step}
        row |= {f"m = {m}": number(_at(run, name, step), "{:.1%}") for m, name in metrics.items()}
        rows.append(row | {"‖θ‖": _at(run, "eval/weight_norm", step)})
    never = [name.removeprefix("90 % with ") for name, step in moments(run).items() if step is None]
    return [
        lay(
            "grokking_markers",
            rows,
            chance=_guessing(run),
            never=f"Never at 90 %: {', '.join(never)}." if never else None,
        )
    ]


def _guessing(run: Run) -> str:
    task = (run.settings.get("data") or {}).get("task") or {}
    classes = task.get("classes") if isinstance(task, dict) else None
    return f" Guessing gives {1 / classes:.1%}." if classes else ""


def marker_runs(runs: Sequence[Run]) -> list[Table]:
    """When each run reached 90 % with each number of markers, and what it ended at."""
    rows: list[Values] = []
    for run, label in names(runs).items():
        metrics, steps = markers(run), moments(run)
        if not metrics:
            continue
        row: dict[str, Value] = {"run": label, **settings_of(run)}
        for m, name in metrics.items():
            row[f"90 %, m = {m}"] = step_of(steps[f"90 % with m = {m}"])
            row[f"end, m = {m}"] = run.last(name)
        rows.append(row)
    return [lay("grokking_markers_runs", rows, chance=_guessing(runs[0]))] if rows else []
