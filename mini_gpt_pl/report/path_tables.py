"""Tables of one run that follow from its path alone: principal components, updates, windows, growth.

Each number stands beside its nulls and, where a study has one, beside the published value. What is measured is a
function of the Gram matrix, so that a null is the same function of another matrix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mini_gpt_pl.geometry.path import growth, nulls, pca
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.geometry.path.pca import Gram
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.published import Beside
from mini_gpt_pl.report.sheet import NULLS, Cell, Row, Table, beside_nulls, conclusion, number, word
from mini_gpt_pl.report.statistics import mean
from mini_gpt_pl.report.subject import WINDOW, Subject

PHASES = ("early", "middle", "late")
_BORDERS = (0.2, 0.6)  # of the run: steps 2,000 and 6,000 of 10,000
_UNKNOWN = Calibrated(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class NumberRow:
    """A row of a table, as data: which number, in which words and digits, and which published one stands beside it.

    Empty words and an empty form are those of the registry. Without a key of its own the published number has the same
    key, and with an empty one there is none.
    """

    key: str
    words: str = ""
    form: str = ""
    published: str | None = None

    @property
    def published_key(self) -> str:
        """Key of the published number."""
        return self.key if self.published is None else self.published


@dataclass
class Rows:
    """Rows of numbers beside their nulls and published values, and the keys of those values, for the footnotes.

    Example:
        >>> rows = Rows(Beside())
        >>> rows.add(Calibrated(0.8, 0.7, 0.75), "pc1", "{:.0%}", group=word("head"))
        >>> rows.cells[0]["excess"].text
        '+5 pt'
    """

    beside: Beside
    cells: list[Row] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def add(self, one: Calibrated, key: str, form: str, more: Mapping[str, Cell] | None = None, **lead: Cell) -> None:
        """Add a row: what it is, the number beside its nulls, the published value, and what follows."""
        self.keys.append(key)
        self.cells.append({**lead, **beside_nulls(one, form), **self.beside.cell(key, form), **(more or {})})

    def quantities(
        self, numbers: Mapping[str, Calibrated], shown: Sequence[NumberRow], *, conclude: bool = False, **lead: Cell
    ) -> None:
        """Add a row for every quantity that there is, with what it says in words if that is asked for."""
        for row in (row for row in shown if row.key in numbers):
            one, known = numbers[row.key], statistics().get(row.key)
            words, form = row.words or (known.title if known else ""), row.form or (known.format if known else "")
            more = {"in words": word(conclusion(one))} if conclude else {}
            self.add(one, row.published_key, form, more, **lead, quantity=word(words))

    def table(self, name: str, **values: object) -> list[Table]:
        """Lay the rows out; see `laid_out`."""
        return laid_out(self.beside, name, self.cells, self.keys, **values)


def laid_out(beside: Beside, name: str, rows: Sequence[Row], keys: Sequence[str] = (), **values: object) -> list[Table]:
    """Lay out rows under the title and above the footnotes that `tables.yaml` has for them; nothing without rows.

    Args:
        beside: The published run.
        name: Of the table.
        rows: Cells by column.
        keys: Of the published numbers shown, which have footnotes of their own.
        values: For the braces in title and footnotes.
    """
    entry = _words()[name]
    notes = [note.format(nulls=NULLS, **values) for note in entry["notes"]]
    return [beside.table(name, entry["title"].format(**values), rows, notes, keys)] if rows else []


@cache
def _words() -> dict[str, Any]:
    words: dict[str, Any] = yaml.safe_load(files(__package__).joinpath("assets", "tables.yaml").read_text("utf-8"))
    return words


def path_tables(subject: Subject, beside: Beside) -> list[Table]:
    """Make every table of a run's path that its snapshots allow; nothing for weights that never moved."""
    if not subject.moved:
        return []
    made = (overview, groups, updates, windows, fraction, growth_laws, autocorrelation)
    return [table for make in made for table in make(subject, beside)]


def spacing_note(subject: Subject) -> str:
    """Say how many snapshots there are and how far apart, which PC1 and k95 depend on."""
    steps = subject.trajectory.steps
    spans = [later - earlier for earlier, later in itertools.pairwise(steps)]
    apart = f"every {spans[0]:,} steps" if len(set(spans)) == 1 else f"{min(spans):,} to {max(spans):,} steps apart"
    return f"{len(spans)} snapshots after the start, {apart}, to step {steps[-1]:,}."


def overview(subject: Subject, beside: Beside) -> list[Table]:
    """Every calibrated statistic of the whole selection."""
    rows, numbers = Rows(beside), subject.calibrated()
    rows.quantities(numbers, [NumberRow(name) for name in numbers], conclude=not subject.task)
    return rows.table("overview", whole=subject.trunk if subject.task else "path", spacing=spacing_note(subject))


