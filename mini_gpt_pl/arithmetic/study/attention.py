"""Tables of attention: how concentrated it is, how much of it the answers need, and what moves of the weights do."""

from __future__ import annotations

import math

from mini_gpt_pl.arithmetic.routing import routing
from mini_gpt_pl.arithmetic.study.moments import MOMENTS_NOTE, logged, moments, recorded_at
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate, word
from mini_gpt_pl.runs.folder import TRAJECTORY, Run

_SHARE, _NATS = "{:.1%}", "{:.3f}"


def attention_tables(run: Run) -> list[Table]:
    """Make every table that the attention and routing probes of a run allow."""
    tables = [_concentration(run), _answers(run), _moves(run), _scores(run)]
    return [table for table in tables if not table.frame.empty]


def _concentration(run: Run) -> Table:
    """Entropy and mass of the largest weights, beside even attention."""
    rows: list[Row] = []
    for match in logged(run, r"attention/(\w+)/layer(\d+)/entropy"):
        prefix = match[0].removesuffix("entropy")
        names = [top[1] for top in logged(run, rf"{prefix}(top\d+)")]
        for step, words in recorded_at(run, match[0]).items():
            row: dict[str, Cell] = {"batch": word(match[1]), "layer": word(match[2]), **_moment(step, words)}
            row |= _beside(run, prefix, "entropy", "entropy", step, _NATS)
            for name in names:
                row |= _beside(run, prefix, name, f"top {name[3:]}", step, _SHARE)
            rows.append(row)
    note = (
        "Entropy in nats and mass of the k largest weights of one query position, means over heads and the examples of "
        "a batch that stays the same. Even: the value of even attention on as many visible positions."
    )
    return tabulate("grokking_attention", "How concentrated attention is", rows, [note, MOMENTS_NOTE])


def _answers(run: Run) -> Table:
    """Accuracy with the largest weights alone, beside weights kept by chance."""
    rows: list[Row] = []
    for match in logged(run, r"attention/(\w+)/accuracy"):
        prefix = match[0].removesuffix("accuracy")
        names = [top[1] for top in logged(run, rf"{prefix}(accuracy_top\d+)")]
        for step, words in recorded_at(run, match[0]).items():
            row: dict[str, Cell] = {"batch": word(match[1]), **_moment(step, words)}
            row["all attention"] = number(_at(run, match[0], step), _SHARE)
            for name in names:
                row |= _beside(run, prefix, name, f"top {name.removeprefix('accuracy_top')}", step, _SHARE, "random")
            rows.append(row)
    note = (
        "Accuracy with the attention of all layers cut to its k largest weights in each row, scaled to sum to 1. "
        "Random: k visible positions kept by chance."
    )
    return tabulate("grokking_attention_answers", "How much attention the answers need", rows, [note, MOMENTS_NOTE])


def _moves(run: Run) -> Table:
    """What moving the weights along directions of their path does to the entropy, beside random moves."""
    rows: list[Row] = []
    for match in logged(run, r"routing/(\w+)/layer(\d+)/odd"):
        prefix = match[0].removesuffix("odd")
        for step, words in recorded_at(run, match[0]).items():
            row: dict[str, Cell] = {"direction": word(match[1]), "layer": word(match[2]), **_moment(step, words)}
            row["odd"] = number(_at(run, match[0], step), "{:+.4f}")
            row["odd, random"] = number(_at(run, f"{match[0]}_null", step), "{:.4f}")
            row["above"] = number(_at(run, f"{match[0]}_below", step), "{:.2f}")
            row["even"] = number(_at(run, f"{prefix}even", step), "{:+.4f}")
            row["even, random"] = number(_at(run, f"{prefix}even_null", step), "{:+.4f}")
            rows.append(row)
    note = (
        "Entropy of attention, in nats, at weights moved by a fixed length along ± the first centred directions of the "
        "path so far, and along the weights themselves. Odd: half the difference; even: mean change. Random: root mean "
        "square of odd and mean of even over directions of the same length in every matrix; above: share of these "
        "that move it less, 0.5 by chance."
    )
    return tabulate("grokking_routing", "Does a move along the path steer attention?", rows, [note, MOMENTS_NOTE])


def _scores(run: Run) -> Table:
    """Changes of path scores against changes of entropy, from memorisation or a tenth of the run on."""
    start = _start(run)
    try:
        correlations = routing(run, start=start) if (run.path / TRAJECTORY).is_file() else None
    except UserError:
        correlations = None  # too few records, or no attention was logged
    rows: list[Row] = []
    for row in () if correlations is None else correlations.to_dict("records"):
        rows.append(
            {
                "component": number(row["component"], "{:.0f}"),
                "entropy of": word(str(row["quantity"]).removeprefix("attention/").removesuffix("/entropy")),
                "changes": number(row["intervals"], "{:.0f}"),
                "r": number(row["r"], "{:+.3f}"),
                "95 % of surrogates": number(row["level"], "{:.3f}"),
                "p": number(row["p"], "{:.3f}"),
                "p, all pairs": number(row["adjusted"], "{:.3f}"),
            }
        )
    note = (
        "Correlation of the changes of each score of the query and key matrices' path with changes of entropy from "
        f"step {start:,} on, beside phase-randomised surrogates; the last column is for all pairs together (Holm)."
    )
    return tabulate("grokking_routing_scores", "Do path scores and entropy change together?", rows, [note])


def _start(run: Run) -> int:
    """Step from which series are stationary enough for surrogates: behind the first moment, or a tenth of the run."""
    last = int(run.metrics.index[-1]) if logged(run, r"attention/.+") else 0
    return min((step for step in moments(run).values() if step is not None and step < last / 2), default=last // 10)


def _moment(step: int, words: str) -> dict[str, Cell]:
    return {"moment": word(words), "step": number(step, "{:,.0f}")}


def _beside(run: Run, prefix: str, name: str, words: str, step: int, form: str, null: str = "even") -> dict[str, Cell]:
    metrics = {words: name, f"{words}, {null}": f"{name}_null"}
    return {column: number(_at(run, prefix + key, step), form) for column, key in metrics.items()}


def _at(run: Run, name: str, step: int) -> float:
    return float(run.series(name).get(step, math.nan))
