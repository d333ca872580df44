"""Tables of one run that follow from its path alone: principal components, updates, windows, growth."""

from __future__ import annotations

import math

from mini_gpt_pl.geometry.path import growth, nulls
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.geometry.path.pca import Gram
from mini_gpt_pl.report import measures
from mini_gpt_pl.report.calibration import QUANTITIES, autocorrelation_table
from mini_gpt_pl.report.measures import PHASES, RecordedPath, against_nulls
from mini_gpt_pl.report.sheet import NULLS, Cell, Row, Table, beside_nulls, number, tabulate, word
from mini_gpt_pl.stories.study.beside import Setting
from mini_gpt_pl.stories.study.published import NOTES

_WINDOW = 10  # snapshots, as in the paper
_ROLLING = ("windows_origin_anchored", "windows_self_anchored", "windows_against_global")


def overview(path: RecordedPath, setting: Setting) -> list[Table]:
    """Every calibrated statistic of the whole selection."""
    found = path.calibrated(None)
    assert found is not None
    rows = []
    for name, value in found.items():
        words, form = QUANTITIES[name]
        rows.append({"quantity": word(words), **beside_nulls(value, form), **setting.cell(name, form)})
    notes = [NULLS, measures.spacing_note(path.trajectory), *setting.notes(*found)]
    return [tabulate("overview", f"The whole {path.trunk} against its nulls", rows, notes)]


def pc1_by_block(path: RecordedPath, setting: Setting) -> list[Table]:
    """PC1 and k95 of every group (paper, Table 2), raw and with unit rows."""
    return [
        _pc1_table(path, setting, "", "table2_pc1_blocks", "raw drifts (paper, Table 2)"),
        _pc1_table(path, setting, "_unit", "table2_pc1_blocks_unit", "drifts of unit length"),
    ]


def _pc1_table(path: RecordedPath, setting: Setting, suffix: str, name: str, rows_are: str) -> Table:
    rows, keys = [], []
    for label, group in path.parts.items():
        found = path.calibrated(group)
        assert found is not None
        key = f"pc1{suffix}" if group is None else f"pc1{suffix}/{group}"
        keys.append(key)
        k95 = found[f"k95{suffix}"]
        rows.append(
            {
                "group": word(label),
                **beside_nulls(found[f"pc1{suffix}"], "{:.1%}"),
                **setting.cell(key, "{:.1%}"),
                "k95": number(k95.value, "{:.0f}"),
                "k95, walk": number(k95.walk, "{:.0f}"),
                "k95, decaying walk": number(k95.decay, "{:.0f}"),
            }
        )
    title = f"Share of PC1, {rows_are}"
    return tabulate(name, title, rows, [NULLS, measures.spacing_note(path.trajectory), *setting.notes(*keys)])


# ----------------------------------------------------------------------------------------------------- updates


def updates(path: RecordedPath, setting: Setting) -> list[Table]:
    """Alignment of updates with the backbone by phase (paper, Table 3), and where its sign flips (Table 4)."""
    thinned = path.thinned()
    if len(thinned) < 4:
        return []
    found: dict[str, dict[str, Calibrated]] = {}
    for label, group in path.parts.items():

        def describe(gram: Gram) -> dict[str, float]:
            return measures.update_statistics(gram, thinned.steps, path.length)

        try:
            found[label] = against_nulls(thinned.gram(group), thinned.survival, describe)
        except ValueError:  # moved between the kept snapshots only
            continue
    span = thinned.steps[1] - thinned.steps[0]
    return [_phases_table(path, setting, found, span), _flip_table(path, setting, found, span)]


def _key(path: RecordedPath, label: str) -> str:
    """Name of a group in the published table: the whole selection is the paper's trunk whatever it is called."""
    return "trunk" if label == path.trunk else label


def _phases_table(path: RecordedPath, setting: Setting, found: dict[str, dict[str, Calibrated]], span: int) -> Table:
    rows, keys = [], []
    for phase in PHASES:
        for label, numbers in found.items():
            if phase not in numbers:
                continue
            past = numbers.get(f"{phase}_past")
            key = f"{phase}/{_key(path, label)}"
            keys.append(key)
            rows.append(
                {
                    "phase": word(phase),
                    "group": word(label),
                    **beside_nulls(numbers[phase], "{:.3f}"),
                    **setting.cell(key, "{:.3f}"),
                    **({} if past is None else _past_cells(past)),
                }
            )
    early, late = measures.phase_borders(path.length)
    notes = [
        f"Mean |cos| of {span:,}-step updates with the whole run's raw v_b, which contains them: even orthogonal "
        "updates of these lengths align with it, as the walk shows.",
        "Past: mean signed cos with the v_b of the snapshots before each update, which knows nothing of it; a walk "
        "gives zero.",
        f"Early: midpoints before step {early:,}; late: after step {late:,}"
        + ("." if path.length == 10_000 else f", the paper's shares of {path.length:,} steps."),
        *setting.notes(*keys),
    ]
    return tabulate("table3_update_alignment", "Alignment of updates by phase (paper, Table 3)", rows, notes)