def groups(subject: Subject, beside: Beside) -> list[Table]:
    """PC1 and k95 of every group, raw and with unit rows."""
    tables = []
    for suffix in ("", "_unit"):
        rows = Rows(beside)
        for label, group in subject.parts.items():
            numbers = subject.calibrated(group)
            k95 = numbers[f"k95{suffix}"]
            heads = {"k95": k95.value, "k95, walk": k95.walk, "k95, decaying walk": k95.decay}
            counts = {head: number(value, "{:.0f}") for head, value in heads.items()}
            key = f"pc1{suffix}" if group is None else f"pc1{suffix}/{group}"
            rows.add(numbers[f"pc1{suffix}"], key, "{:.1%}", counts, group=word(subject.in_words(label)))
        tables += rows.table(f"pc1_groups{suffix}", spacing=spacing_note(subject))
    return tables


def phase_borders(length: int) -> tuple[int, int]:
    """Steps at which the phases change: 2,000 and 6,000 of 10,000."""
    early, late = _BORDERS
    return round(early * length), round(late * length)


def phase_of(middle: float, length: int) -> str:
    """Phase of an interval by its midpoint: before 0.2 of the length, to 0.6, after."""
    early, late = phase_borders(length)
    return PHASES[0] if middle < early else PHASES[1] if middle <= late else PHASES[2]


def update_statistics(gram: Gram, steps: Sequence[int], length: int) -> dict[str, float]:
    """Cosines of updates with the backbone by phase, and where their sign flips.

    With the whole run's raw v_b, a(T) > 0: `<phase>` means of |C|, `<phase>_signed` means of C, `flip` the end of the
    first interval with C < 0. With the v_b of the snapshots before: `<phase>_past` means of C. `mean` and `mean_past`
    are over all intervals. What a run has no interval for is left out.

    Args:
        gram: H over evenly spaced snapshots.
        steps: Of those snapshots.
        length: Of the whole schedule, which the phases are shares of.
    """
    whole = pca.update_alignment(gram, pca.pca(gram, pca.drifts(len(gram))[1:]).backbone).tolist()
    past = pca.past_update_alignment(gram).tolist()
    middles = [(before + after) / 2 for before, after in itertools.pairwise(steps)]
    numbers = {"mean": mean([abs(c) for c in whole]), "mean_past": mean(past)}
    for phase in PHASES:
        inside = [index for index, middle in enumerate(middles) if phase_of(middle, length) == phase]
        numbers[phase] = mean([abs(whole[index]) for index in inside])
        numbers[f"{phase}_signed"] = mean([whole[index] for index in inside])
        numbers[f"{phase}_past"] = mean([past[index] for index in inside])
    numbers["flip"] = next((float(step) for step, c in zip(steps[1:], whole, strict=True) if c < 0), math.nan)
    return {name: value for name, value in numbers.items() if not math.isnan(value)}


def updates(subject: Subject, beside: Beside) -> list[Table]:
    """Alignment of updates with the backbone by phase, and where its sign flips."""
    steps = subject.thinned.steps
    if len(steps) < 4:
        return []
    of_parts: dict[str, dict[str, Calibrated]] = {}
    for label, group in subject.parts.items():
        try:
            of_parts[label] = subject.against_nulls(
                lambda gram: update_statistics(gram, steps, subject.length), group, thinned=True
            )
        except ValueError:  # moved between the kept snapshots only
            continue
    # Among published values the whole selection is the trunk, whatever it is called.
    keys = {label: "trunk" if label == subject.trunk else label for label in of_parts}
    span, rows = steps[1] - steps[0], Rows(beside)
    for phase, (label, numbers) in itertools.product(PHASES, of_parts.items()):
        if phase in numbers:
            past = beside_nulls(numbers.get(f"{phase}_past", _UNKNOWN), "{:+.3f}")
            heads = {"past": "measured", "past, decaying walk": "decaying walk", "past, excess": "excess"}
            more = {head: past[column] for head, column in heads.items()}
            rows.add(
                numbers[phase],
                f"{phase}/{keys[label]}",
                "{:.3f}",
                more,
                phase=word(phase),
                group=word(subject.in_words(label)),
            )
    early, late = phase_borders(subject.length)
    flips, shown = [], []
    for label, numbers in of_parts.items():
        row = {"group": word(subject.in_words(label))}
        for name, words, form in (
            ("flip", "flip", "{:,.0f}"),
            ("early_signed", "early C", "{:+.3f}"),
            ("late_signed", "late C", "{:+.3f}"),
        ):
            if name in numbers or name == "flip":  # else the run has no such phase
                one = numbers.get(name, _UNKNOWN)
                shown.append(f"{name}/{keys[label]}")
                sides = {words: one.value, f"{words}, walk": one.walk, f"{words}, decaying walk": one.decay}
                row |= {head: number(value, form) for head, value in sides.items()}
                row |= beside.cell(shown[-1], form, f"{words}, ")
        flips.append(row)
    by_phase = rows.table("updates", span=span, early=early, late=late)
    return by_phase + laid_out(beside, "sign_flip", flips, shown, span=span)


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

    def extremes(gram: Gram) -> dict[str, float]:
        """Of shares of PC1 and of turning, with unit rows from each window's first snapshot."""
        turning = pca.rolling_self_anchored(gram, WINDOW)
        low, high = float(turning.pc1.min()), float(turning.pc1.max())
        return {"pc1_low": low, "pc1_high": high, "turning_low": float(turning.cosines.min())}

    if len(subject.trajectory) <= WINDOW + 1:
        return []
    whole, rows = word(subject.whole), Rows(beside)
    rows.quantities(subject.calibrated(), _ROLLING, group=whole)
    rows.quantities(subject.against_nulls(extremes), _EXTREMES, group=whole)
    for label, group in subject.parts.items():
        if group is not None:
            rows.quantities(subject.calibrated(group), _ROLLING[:1], group=word(label))
    return rows.table("windows", width=WINDOW, spacing=spacing_note(subject))


