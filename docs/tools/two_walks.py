"""PC1 beside two walks under a run's decay: one keeps the lengths of increments, the other those of innovations.

    python -m docs.tools.two_walks runs/live --out controls/tables

The runs differ in their seed: mean ± half of the 95 % interval by Student's t.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from docs.tools.same_steps import spread_cell
from mini_gpt_pl.command_line import one_line_errors
from mini_gpt_pl.geometry.path import innovations, nulls, pca
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.report.sheet import Row, Table, tabulate, word, write_tables
from mini_gpt_pl.runs.folder import Run, runs_below

KINDS = (("raw", False), ("unit rows", True))
WALKS = {"‖d‖": nulls.decaying_walk, "‖e‖": innovations.innovation_walk}
NOTES = (
    "‖d‖: the steps are as long as the run's. ‖e‖: what is left of a step without its decay is as long as the run's, "
    "so that the walk's own steps are longer where training pushes back against decay.",
    "Mean ± half of the 95 % interval over the runs, by Student's t.",
)


def shares(path: Trajectory, group: str | None, *, unit: bool) -> dict[str, float]:
    """PC1 of a path and of both walks, and what it has over each.

    Args:
        path: Whose decay is known.
        group: Of weights; None for all of them.
        unit: Whether all rows are brought to length 1.
    """
    gram, survival = path.gram(group), path.survival_of(group)
    rows = pca.drifts(len(gram))[1:]
    measured = pca.pca(gram, rows, normalise=unit).pc1
    found = {"measured": measured}
    for name, walk in WALKS.items():
        null = pca.pca(walk(gram, survival), rows, normalise=unit).pc1
        found |= {f"decaying walk, {name}": null, f"excess, {name}": measured - null}
    return found


def two_walks(runs: Sequence[Run]) -> Table:
    """Lay PC1 of all weights and of each group beside both walks.

    Args:
        runs: Of one kind, with several seeds.
    """
    paths = [run.trajectory for run in runs]
    rows: list[Row] = []
    for group in (None, *paths[0].groups):
        for kind, unit in KINDS:
            found = [shares(path, group, unit=unit) for path in paths]
            cells = {
                name: spread_cell([one[name] for one in found], "{:.1%}", difference=name.startswith("excess"))
                for name in found[0]
            }
            rows.append({"weights": word(group or "all"), "rows": word(kind), **cells})
    return tabulate("two_walks", "PC1 beside both decaying walks", rows, NOTES)


def main(args: Sequence[str] | None = None) -> None:
    """Write the table of the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of runs that differ in their seed")
    parser.add_argument("--out", type=Path, required=True, help="folder of the table's two files")
    options = parser.parse_args(args)
    with one_line_errors():
        for path in write_tables([two_walks([Run(path) for path in runs_below(options.runs)])], options.out):
            print(path)


if __name__ == "__main__":
    main()