def _past_cells(found: Calibrated) -> dict[str, Cell]:
    cells = beside_nulls(found, "{:+.3f}")
    return {"past": cells["measured"], "past, decaying walk": cells["decaying walk"], "past, excess": cells["excess"]}


def _flip_table(path: RecordedPath, setting: Setting, found: dict[str, dict[str, Calibrated]], span: int) -> Table:
    rows, keys = [], []
    for label, numbers in found.items():
        row = {"group": word(label)}
        for name, words, form in (
            ("flip", "flip", "{:,.0f}"),
            ("early_signed", "early C", "{:+.3f}"),
            ("late_signed", "late C", "{:+.3f}"),
        ):
            cell = numbers.get(name, Calibrated(math.nan, math.nan, math.nan))
            if name not in numbers and name != "flip":
                continue  # the run has no such phase
            key = f"{name}/{_key(path, label)}"
            keys.append(key)
            row |= {
                words: number(cell.value, form),
                f"{words}, walk": number(cell.walk, form),
                f"{words}, decaying walk": number(cell.decay, form),
                **{f"{words}, {column}": shown for column, shown in setting.cell(key, form).items()},
            }
        rows.append(row)
    notes = [
        f"C: signed cosine of {span:,}-step updates with the whole run's raw v_b; flip: end of the first interval "
        "with C < 0, a dash where there is none.",
        *setting.notes(*keys),
        NOTES["sign"],
    ]
    return tabulate("table4_sign_flip", "Where the alignment of updates changes sign (paper, Table 4)", rows, notes)


# ------------------------------------------------------------------------------------- windows, fraction, growth


def windows(path: RecordedPath, setting: Setting) -> list[Table]:
    """Rolling windows: from the origin, from their own start, and against the whole run (paper, section 3.2)."""
    if len(path.trajectory) <= _WINDOW + 1:
        return []
    rows: list[Row] = []
    for label, group in path.parts.items():
        found = path.calibrated(group)
        assert found is not None
        for name in _ROLLING if group is None else _ROLLING[:1]:
            words, form = QUANTITIES[name]
            cells = {"group": word(label), "quantity": word(f"{words}, mean"), **beside_nulls(found[name], form)}
            rows.append(cells | setting.cell(name, form))
    gram = path.trajectory.gram()
    extremes = against_nulls(gram, path.trajectory.survival, measures.rolling_statistics)
    for name, words, form in (
        ("turning_low", "adjacent windows, self-anchored, |cos|, lowest", "{:.3f}"),
        ("pc1_low", "PC1 of a window, unit rows, lowest", "{:.1%}"),
        ("pc1_high", "PC1 of a window, unit rows, highest", "{:.1%}"),
    ):
        rows.append({"group": word(path.trunk), "quantity": word(words), **beside_nulls(extremes[name], form)})
        rows[-1] = {**rows[-1], **setting.cell(name, form)}
    rows.sort(key=lambda row: row["group"].text != path.trunk)
    notes = [NULLS, f"Windows of {_WINDOW} snapshots; {measures.spacing_note(path.trajectory)}"]
    return [
        tabulate(
            "windows",
            "Does the backbone turn? Rolling windows",
            rows,
            [*notes, *setting.notes(*_ROLLING, *extremes)],
        )
    ]


def fraction(path: RecordedPath, setting: Setting) -> list[Table]:
    """Backbone fraction a^2 / ||x||^2 at the end and on average, and where coordinate and residual are largest."""
    trajectory = path.trajectory
    found = against_nulls(
        trajectory.gram(), trajectory.survival, lambda gram: measures.split_statistics(gram, trajectory.steps)
    )
    rows, keys = [], []
    for name, words, form, key in (
        ("raw_last", "fraction along raw v_b, at the end", "{:.1%}", ""),
        ("raw_mean", "the same, mean over snapshots", "{:.1%}", ""),
        ("unit_last", "fraction along v_b of unit rows, at the end", "{:.1%}", "fraction_last"),
        ("unit_mean", "the same, mean over snapshots", "{:.1%}", "fraction_mean"),
        ("highest_a", "step at which |a| is largest", "{:,.0f}", "highest_coordinate"),
        ("highest_r", "step at which ||r|| is largest", "{:,.0f}", "highest_residual"),
    ):
        keys.append(key)
        rows.append({"quantity": word(words), **beside_nulls(found[name], form), **setting.cell(key, form)})
    title = "Backbone fraction of the drift (paper, section 3.3)"
    return [tabulate("backbone_fraction", title, rows, [NULLS, *setting.notes(*keys)])]


