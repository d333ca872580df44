"""Every geometric number of a run beside its two nulls, as a table.

python -m mini_gpt_pl.report.calibration runs/mine > table.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from mini_gpt_pl.command_line import one_line_errors
from mini_gpt_pl.geometry.path import growth
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.path_tables import autocorrelation
from mini_gpt_pl.report.probe_tables import live_probes
from mini_gpt_pl.report.published import NOTHING
from mini_gpt_pl.report.sheet import markdown
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run


def calibrate_run(run: Run, group: str | None = None, bootstrap: int = 200) -> dict[str, Calibrated]:
    """Calibrate one group of a run's weights, or the whole selection for None; see `Subject.calibrate`."""
    return Subject.of(run, bootstrap=bootstrap).calibrate(group)


def table(run: Run, group: str | None = None, bootstrap: int = 200) -> pd.DataFrame:
    """Lay the numbers out as they are written: measured, walk, decaying walk, excess over it and its 95 % interval."""
    numbers = calibrate_run(run, group, bootstrap)
    return pd.DataFrame([{"quantity": statistics()[name].title, **written(name, one)} for name, one in numbers.items()])


def written(name: str, number: Calibrated) -> dict[str, str]:
    """Write a calibrated number as it is printed: measured, both nulls, excess and its interval; a dash for NaN."""
    one = statistics()[name]
    values = {"measured": number.value, "walk": number.walk, "decaying walk": number.decay}
    cells = {column: one.write(value) if value == value else "-" for column, value in values.items()}
    ends = [one.write_difference(end) for end in (number.low, number.high)]
    return cells | {"excess": one.write_difference(number.excess), "95 %": "" if "-" in ends else " to ".join(ends)}


def groups_table(run: Run) -> pd.DataFrame:
    """One row per group that moved: PC1 raw and with unit rows, two cosines, and what their nulls have."""
    rows, subject = [], Subject.of(run, bootstrap=0)
    for group in run.trajectory.groups:
        if numbers := subject.calibrated(group):
            row = {"group": group}
            for name, head, space in (("pc1", "PC1 raw", ""), ("pc1_unit", "PC1 unit rows", " ")):
                cells = written(name, numbers[name])
                row |= {head: cells["measured"], f"excess{space}": cells["excess"]}
            for name, head, space in (
                ("cos_theta0", "cos(v_b, theta_0)", ""),
                ("update_alignment_past", "update alignment, past", " "),
            ):
                row |= {head: f"{numbers[name].value:+.3f}", f"null{space}": f"{numbers[name].decay:+.3f}"}
            rows.append(row)
    return pd.DataFrame(rows)


def growth_table(run: Run) -> pd.DataFrame:
    """Exponents of |a| and ||r|| by window and the alignment of early and late phase, beside both nulls."""
    subject, steps = Subject.of(run), run.trajectory.steps
    windows = growth.scaled_windows(steps[-1])
    summaries = [growth.summary(path, steps, subject.border, windows) for path in subject.paths()]
    rows = []
    for name in (name for name in summaries[0] if not name.startswith("r2_")):
        cells = [f"{summary[name]:+.2f}" if name in summary else "-" for summary in summaries]
        rows.append(dict(zip(("quantity", "measured", "walk", "decaying walk"), (name, *cells), strict=True)))
    return pd.DataFrame(rows)


def main() -> None:
    """Print the tables of a run as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    options = parser.parse_args()
    with one_line_errors():
        run = Subject.of(Run(options.run))
        frames = [table(run), groups_table(run), *(made.frame for made in autocorrelation(run, NOTHING))]
        frames += [growth_table(run), *(made.frame for made in live_probes(run, NOTHING))]
        print(*(markdown(frame) for frame in frames if len(frame)), sep="\n\n")


if __name__ == "__main__":
    main()
