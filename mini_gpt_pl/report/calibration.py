"""Every geometric number of a run beside its two nulls, as a table.

python -m mini_gpt_pl.report.calibration runs/mine > table.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from mini_gpt_pl.command_line import one_line_errors
from mini_gpt_pl.geometry.path import growth, nulls
from mini_gpt_pl.geometry.vectors.alignment import noise_floor
from mini_gpt_pl.metrics.registry import beside, find, statistics, title_of
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run


def calibrate_run(run: Run, group: str | None = None, bootstrap: int = 200) -> dict[str, nulls.Calibrated]:
    """Calibrate one group of a run's weights, or the whole selection for None; see `Subject.calibrate`."""
    return Subject.of(run, bootstrap=bootstrap).calibrate(group)


def table(run: Run, group: str | None = None, bootstrap: int = 200) -> pd.DataFrame:
    """Lay the numbers out as they are written: measured, walk, decaying walk, excess over it and its 95 % interval."""
    found = calibrate_run(run, group, bootstrap)
    return pd.DataFrame([{"quantity": statistics()[name].title, **written(name, one)} for name, one in found.items()])


def written(name: str, found: nulls.Calibrated) -> dict[str, str]:
    """Write a calibrated number as it is printed: measured, both nulls, excess and its interval; a dash for NaN."""
    one = statistics()[name]
    values = {"measured": found.value, "walk": found.walk, "decaying walk": found.decay}
    cells = {column: one.write(value) if value == value else "-" for column, value in values.items()}
    ends = [one.write_difference(end) for end in (found.low, found.high)]
    return cells | {"excess": one.write_difference(found.excess), "95 %": "" if "-" in ends else " to ".join(ends)}


def groups_table(run: Run) -> pd.DataFrame:
    """One row per group: PC1 raw and with unit rows, and their excess over the decaying walk."""
    rows = []
    subject = Subject.of(run, bootstrap=0)
    for group in run.trajectory.groups:
        if not (found := subject.calibrated(group)):
            continue  # a frozen group has no path
        rows.append(
            {
                "group": group,
                "PC1 raw": f"{found['pc1'].value:.1%}",
                "excess": written("pc1", found["pc1"])["excess"],
                "PC1 unit rows": f"{found['pc1_unit'].value:.1%}",
                "excess ": written("pc1_unit", found["pc1_unit"])["excess"],
                "cos(v_b, theta_0)": f"{found['cos_theta0'].value:+.3f}",
                "null": f"{found['cos_theta0'].decay:+.3f}",
                "update alignment, past": f"{found['update_alignment_past'].value:+.3f}",
                "null ": f"{found['update_alignment_past'].decay:+.3f}",
            }
        )
    return pd.DataFrame(rows)


def growth_table(run: Run) -> pd.DataFrame:
    """Exponents of |a| and ||r|| by window and the alignment of early and late phase, beside both nulls."""
    trajectory, gram = run.trajectory, run.trajectory.gram()
    windows = growth.scaled_windows(trajectory.steps[-1])
    paths = (gram, nulls.walk(gram), nulls.decaying_walk(gram, trajectory.survival))
    found = [growth.summary(path, trajectory.steps, Subject.of(run).border, windows) for path in paths]
    rows = []
    for name in found[0]:
        if name.startswith("r2_"):
            continue
        cells = [f"{path[name]:+.2f}" if name in path else "-" for path in found]
        rows.append(dict(zip(("quantity", "measured", "walk", "decaying walk"), (name, *cells), strict=True)))
    return pd.DataFrame(rows)


def autocorrelation_table(run: Run, lags: int = 5) -> pd.DataFrame:
    """Correlation of updates by lag, raw and off theta_0, beside the decaying walk; a free walk gives zero."""
    gram, survival = run.trajectory.gram(), run.trajectory.survival
    null = nulls.decaying_walk(gram, survival)
    rows = []
    for off in (False, True):
        values = (nulls.autocorrelation(path, lags, off_theta0=off).tolist() for path in (gram, null))
        for lag, (measured, decay) in enumerate(zip(*values, strict=True), 1):
            if measured == measured:
                name = f"updates {lag} apart{', off theta_0' if off else ''}"
                cells = (f"{x:+.3f}" for x in (measured, decay, measured - decay))
                columns = ("correlation of", "measured", "decaying walk", "excess")
                rows.append(dict(zip(columns, (name, *cells), strict=True)))
    return pd.DataFrame(rows)