def growth_laws(path: RecordedPath, setting: Setting) -> list[Table]:
    """Exponents of |a| and ||r|| by window, alignment of early and late phase, correlation of ||r|| with p_ood."""
    trajectory, run = path.trajectory, path.run
    paper, scaled = growth.WINDOWS, growth.scaled_windows(path.length)
    found = against_nulls(
        trajectory.gram(),
        trajectory.survival,
        lambda gram: growth.summary(gram, trajectory.steps, run.border, scaled) | _correlations(path, gram, scaled),
    )
    rows, keys = [], []
    for (lo, hi), (paper_lo, paper_hi) in zip(scaled, paper, strict=True):
        if hi > path.last:
            continue  # a run that stopped early has not been through this window
        for name, words in (("a", "|a| ~ t^"), ("r", "||r|| ~ t^")):
            if (value := found.get(f"exponent_{name}_{lo}_{hi}")) is None:
                continue
            key = f"exponent_{name}_{paper_lo}_{paper_hi}"
            keys.append(key)
            row = {"quantity": word(f"exponent of {words}"), "steps": word(f"({lo:,}, {hi:,}]")}
            rows.append({**row, **beside_nulls(value, "{:+.2f}"), **setting.cell(key, "{:+.2f}")})
    if (value := found.get("early_late")) is not None:
        keys.append("early_late")
        row = {"quantity": word("|<v_E, v_L>|"), "steps": word(f"before and after {run.border:,}")}
        rows.append({**row, **beside_nulls(value, "{:.3f}"), **setting.cell("early_late", "{:.3f}")})
    published = {window: f"correlation_{lo}_{hi}" for window, (lo, hi) in zip(scaled, paper, strict=True)}
    whole = (0, path.last)
    if path.last == path.length:
        published[whole] = "correlation_0_10000"
    for lo, hi in dict.fromkeys((whole, *scaled)):
        if hi <= path.last and (value := found.get(f"correlation_{lo}_{hi}")) is not None:
            key = published.get((lo, hi), "")
            keys.append(key)
            row = {"quantity": word("correlation of p_ood and ||r||"), "steps": word(f"({lo:,}, {hi:,}]")}
            rows.append({**row, **beside_nulls(value, "{:+.2f}"), **setting.cell(key, "{:+.2f}")})
    if not rows:
        return []
    notes = [
        NULLS,
        "v_b of unit rows, a and r of raw drifts; least squares in ln-ln. Decoupled decay under a linear warm-up alone "
        "moves weights as t^2.",
        None if path.length == 10_000 else f"Windows are the paper's shares of {path.length:,} steps.",
        "Correlations describe: both series follow the schedule, and the nulls pair p_ood with their own ||r||.",
        *setting.notes(*keys),
    ]
    return [tabulate("growth", "How coordinate and residual grow", rows, notes)]


def _correlations(path: RecordedPath, gram: Gram, windows: tuple[growth.Window, ...]) -> dict[str, float]:
    """Pearson correlation of p_ood and ||r||, over the whole run and by window."""
    steps = path.trajectory.steps[1:]
    if not (path.run.path / "metrics.csv").is_file():
        return {}
    p_ood = path.run.series("probe/p_ood")
    values = growth.at_steps([int(step) for step in p_ood.index], p_ood.tolist(), steps)
    try:
        residual = growth.split_drift(gram).residual_norm.tolist()
    except ValueError:
        return {}
    found = {(lo, hi): growth.correlation(steps, values, residual, lo, hi) for lo, hi in ((0, path.last), *windows)}
    return {f"correlation_{lo}_{hi}": value for (lo, hi), value in found.items() if value is not None}


def autocorrelation(path: RecordedPath, setting: Setting) -> list[Table]:
    """Correlation of updates by lag, beside the decaying walk."""
    frame = autocorrelation_table(path.run)
    if frame.empty:
        return []
    gram, survival = path.trajectory.gram(), path.trajectory.survival
    null = nulls.decaying_walk(gram, survival)
    pairs = [
        values
        for off in (False, True)
        for values in zip(*(nulls.autocorrelation(h, 5, off_theta0=off).tolist() for h in (gram, null)), strict=True)
        if not math.isnan(values[0])
    ]
    numbers = frame[["correlation of"]].assign(
        measured=[measured for measured, _ in pairs],
        **{"decaying walk": [decay for _, decay in pairs], "excess": [a - b for a, b in pairs]},
    )
    notes = ("A walk without decay gives zero at every lag, whatever its PC1.", measures.spacing_note(path.trajectory))
    return [Table("autocorrelation", "Correlation of updates by lag", frame, notes, numbers)]
