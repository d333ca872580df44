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
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run

QUANTITIES: dict[str, tuple[str, str]] = {
    "pc1": ("PC1 of the drift, raw", "{:.1%}"),
    "pc2": ("PC2, raw", "{:.1%}"),
    "pc1_unit": ("PC1, unit rows", "{:.1%}"),
    "pc2_unit": ("PC2, unit rows", "{:.1%}"),
    "k95": ("k95, raw", "{:.0f}"),
    "k99": ("k99, raw", "{:.0f}"),
    "k95_unit": ("k95, unit rows", "{:.0f}"),
    "k99_unit": ("k99, unit rows", "{:.0f}"),
    "pc1_corrected": ("PC1 of the decay-corrected drift", "{:.1%}"),
    "cos_theta0": ("cos(v_b, theta_0)", "{:+.3f}"),
    "drift": ("drift ||x(T)||", "{:.1f}"),
    "drift_corrected": ("decay-corrected drift", "{:.1f}"),
    "coordinate": ("coordinate a(T) along v_b", "{:.1f}"),
    "residual": ("residual ||r(T)||", "{:.1f}"),
    "fraction": ("backbone fraction a^2/||x||^2 at the end", "{:.1%}"),
    "persistence": ("persistence, ||x(T)|| over the walk's", "{:.3f}"),
    "participation": ("participation ratio of drifts", "{:.2f}"),
    "participation_updates": ("participation ratio of updates", "{:.1f}"),
    "autocorrelation": ("autocorrelation of updates, lag 1", "{:+.3f}"),
    "autocorrelation_off": ("the same off theta_0", "{:+.3f}"),
    "windows_origin_anchored": ("adjacent windows from theta_0, |cos|", "{:.4f}"),
    "windows_self_anchored": ("adjacent windows, self-anchored, |cos|", "{:.3f}"),
    "windows_against_global": ("windows against the whole run's v_b, |cos|", "{:.3f}"),
    "update_alignment": ("update alignment, whole-run v_b, mean |cos|", "{:.3f}"),
    "update_alignment_past": ("update alignment, past-only v_b, mean cos", "{:+.3f}"),
}
"""Name of each statistic in words, and how it is written."""


def calibrate_run(run: Run, group: str | None = None, bootstrap: int = 200) -> dict[str, nulls.Calibrated]:
    """Calibrate one group of a run's weights, or the whole selection for None; see `Subject.calibrate`."""
    return Subject.of(run, bootstrap=bootstrap).calibrate(group)


def table(run: Run, group: str | None = None, bootstrap: int = 200) -> pd.DataFrame:
    """Lay the numbers out as they are written: measured, walk, decaying walk, excess over it and its 95 % interval."""
    found = calibrate_run(run, group, bootstrap)
    return pd.DataFrame([{"quantity": QUANTITIES[name][0], **written(name, one)} for name, one in found.items()])


def written(name: str, found: nulls.Calibrated) -> dict[str, str]:
    """Write a calibrated number as it is printed: measured, both nulls, excess and its interval; a dash for NaN."""
    form = QUANTITIES[name][1]
    values = {"measured": found.value, "walk": found.walk, "decaying walk": found.decay}
    cells = {column: form.format(value) if value == value else "-" for column, value in values.items()}
    return cells | {"excess": points(found.excess, form), "95 %": interval(found, form)}


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
                "excess": points(found["pc1"].excess, "{:.1%}"),
                "PC1 unit rows": f"{found['pc1_unit'].value:.1%}",
                "excess ": points(found["pc1_unit"].excess, "{:.1%}"),
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