def fraction(subject: Subject, beside: Beside) -> list[Table]:
    """Backbone fraction a^2 / ||x||^2 at the end and on average, and where coordinate and residual are largest."""
    steps, rows = subject.trajectory.steps, Rows(beside)

    def shares(gram: Gram) -> dict[str, float]:
        raw, unit = (growth.split_drift(gram, normalise=normalise) for normalise in (False, True))
        return {
            **{f"{name}_last": float(split.fraction[-1]) for name, split in (("raw", raw), ("unit", unit))},
            **{f"{name}_mean": float(split.fraction.mean()) for name, split in (("raw", raw), ("unit", unit))},
            "highest_a": float(steps[1 + int(unit.coordinate.abs().argmax())]),
            "highest_r": float(steps[1 + int(unit.residual_norm.argmax())]),
        }

    rows.quantities(subject.against_nulls(shares), _FRACTIONS)
    return rows.table("backbone_fraction")


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
    numbers = subject.against_nulls(
        lambda gram: growth.summary(gram, steps, border, scaled) | _correlations(subject, gram, (whole, *inside))
    )

    def add(name: str, published: str, form: str, quantity: str, where: str) -> None:
        if name in numbers:
            rows.add(numbers[name], published, form, quantity=word(quantity), steps=word(where))

    for (lo, hi), key in inside.items():
        for name, words in (("a", "|a| ~ t^"), ("r", "||r|| ~ t^")):
            where = f"({lo:,}, {hi:,}]"
            add(f"exponent_{name}_{lo}_{hi}", f"exponent_{name}_{key}", "{:+.2f}", f"exponent of {words}", where)
    add("early_late", "early_late", "{:.3f}", "|<v_E, v_L>|", f"before and after {border:,}")
    behind = subject.backdrop.behind
    metric = "" if behind is None else behind[0].rpartition("/")[2]
    keys = dict(inside)
    if subject.last_step == subject.length:
        keys[whole] = f"0_{growth.WINDOWS[-1][1]}"
    for lo, hi in dict.fromkeys((whole, *inside)):
        published = f"correlation_{keys[lo, hi]}" if (lo, hi) in keys else ""
        words, where = f"correlation of {metric} and ||r||", f"({lo:,}, {hi:,}]"
        add(f"correlation_{lo}_{hi}", published, "{:+.2f}", words, where)
    shares = "" if subject.length == 10_000 else f"Windows are shares of {subject.length:,} steps."
    describe = f"both series follow the schedule, and the nulls pair {metric} with their own ||r||"
    return rows.table("growth", shares=shares, correlations=f"Correlations describe: {describe}." if metric else "")


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
    pairs = {(lo, hi): growth.correlation(steps, values, residual, lo, hi) for lo, hi in inside}
    return {f"correlation_{lo}_{hi}": value for (lo, hi), value in pairs.items() if value is not None}


def autocorrelation(subject: Subject, beside: Beside, lags: int = 5) -> list[Table]:
    """Correlation of updates by lag, raw and off theta_0, beside the decaying walk; a free walk gives zero."""
    rows: list[Row] = []
    paths = subject.paths()
    for off in (False, True):
        pair = (nulls.autocorrelation(gram, lags, off_theta0=off).tolist() for gram in (paths.measured, paths.decaying))
        for lag, (measured, decay) in enumerate(zip(*pair, strict=True), 1):
            numbers = {"measured": measured, "decaying walk": decay, "excess": measured - decay}
            if not math.isnan(measured):
                name = word(f"updates {lag} apart{', off theta_0' if off else ''}")
                rows.append({"correlation of": name} | {k: number(v, "{:+.3f}") for k, v in numbers.items()})
    return laid_out(beside, "autocorrelation", rows, spacing=spacing_note(subject))
