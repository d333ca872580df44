"""Tables of one run that follow from its path alone: principal components, updates, windows, growth.

Each number stands beside its nulls and, where a study has one, beside the published value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mini_gpt_pl.geometry.path import growth, nulls
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.geometry.path.pca import Gram
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report import measures
from mini_gpt_pl.report.calibration import conclusion
from mini_gpt_pl.report.measures import PHASES
from mini_gpt_pl.report.published import Beside
from mini_gpt_pl.report.sheet import NULLS, Cell, Row, Table, beside_nulls, number, word
from mini_gpt_pl.report.subject import Subject

_WINDOW = 10  # snapshots
_UNKNOWN = Calibrated(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class NumberRow:
    """A row of a table, as data: which number, in which words and digits, and which published one stands beside it.

    Args:
        key: Of the number.
        words: What it is; those of the registry if empty.
        form: How it is written; that of the registry if empty.
        published: Key of the published number; the same if None, none if empty.
    """

    key: str
    words: str = ""
    form: str = ""
    published: str | None = None

    @property
    def format(self) -> str:
        """How the number is written."""
        return self.form or statistics()[self.key].format

    @property
    def published_key(self) -> str:
        """Key of the published number."""
        return self.key if self.published is None else self.published


@dataclass
class Rows:
    """Rows of numbers beside their nulls and published values, and the keys of those values, for the footnotes.

    Args:
        beside: The published run.

    Example:
        >>> rows = Rows(Beside())
        >>> rows.add(Calibrated(0.8, 0.7, 0.75), "pc1", "{:.0%}", group=word("head"))
        >>> rows.cells[0]["excess"].text
        '+5 pt'
    """

    beside: Beside
    cells: list[Row] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def add(self, found: Calibrated, key: str, form: str, more: Mapping[str, Cell] | None = None, **lead: Cell) -> None:
        """Add a row: what it is, the number beside its nulls, the published value, and what follows."""
        self.keys.append(key)
        self.cells.append({**lead, **beside_nulls(found, form), **self.beside.cell(key, form), **(more or {})})

    def quantities(
        self, found: Mapping[str, Calibrated], shown: Sequence[NumberRow], *, conclude: bool = False, **lead: Cell
    ) -> None:
        """Add a row for every quantity that there is, with what it says in words if that is asked for."""
        for one in shown:
            if one.key in found:
                words = word(one.words or statistics()[one.key].title)
                more = {"in words": word(conclusion(found[one.key]))} if conclude else {}
                self.add(found[one.key], one.published_key, one.format, more, **lead, quantity=words)

    def table(self, name: str, title: str, *notes: str | None) -> list[Table]:
        """Lay the rows out; nothing without any."""
        return [self.beside.table(name, title, self.cells, notes, self.keys)] if self.cells else []


def path_tables(subject: Subject, beside: Beside) -> list[Table]:
    """Make every table of a run's path that its snapshots allow; nothing for weights that never moved."""
    if not subject.moved:
        return []
    made = (overview, groups, updates, windows, fraction, growth_laws, autocorrelation)
    return [table for make in made for table in make(subject, beside)]


def overview(subject: Subject, beside: Beside) -> list[Table]:
    """Every calibrated statistic of the whole selection."""
    rows, found = Rows(beside), subject.calibrated()
    rows.quantities(found, [NumberRow(name) for name in found], conclude=not subject.task)
    spacing = measures.spacing_note(subject.trajectory)
    return rows.table("overview", f"The whole {subject.trunk} against its nulls", NULLS, spacing)


def groups(subject: Subject, beside: Beside) -> list[Table]:
    """PC1 and k95 of every group, raw and with unit rows."""
    tables = []
    for suffix, rows_are in (("", "raw drifts"), ("_unit", "drifts of unit length")):
        rows = Rows(beside)
        for label, group in subject.parts.items():
            found = subject.calibrated(group)
            k95 = found[f"k95{suffix}"]
            heads = {"k95": k95.value, "k95, walk": k95.walk, "k95, decaying walk": k95.decay}
            counts = {head: number(value, "{:.0f}") for head, value in heads.items()}
            key = f"pc1{suffix}" if group is None else f"pc1{suffix}/{group}"
            rows.add(found[f"pc1{suffix}"], key, "{:.1%}", counts, group=word(label))
        spacing = measures.spacing_note(subject.trajectory)
        tables += rows.table(f"pc1_groups{suffix}", f"Share of PC1, {rows_are}", NULLS, spacing)
    return tables


# ----------------------------------------------------------------------------------------------------- updates


def updates(subject: Subject, beside: Beside) -> list[Table]:
    """Alignment of updates with the backbone by phase, and where its sign flips."""
    steps = subject.thinned.steps
    if len(steps) < 4:
        return []
    found: dict[str, dict[str, Calibrated]] = {}
    for label, group in subject.parts.items():
        try:
            found[label] = subject.against_nulls(
                lambda gram: measures.update_statistics(gram, steps, subject.length), group, thinned=True
            )
        except ValueError:  # moved between the kept snapshots only
            continue
    span = steps[1] - steps[0]
    return _phases(subject, beside, found, span) + _flips(subject, beside, found, span)


