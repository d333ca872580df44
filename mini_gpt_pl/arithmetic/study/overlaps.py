"""Tables of overlaps: do other seeds and other layers move in the same subspace, and would decay alone?

mini_gpt_pl overlaps runs/grokking/* --out overlaps
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from mini_gpt_pl.arithmetic.overlaps import ATTENTION, LAYERS, Overlap, overlaps
from mini_gpt_pl.arithmetic.study.paths import short
from mini_gpt_pl.arithmetic.study.words import Value, Values, lay, metrics_of
from mini_gpt_pl.command_line import CommandParser
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.families import names
from mini_gpt_pl.report.sheet import Table, write_tables
from mini_gpt_pl.runs.folder import Run, runs_below


def overlap_tables(runs: Sequence[Run], k: int = 2, until: int | None = None, pattern: str = ATTENTION) -> list[Table]:
    """Tabulate overlaps over layers and runs: means by kind and matrix, then every pair; arguments as in `overlaps`.

    Raises:
        UserError: A run has no snapshots, nothing matches or can be compared.
    """
    called = names(runs)
    compared = overlaps(runs, [called[run] for run in runs], k, until, pattern)
    if not compared:
        raise UserError(f"{runs[0].path} has one layer and is one run: give another run to compare its path with")
    last = min(run.trajectory.steps[-1] for run in runs) if until is None else until
    parts: dict[tuple[bool, str, str], list[Overlap]] = {}
    for one in compared:
        parts.setdefault((one.kind != LAYERS, one.kind, _matrix(one)), []).append(one)
    means: list[Values] = [
        {"paths": kind, "weights": matrix, "pairs": len(part), **_values(part)}
        for (_, kind, matrix), part in sorted(parts.items(), key=lambda item: item[0][0])
    ]
    pairs: list[Values] = [
        {
            "paths": one.kind,
            "run": one.run,
            "other run": one.other_run,
            "weights": _matrix(one),
            **_values([one]),
            "principal cosines": ", ".join(f"{value:.3f}" for value in one.path.cosines),
        }
        for one in compared
    ]
    noted = {"k": k, "until": last}
    return [lay("grokking_overlaps", means, **noted), lay("grokking_overlap_pairs", pairs, **noted)]


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


def _matrix(one: Overlap) -> str:
    own, other = short(one.weights), short(one.other_weights)
    return own if own == other else f"{own} and {other}"


def _values(part: Sequence[Overlap]) -> dict[str, Value]:
    """Means over some pairs of what `tables.yaml` names, the overlaps with their spread."""
    row: dict[str, Value] = {}
    for column, name in metrics_of("grokking_overlaps").items():
        values = [float(attrgetter(name)(one)) for one in part]
        spread = statistics.stdev(values) if len(part) > 1 and name.endswith(".overlap") else math.nan
        row[column] = (statistics.fmean(values), spread)
    return row


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