# Quantity in words, metric of the whole selection, and its null: another metric, a number, the noise floor, or None:
# chance gives a commutator no size.
_PROBES: tuple[tuple[str, str, str | float | None], ...] = (
    ("gradient and past v_b, |cos|", "alignment/{}/gradient", "floor"),
    ("LM gradient and past v_b, |cos|", "alignment/{}/lm", "floor"),
    ("probe gradient and past v_b, |cos|", "alignment/{}/probe", "floor"),
    ("LM and probe gradient, |cos|", "alignment/{}/lm_vs_probe", "floor"),
    ("Fisher anisotropy along past v_b, fixed batches", "fisher/{}/batch_mean/anisotropy", 1.0),
    ("Fisher anisotropy along past v_b, streaming", "fisher/{}/streaming/anisotropy", 1.0),
    ("leading Fisher mode and past v_b, |cos|", "fisher/{}/batch_mean/overlap", "floor"),
    ("one step: clipped gradient and past v_b, |cos|", "anatomy/{}/cos_gradient", "floor"),
    ("one step: momentum, |cos|", "anatomy/{}/cos_momentum", "floor"),
    ("one step: m / sqrt(v), |cos|", "anatomy/{}/cos_normalised", "floor"),
    ("one step: full update with decay, |cos|", "anatomy/{}/cos_update", "floor"),
    ("one step had beta2 been 0.99: m / sqrt(v), |cos|", "anatomy/{}/cos_normalised_beta2_0.99", "floor"),
    ("one step had beta2 been 0.8: m / sqrt(v), |cos|", "anatomy/{}/cos_normalised_beta2_0.8", "floor"),
    ("one step had beta2 been 0: m / sqrt(v), |cos|", "anatomy/{}/cos_normalised_beta2_0", "floor"),
    ("mean size of m / sqrt(v)", "anatomy/{}/update_size", "anatomy/{}/update_size_null"),
    ("coherence m^2 / v, mean", "anatomy/{}/coherence", "anatomy/{}/coherence_null"),
    ("noise that momentum averages away, factor", "anatomy/{}/amplification", "anatomy/{}/amplification_predicted"),
    ("backbone fraction a^2 / ||x||^2", "anatomy/{}/fraction", "anatomy/{}/fraction_decaying_walk"),
    ("commutator: defect D, contains 1/||g||", "commutator/all/defect", None),
    ("commutator: c, without 1/||g||", "commutator/all/c", None),
    ("commutator over its two parts (0.71: independent ones)", "commutator/all/relative", 0.5**0.5),
    ("commutator: share of its energy in these weights", "commutator/{}/share", "commutator/{}/share_null"),
    ("commutator on the past path's directions", "commutator/all/on_path", "commutator/all/on_path_null"),
    ("commutator on theta_0", "commutator/all/on_theta0", "commutator/all/on_theta0_null"),
    ("commutator on leading singular directions", "commutator/all/on_singular", "commutator/all/on_singular_null"),
    ("commutator on another run's path", "commutator/all/on_other", "commutator/all/on_other_null"),
    ("commutator and last update, |cos|", "commutator/all/alignment_rms", "commutator/all/alignment_flip"),
    ("switch and past v_b, |cos|", "switching/{}/cosine", "switching/{}/control_cosine"),
    ("switch's rank among equal stretches", "switching/{}/cosine_percentile", 0.5),
    ("energy of switches in PCs 2 to 6, rank", "switching/{}/energy_2_6_percentile", 0.5),
    ("pairs of switches, |cos|", "switching/{}/run_pair_cosine", "switching/{}/run_pair_control"),
)


def probes_table(run: Run) -> pd.DataFrame:
    """Means over the run of what the probes logged for the whole selection, each beside its null and in units of it."""
    rows = []
    for words, metric, null in _PROBES:
        values = run.series(metric.format(run.trunk)).abs()
        if not len(values):
            continue
        expected = _expected(run, null)
        rows.append(
            {
                "quantity": words,
                "mean": f"{values.mean():.3g}",
                "first": f"{values.iloc[0]:.3g}",
                "last": f"{values.iloc[-1]:.3g}",
                "null": "-" if expected is None else f"{expected:.3g}",
                "mean / null": "-" if expected is None else f"{values.mean() / expected:.2f}",
                "times measured": str(len(values)),
            }
        )
    return pd.DataFrame(rows)


def _expected(run: Run, null: str | float | None) -> float | None:
    if null == "floor":
        return noise_floor(run.trajectory.dim)
    return float(run.series(null.format(run.trunk)).abs().mean()) if isinstance(null, str) else null


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
        return f"{side} what chance and weight decay give; how surely, one path alone does not say"
    if found.low > 0:
        return "more than chance and weight decay explain"
    if found.high < 0:
        return "less than chance and weight decay would give"
    return "the interval of the excess contains zero, so chance and weight decay may be all of it"


def interval(found: nulls.Calibrated, form: str) -> str:
    """Write the interval of an excess; empty where none was asked for."""
    return "" if found.low != found.low else f"{points(found.low, form)} to {points(found.high, form)}"


def points(excess: float, form: str) -> str:
    """Write a difference: shares differ by points, not by per cent; counts are whole."""
    if excess != excess:
        return "-"
    if "%" in form:
        return f"{100 * excess:+.1f} pt".replace("-0.0 pt", "+0.0 pt")
    return f"{excess:+.0f}" if form == "{:.0f}" else f"{excess:+.3f}"


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