def _key(subject: Subject, label: str) -> str:
    """Name of a group among published values, where the whole selection is the trunk whatever it is called."""
    return "trunk" if label == subject.trunk else label


def _phases(subject: Subject, beside: Beside, found: Mapping[str, Mapping[str, Calibrated]], span: int) -> list[Table]:
    rows = Rows(beside)
    for phase in PHASES:
        for label, numbers in found.items():
            if phase not in numbers:
                continue
            past = beside_nulls(numbers.get(f"{phase}_past", _UNKNOWN), "{:+.3f}")
            heads = {"past": "measured", "past, decaying walk": "decaying walk", "past, excess": "excess"}
            more = {head: past[column] for head, column in heads.items()}
            rows.add(
                numbers[phase],
                f"{phase}/{_key(subject, label)}",
                "{:.3f}",
                more,
                phase=word(phase),
                group=word(label),
            )
    early, late = measures.phase_borders(subject.length)
    return rows.table(
        "updates",
        "Alignment of updates by phase",
        f"Mean |cos| of {span:,}-step updates with the whole run's raw v_b, which contains them: even orthogonal "
        "updates of these lengths align with it, as the walk shows.",
        "Past: mean signed cos with the v_b of the snapshots before each update, which knows nothing of it; a walk "
        "gives zero.",
        f"Early: midpoints before step {early:,}; late: after step {late:,}.",
    )


def _flips(subject: Subject, beside: Beside, found: Mapping[str, Mapping[str, Calibrated]], span: int) -> list[Table]:
    rows, keys = [], []
    for label, numbers in found.items():
        row = {"group": word(label)}
        for name, words, form in (
            ("flip", "flip", "{:,.0f}"),
            ("early_signed", "early C", "{:+.3f}"),
            ("late_signed", "late C", "{:+.3f}"),
        ):
            if name not in numbers and name != "flip":
                continue  # the run has no such phase
            cell = numbers.get(name, _UNKNOWN)
            keys.append(f"{name}/{_key(subject, label)}")
            row |= {
                words: number(cell.value, form),
                f"{words}, walk": number(cell.walk, form),
                f"{words}, decaying walk": number(cell.decay, form),
                **beside.cell(keys[-1], form, f"{words}, "),
            }
        rows.append(row)
    notes = [
        f"C: signed cosine of {span:,}-step updates with the whole run's raw v_b; flip: end of the first interval "
        "with C < 0, a dash where there is none."
    ]
    return [beside.table("sign_flip", "Where the alignment of updates changes sign", rows, notes, keys)]


# ------------------------------------------------------------------------------------- windows, fraction, growth

_ROLLING = tuple(
    NumberRow(name, f"{statistics()[name].title}, mean")
    for name in ("windows_origin_anchored", "windows_self_anchored", "windows_against_global")
)
_EXTREMES = (
    NumberRow("turning_low", "adjacent windows, self-anchored, |cos|, lowest", "{:.3f}"),
    NumberRow("pc1_low", "PC1 of a window, unit rows, lowest", "{:.1%}"),
    NumberRow("pc1_high", "PC1 of a window, unit rows, highest", "{:.1%}"),
)
_FRACTIONS = (
    NumberRow("raw_last", "fraction along raw v_b, at the end", "{:.1%}", ""),
    NumberRow("raw_mean", "the same, mean over snapshots", "{:.1%}", ""),
    NumberRow("unit_last", "fraction along v_b of unit rows, at the end", "{:.1%}", "fraction_last"),
    NumberRow("unit_mean", "the same, mean over snapshots", "{:.1%}", "fraction_mean"),
    NumberRow("highest_a", "step at which |a| is largest", "{:,.0f}", "highest_coordinate"),
    NumberRow("highest_r", "step at which ||r|| is largest", "{:,.0f}", "highest_residual"),
)


def windows(subject: Subject, beside: Beside) -> list[Table]:
    """Rolling windows: from the origin, from their own start, and against the whole run."""
    if len(subject.trajectory) <= _WINDOW + 1:
        return []
    whole, rows = word(subject.trunk), Rows(beside)
    rows.quantities(subject.calibrated(), _ROLLING, group=whole)
    rows.quantities(subject.against_nulls(measures.rolling_statistics), _EXTREMES, group=whole)
    for label, group in subject.parts.items():
        if group is not None:
            rows.quantities(subject.calibrated(group), _ROLLING[:1], group=word(label))
    spacing = f"Windows of {_WINDOW} snapshots; {measures.spacing_note(subject.trajectory)}"
    return rows.table("windows", "Does the backbone turn? Rolling windows", NULLS, spacing)