PROBED = (
    "alignment/{whole}/gradient",
    "alignment/{whole}/lm",
    "alignment/{whole}/probe",
    "alignment/{whole}/lm_vs_probe",
    "fisher/{whole}/batch_mean/anisotropy",
    "fisher/{whole}/streaming/anisotropy",
    "fisher/{whole}/batch_mean/overlap",
    "anatomy/{whole}/cos_gradient",
    "anatomy/{whole}/cos_momentum",
    "anatomy/{whole}/cos_normalised",
    "anatomy/{whole}/cos_update",
    "anatomy/{whole}/cos_normalised_beta2_0.99",
    "anatomy/{whole}/cos_normalised_beta2_0.8",
    "anatomy/{whole}/cos_normalised_beta2_0",
    "anatomy/{whole}/update_size",
    "anatomy/{whole}/coherence",
    "anatomy/{whole}/amplification",
    "anatomy/{whole}/fraction",
    "commutator/all/defect",
    "commutator/all/c",
    "commutator/all/relative",
    "commutator/{whole}/share",
    "commutator/all/on_path",
    "commutator/all/on_theta0",
    "commutator/all/on_singular",
    "commutator/all/on_other",
    "commutator/all/alignment_rms",
    "switching/{whole}/cosine",
    "switching/{whole}/cosine_percentile",
    "switching/{whole}/energy_2_6_percentile",
    "switching/{whole}/run_pair_cosine",
)
"""Metrics of the table of live probes; the registry has their words and their nulls."""


def probes_table(run: Run) -> pd.DataFrame:
    """Means over the run of what the probes logged for the whole selection, each beside its null and in units of it."""
    rows = []
    for template in PROBED:
        name = template.replace("{whole}", run.trunk)
        values = run.series(name).abs()
        if not len(values):
            continue
        expected = _expected(run, name)
        rows.append(
            {
                "quantity": title_of(name),
                "mean": f"{values.mean():.3g}",
                "first": f"{values.iloc[0]:.3g}",
                "last": f"{values.iloc[-1]:.3g}",
                "null": "-" if expected is None else f"{expected:.3g}",
                "mean / null": "-" if expected is None else f"{values.mean() / expected:.2f}",
                "times measured": str(len(values)),
            }
        )
    return pd.DataFrame(rows)


def _expected(run: Run, name: str) -> float | None:
    """What chance gives for the absolute value of a metric: noise floor, a number, the mean of its null, or None."""
    metric = find(name)
    if metric is None:
        return None
    if metric.floor:
        return noise_floor(run.trajectory.dim)
    null = beside(name, list(map(str, run.metrics.columns)))
    return metric.level if null is None or metric.level is not None else float(run.series(null).abs().mean())


def markdown(frame: pd.DataFrame) -> str:
    """Write a table of strings as Markdown."""
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell).strip().replace("|", "\\|") for cell in line) + " |" for line in lines)


def conclusion(found: nulls.Calibrated) -> str:
    """Say in words what a number says beside the decaying walk."""
    if found.decay != found.decay or found.value != found.value:
        return "its null is not known, so it says nothing by itself"
    if found.low != found.low:
        if found.excess == 0:
            return "what chance and weight decay give"
        side = "above" if found.excess > 0 else "below"
        return f"{side} what chance and weight decay give; one path does not say how surely"
    if found.low > 0:
        return "more than chance and weight decay explain"
    if found.high < 0:
        return "less than chance and weight decay would give"
    return "the interval of the excess contains zero, so chance and weight decay may be all of it"


def main() -> None:
    """Print the tables of a run as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    options = parser.parse_args()
    with one_line_errors():
        run = Run(options.run)
        tables = (
            table(run),
            groups_table(run),
            autocorrelation_table(run),
            growth_table(run),
            probes_table(run),
        )
        print(*(markdown(found) for found in tables if len(found)), sep="\n\n")


if __name__ == "__main__":
    main()
