"""Tables of overlaps: do other seeds and other layers move in the same subspace, and would decay alone?

mini_gpt_pl overlaps runs/grokking/* --out overlaps
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from mini_gpt_pl.arithmetic.overlaps import ATTENTION, LAYERS, Overlap, overlaps
from mini_gpt_pl.arithmetic.study.runs import DECAYING, NULLS
from mini_gpt_pl.arithmetic.study.tables import short
from mini_gpt_pl.command_line import CommandParser
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.families import names
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate, word, write_tables
from mini_gpt_pl.runs.folder import Run, runs_below

_SHARE, _COSINE = "{:.2%}", "{:.3f}"
_NOTES = (
    "Overlap: mean squared cosine of the principal angles between the first {k} centred directions of two paths, 1 "
    "where they run in one subspace; steps 0 to {until:,}. Chance: random directions of the same matrix. Largest: "
    "cosine of the smallest angle; 95 %: nineteen of twenty random pairs stay under it.",
    "All blocks of a run start from one θ₀, and so do runs of one seed. Decay, ‖d‖ and ‖e‖: two decaying walks with "
    "independent innovations from such starts, as long as the measured increments or innovations; what they share is "
    "θ₀. Without θ₀: that axis taken out of both paths first, chance being the null again.",
)


def overlap_tables(runs: Sequence[Run], k: int = 2, until: int | None = None, pattern: str = ATTENTION) -> list[Table]:
    """Tabulate overlaps over layers and runs: means by kind and matrix, then every pair.

    Args:
        runs: With their snapshots, of one model.
        k: Directions of each path.
        until: Last step that counts; that of the shortest run for None.
        pattern: Which recorded groups.

    Raises:
        UserError: A run has no snapshots, nothing matches or can be compared.
    """
    called = names(runs)
    compared = overlaps(runs, [called[run] for run in runs], k, until, pattern)
    if not compared:
        raise UserError(f"{runs[0].path} has one layer and is one run: give another run to compare its path with")
    last = min(run.trajectory.steps[-1] for run in runs) if until is None else until
    notes = [note.format(k=k, until=last) for note in _NOTES]
    title = "Do other layers and seeds move in the same subspace?"
    summary = tabulate("grokking_overlaps", title, [_mean_row(part) for part in _gathered(compared)], notes)
    pairs = tabulate("grokking_overlap_pairs", f"{title} Every pair", [_pair_row(one) for one in compared], notes)
    return [summary, pairs]


def overlap_sections(runs: Sequence[Run]) -> list[Table]:
    """The first table for a report; none where snapshots are missing or nothing can be compared.

    Paths without weight decay, which do not leave theta_0 behind, are no repetitions of those with it and stay out of
    their means.
    """
    try:
        decaying = [run for run in runs if run.trajectory.survival[-1] < 1.0]
        return overlap_tables(decaying or runs)[:1]
    except UserError:
        return []


def _gathered(compared: Sequence[Overlap]) -> list[list[Overlap]]:
    """Overlaps of one kind and one matrix."""
    parts: dict[tuple[str, str], list[Overlap]] = {}
    for one in compared:
        parts.setdefault((one.kind, _matrix(one)), []).append(one)
    return [parts[key] for key in sorted(parts, key=lambda key: key[0] != LAYERS)]


def _matrix(one: Overlap) -> str:
    own, other = short(one.weights), short(one.other_weights)
    return own if own == other else f"{own} and {other}"


def _mean_row(part: Sequence[Overlap]) -> Row:
    head = {"paths": word(part[0].kind), "weights": word(_matrix(part[0])), "pairs": number(len(part), "{:.0f}")}
    return head | _cells(part)


def _pair_row(one: Overlap) -> Row:
    cosines = ", ".join(_COSINE.format(value) for value in one.path.cosines)
    head = {"paths": word(one.kind), "run": word(one.run), "other run": word(one.other_run)}
    return {**head, "weights": word(_matrix(one)), **_cells([one]), "principal cosines": word(cosines)}


def _cells(part: Sequence[Overlap]) -> dict[str, Cell]:
    """Means over some pairs, the overlap with its spread."""
    cells = {"cos(θ₀, θ₀)": _mean([one.cos_theta0 for one in part], _COSINE)}
    cells["overlap"] = _mean([one.path.overlap for one in part], _SHARE, spread=True)
    cells["chance"] = _mean([one.path.chance for one in part], _SHARE)
    for null in DECAYING:
        cells[NULLS[null]] = _mean([one.decaying[null] for one in part], _SHARE)
    cells["largest"] = _mean([one.path.cosines[0] for one in part], _COSINE)
    cells["95 %"] = _mean([one.path.level for one in part], _COSINE)
    cells["without θ₀"] = _mean([one.rest.overlap for one in part], _SHARE, spread=True)
    cells["without θ₀: chance"] = _mean([one.rest.chance for one in part], _SHARE)
    cells["without θ₀: largest"] = _mean([one.rest.cosines[0] for one in part], _COSINE)
    return cells


def _mean(values: Sequence[float], form: str, *, spread: bool = False) -> Cell:
    return number(statistics.fmean(values), form, statistics.stdev(values) if spread and len(values) > 1 else None)


def main(args: Sequence[str] | None = None) -> None:
    """Print the table of means; with `--out`, write it and the table of all pairs."""
    parser = CommandParser("overlaps", description="Compare the subspaces of paths over layers and runs.")
    parser.add_argument(
        "runs", type=Path, nargs="+", help="run folders of one model, with snapshots, or folders of these"
    )
    parser.add_argument("--k", type=int, default=2, help="directions of each path")
    parser.add_argument("--until", type=int, help="last step that counts; that of the shortest run without it")
    parser.add_argument("--groups", default=ATTENTION, help="which recorded groups, searched in their names")
    parser.add_argument("--out", type=Path, help="folder for the tables, as CSV and Markdown")
    options = parser.parse_args(args)
    runs = [Run(path) for folder in options.runs for path in runs_below(folder)]
    tables = overlap_tables(runs, options.k, options.until, options.groups)
    if options.out is not None:
        write_tables(tables, options.out)
    print(tables[0].markdown())