def fraction(subject: Subject, beside: Beside) -> list[Table]:
    """Backbone fraction a^2 / ||x||^2 at the end and on average, and where coordinate and residual are largest."""
    steps, rows = subject.trajectory.steps, Rows(beside)
    rows.quantities(subject.against_nulls(lambda gram: measures.split_statistics(gram, steps)), _FRACTIONS)
    return rows.table("backbone_fraction", "Backbone fraction of the drift", NULLS)


def growth_laws(subject: Subject, beside: Beside) -> list[Table]:
    """Exponents of |a| and ||r|| by window, alignment of early and late phase, and what ||r|| goes along with."""
    steps, rows, border = subject.trajectory.steps, Rows(beside), subject.border
    scaled = growth.scaled_windows(subject.length)
    inside = {
        window: f"{lo}_{hi}"
        for window, (lo, hi) in zip(scaled, growth.WINDOWS, strict=True)
        if window[1] <= subject.last_step  # a run that stopped early has not been through the others
    }
    whole = (0, subject.last_step)
    found = subject.against_nulls(
        lambda gram: growth.summary(gram, steps, border, scaled) | _correlations(subject, gram, (whole, *inside))
    )
    for (lo, hi), key in inside.items():
        for name, words in (("a", "|a| ~ t^"), ("r", "||r|| ~ t^")):
            if (value := found.get(f"exponent_{name}_{lo}_{hi}")) is not None:
                lead = word(f"exponent of {words}")
                rows.add(value, f"exponent_{name}_{key}", "{:+.2f}", quantity=lead, steps=word(f"({lo:,}, {hi:,}]"))
    if (value := found.get("early_late")) is not None:
        where = word(f"before and after {border:,}")
        rows.add(value, "early_late", "{:.3f}", quantity=word("|<v_E, v_L>|"), steps=where)
    published = dict(inside)
    if subject.last_step == subject.length:
        published[whole] = f"0_{growth.WINDOWS[-1][1]}"
    behind = subject.backdrop.behind
    metric = "" if behind is None else behind[0].rpartition("/")[2]
    if behind is not None:
        for lo, hi in dict.fromkeys((whole, *inside)):
            if (value := found.get(f"correlation_{lo}_{hi}")) is not None:
                key = f"correlation_{published[lo, hi]}" if (lo, hi) in published else ""
                lead = word(f"correlation of {metric} and ||r||")
                rows.add(value, key, "{:+.2f}", quantity=lead, steps=word(f"({lo:,}, {hi:,}]"))
    return rows.table(
        "growth",
        "How coordinate and residual grow",
        NULLS,
        "v_b of unit rows, a and r of raw drifts; least squares in ln-ln. Decoupled decay under a linear warm-up alone "
        "moves weights as t^2.",
        None if subject.length == 10_000 else f"Windows are shares of {subject.length:,} steps.",
        None
        if behind is None
        else f"Correlations describe: both series follow the schedule, and the nulls pair {metric} with their own "
        "||r||.",
    )


def _correlations(subject: Subject, gram: Gram, inside: Sequence[growth.Window]) -> dict[str, float]:
    """Pearson correlation of ||r|| and the metric that is drawn behind it, by window."""
    steps, behind = subject.trajectory.steps[1:], subject.backdrop.behind
    if behind is None or not subject.has_metrics:
        return {}
    metric = subject.series(behind[0])
    values = growth.at_steps([int(step) for step in metric.index], metric.tolist(), steps)
    try:
        residual = growth.split_drift(gram).residual_norm.tolist()
    except ValueError:
        return {}
    found = {(lo, hi): growth.correlation(steps, values, residual, lo, hi) for lo, hi in inside}
    return {f"correlation_{lo}_{hi}": value for (lo, hi), value in found.items() if value is not None}


def autocorrelation(subject: Subject, beside: Beside) -> list[Table]:
    """Correlation of updates by lag, raw and off theta_0, beside the decaying walk; a free walk gives zero."""
    rows: list[Row] = []
    paths = (subject.trajectory.gram(), nulls.decaying_walk(subject.trajectory.gram(), subject.trajectory.survival))
    for off in (False, True):
        values = [nulls.autocorrelation(gram, 5, off_theta0=off).tolist() for gram in paths]
        for lag, (measured, decay) in enumerate(zip(*values, strict=True), 1):
            if not math.isnan(measured):
                rows.append(
                    {
                        "correlation of": word(f"updates {lag} apart{', off theta_0' if off else ''}"),
                        "measured": number(measured, "{:+.3f}"),
                        "decaying walk": number(decay, "{:+.3f}"),
                        "excess": number(measured - decay, "{:+.3f}"),
                    }
                )
    notes = [
        "A walk without decay gives zero at every lag, whatever its PC1.",
        measures.spacing_note(subject.trajectory),
    ]
    return [beside.table("autocorrelation", "Correlation of updates by lag", rows, notes)] if rows else []
