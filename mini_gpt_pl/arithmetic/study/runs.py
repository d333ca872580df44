"""Runs of residues as their report reads them: when they generalised, their path in windows, which repeat which."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import pandas as pd
import torch
from typing_extensions import override

from mini_gpt_pl.arithmetic.milestones import BEGUN, MEMORISED, MILESTONES
from mini_gpt_pl.arithmetic.nulls import walks
from mini_gpt_pl.arithmetic.operations import OPERATIONS
from mini_gpt_pl.arithmetic.study.words import Value, Values, lay, words
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import innovations, resampled, windows
from mini_gpt_pl.geometry.path.centred import centred_statistics
from mini_gpt_pl.geometry.path.innovations import Correlation
from mini_gpt_pl.geometry.path.pca import Gram
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.report.families import names
from mini_gpt_pl.report.published import listed
from mini_gpt_pl.report.settings import (
    OF_OPTIMIZER,
    config_facts,
    differences,
    facts,
    mapping,
    plain,
    said,
    transformer,
)
from mini_gpt_pl.report.sheet import Cell, Table
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import TRAJECTORY, Run

TEST, TRAIN, LOSS = "eval/test_accuracy", "eval/train_accuracy", "eval/train_loss"
_PERMUTATIONS = 20
_FEWEST = 4  # snapshots: the PC1 of two increments is arithmetic
PUBLISHED: Mapping[str, Any] = words("published")
SETTING: Mapping[str, Any] = PUBLISHED["setting"]
"""Facts of the paper's runs, but for operation, seed, length and weight decay (1, or none)."""
COLUMNS: Mapping[str, str] = words("tables")["milestones"]
"""Column of each milestone."""
NULLS: Mapping[str, str] = words("tables")["nulls"]
"""Nulls of a path, and their columns."""
OWN_SEED = "by the seed"
"""The split of a run that has no seed of its own for it."""

Numbers = Mapping[str, Mapping[str, float]]
"""Of a path: statistic -> measured and each null."""


def residue_facts(run: Run) -> dict[str, Any]:
    """What decides how a run of residues goes, in words and numbers that can be compared."""
    config = run.settings
    model, data = mapping(config, "model"), mapping(config, "data")
    settings = config_facts(config)
    recorder = next(iter(run.callback_settings("TrajectoryRecorder")), {})
    operations, split = data.get("operations"), said(data, "split_seed", OWN_SEED)
    return {
        "model": transformer(model.get("size")),
        **{key: settings[key] for key in (*OF_OPTIMIZER, "warm-up", "schedule length", "steps")},
        "sequences a step": settings["examples a step"],
        "clipping": settings["clipping"],
        "operation": data.get("operation"),
        "modulus": data.get("modulus"),
        "training fraction": data.get("train_fraction"),
        "operations": None if operations is None else ", ".join(operations),
        "mirror pairs together": data.get("mirror_together"),
        "split": OWN_SEED if split == data.get("seed", config.get("seed_everything")) else split,
        "identical blocks": model.get("identical_blocks"),
        "eps": mapping(mapping(model, "optimizer"), "init_args").get("eps"),
        "steps a snapshot": mapping(recorder, "schedule").get("every"),
        "seed": settings["seed"],
    }


@dataclass(frozen=True)
class Phase:
    """A stretch of steps; of its snapshots those at `steps` count, all of them for None."""

    name: str
    first: int
    last: int
    steps: tuple[int, ...] | None = field(default=None, repr=False)

    @property
    def words(self) -> str:
        """Name and steps."""
        return f"{self.name}, {self.first:,} to {self.last:,}"

    def middle(self, series: pd.Series[float]) -> float:
        """Median of a series' records inside; NaN without any. See `inside`."""
        return median(self.inside(series))

    def inside(self, series: pd.Series[float]) -> list[float]:
        """The records of a series; one at the first step belongs to the phase before."""
        return series[(series.index > self.first) & (series.index <= self.last)].tolist()


@dataclass(frozen=True)
class ResidueRun(Subject):
    """A run of residues; see `report.subject.Subject`."""

    @property
    def operation(self) -> str:
        """The operation, or what else it learned; apart where the length of the weights was held to another run's."""
        name = str(self.facts["operation"] or self.task)
        return f"{name}, tied norm" if self.is_tied else name

    @cached_property
    def is_tied(self) -> bool:
        """Whether its weights were held to the length that another run's had: neither decayed nor free of it."""
        return bool(self.callback_settings("TiedNorm"))

    @property
    def is_free(self) -> bool:
        """Whether it is a control without weight decay."""
        return not self.decay and not self.is_tied

    @property
    def was_disturbed(self) -> bool:
        """Whether something changed its gradients, updates or weights on the way."""
        return any(self.callback_settings(name) for name in ("SubspaceIntervention", "Kick"))

    @property
    def decay(self) -> float:
        """Weight decay."""
        return float(self.facts["weight decay"] or 0.0)

    @property
    def rate(self) -> float:
        """Learning rate."""
        return float(self.facts["learning rate"] or math.nan)

    @property
    def seed(self) -> int | None:
        """Of weights, split and batches."""
        seed = self.facts["seed"]
        return None if seed is None else int(seed)

    @property
    def unit(self) -> str:
        """What runs share that are no independent draws: operation, decay and learning rate."""
        return f"{self.kind}, decay {plain(self.decay)}, lr {plain(self.rate)}"

    @property
    def kind(self) -> str:
        """The operation, and whether it is a control."""
        return f"{self.operation}, no decay" if self.is_free else self.operation

    @override
    def series(self, name: str) -> pd.Series[float]:
        return super().series(name) if self.has_metrics else pd.Series(dtype=float)

    def at(self, name: str, step: int) -> float:
        """A metric's last record up to a step; NaN before the first."""
        until = self.series(name).loc[:step]
        return float(until.iloc[-1]) if len(until) else math.nan

    @cached_property
    def commutators(self) -> tuple[str, ...]:
        """Names of all commutators that were measured: a run of several tasks has them within tasks and across."""
        columns = map(str, self.metrics.columns) if self.has_metrics else ()
        return tuple(match[1] for column in columns if (match := re.fullmatch("[^/]+/([^/]+)/defect", column)))

    @cached_property
    def reported(self) -> str:
        """Name of the commutator that is reported; empty if none was measured.

        Of several that of the training loss, else the first of one task (one loss for both batches), else the first.
        """
        probes = {probe.get("name", "all"): probe for probe in self.callback_settings("CommutatorProbe")}

        def rank(name: str) -> int:
            losses = probes.get(name, {}).get("losses")
            return 0 if losses is None else 1 + (losses[0] != losses[1])

        return min(self.commutators, key=rank, default="")

    def commutator(self, name: str) -> pd.Series[float]:
        """Number of the commutator probe by step; empty without one."""
        return self.series(f"commutator/{self.reported}/{name}")

    @cached_property
    def differs(self) -> tuple[str, ...]:
        """What is not as in the paper, its learning rate aside; empty for a run that repeats it.

        The paper's snapshots are 100 steps apart in the runs with weight decay at its main rate alone.
        """
        free = ["learning rate"]
        if not self.decay or self.rate != SETTING["learning rate"]:
            free.append("steps a snapshot")
        differing = differences(self.facts, SETTING, free)
        if self.decay not in (0.0, 1.0):
            differing.append(f"weight decay {plain(self.decay)} instead of 1")
        if self.is_tied:
            differing.append("norm tied to another run's instead of free")
        return tuple(differing)

    def published(self, name: str, default: Any = None) -> Any:
        """What `published.yaml` has of the run's operation, without decay under `<name>_no_decay`.

        The default for a run that does not repeat one of the paper's at its main learning rate.
        """
        if self.differs or self.rate != SETTING["learning rate"]:
            return default
        return PUBLISHED.get(f"{name}_no_decay" if self.is_free else name, {}).get(self.operation, default)

    # ------------------------------------------------------------------------------------------- milestones

    @cached_property
    def steps(self) -> dict[str, int | None]:
        """When it memorised (train_99), began to generalise (test_10), and the grok step by every definition."""
        listed = (MEMORISED, BEGUN, *MILESTONES[1:])
        return {one.name: one.in_series(self.series(f"eval/{one.of}_accuracy")) for one in listed}

    def reached(self, *names: str) -> Values:
        """Steps of milestones by column, in words where one was never reached."""
        return {COLUMNS[name]: step_of(self.steps[name]) for name in names}

    @property
    def groks(self) -> bool:
        """Whether it reached 90 % of the test set."""
        return self.steps["test_90"] is not None

    @property
    def cut(self) -> Phase:
        """From the start to the stop of the original study, three evaluations with 98 %, or to the end."""
        return Phase("to the stop", 0, min(self.steps["test_98_thrice"] or self.last_step, self.last_step))

    @cached_property
    def own_phases(self) -> list[Phase]:
        """Its phases; the run to its stop where it has none."""
        return phases(self.steps, self.last_step) or [self.cut]

    @property
    def phases(self) -> list[Phase]:
        """The run to its stop, then in its own phases."""
        return [self.cut, *phases(self.steps, self.last_step)]

    # ------------------------------------------------------------------------------------------------ path

    def within(self, phase: Phase) -> Trajectory:
        """Its path in a phase.

        Raises:
            UserError: The phase holds fewer than three snapshots.
        """
        return windows.window(self.trajectory, phase.first, phase.last, steps=phase.steps)

    def numbers(self, phase: Phase) -> dict[str, Numbers]:
        """Numbers of each group and of the whole in a phase, beside their nulls; empty with under four snapshots."""
        try:
            trajectory = self.within(phase)
        except UserError:
            return {}
        if len(trajectory) < _FEWEST:
            return {}
        grams = torch.cat([trajectory.grams, trajectory.gram()[None]])
        moved = grams.diagonal(dim1=1, dim2=2)[:, 1:].sum(1) > 0
        labels = [label for label, moves in zip((*trajectory.groups, self.trunk), moved, strict=True) if moves]
        content = grams[moved].contiguous().numpy().tobytes()
        described = _described(content, len(labels), tuple(trajectory.survival)) if labels else []
        return dict(zip(labels, described, strict=True))

    def part(self, phase: Phase, label: str) -> tuple[Gram, list[float], int]:
        """Gram matrix, survival and number of weights of a group, or of the whole, in a phase."""
        trajectory, group = self.within(phase), None if label == self.trunk else label
        return trajectory.gram(group), trajectory.survival, trajectory.dim_of(group)

    def correlation(self, phase: Phase, label: str, *, tangential: bool) -> Correlation:
        """Correlation of successive innovations of a group, or of the whole, in a phase."""
        return innovations.correlation(*self.part(phase, label), tangential=tangential)


# Tables, claims and figures of one report ask for the same paths; fifteen runs have 90 windows.
@lru_cache(maxsize=512)
def _described(content: bytes, count: int, survival: tuple[float, ...]) -> list[Numbers]:
    """Statistics of several paths of one decay, given as the bytes of their Grams, and of each of their nulls."""
    grams = torch.frombuffer(bytearray(content), dtype=torch.float64).view(count, len(survival), len(survival))
    closed = [grams, *walks(grams, survival).values()]
    permuted = [resampled.permuted(gram, _PERMUTATIONS) for gram in grams]
    statistics_of = centred_statistics(torch.cat([*closed, *permuted]), survival)
    described: list[Numbers] = []
    for k in range(count):
        one: dict[str, dict[str, float]] = {}
        for name, values in statistics_of.items():
            drawn = values[len(closed) * count :].view(count, _PERMUTATIONS)[k]
            first = values[: len(closed) * count].view(len(closed), count)[:, k].tolist()
            one[name] = dict(zip(("measured", *NULLS), [*first, float(drawn.nanquantile(0.5))], strict=True))
        described.append(one)
    return described


def phases(steps: Mapping[str, int | None], last: int) -> list[Phase]:
    """Memorisation, plateau, transition and what comes after; those that a run does not have are left out.

    The plateau lies between 99 % of the training set and 10 % of the test set, the transition between that and the
    third evaluation in a row with 98 %.
    """
    memorised, begun, stop = (steps[name] for name in ("train_99", "test_10", "test_98_thrice"))
    if memorised is None:
        return []
    begun = last if begun is None else max(begun, memorised)
    ended = last if stop is None else max(stop, begun)
    borders = itertools.pairwise((0, memorised, begun, ended, last))
    named = zip(("memorisation", "plateau", "transition", "after"), borders, strict=True)
    return [Phase(name, first, end) for name, (first, end) in named if end > first]


def common_windows(runs: Sequence[ResidueRun]) -> list[Phase]:
    """The same steps for all runs: as far as the shortest goes, and the median phases of those that generalise.

    Only snapshots that all runs have count, so that a run recorded more often is thinned: a PC1 depends on the number
    of snapshots.
    """
    shared = tuple(sorted(set.intersection(*(set(run.trajectory.steps) for run in runs))))
    last = shared[-1] if shared else 0
    shown = [Phase("all runs alike", 0, last)]
    if reference := [run.steps for run in runs if run.groks and run.decay]:
        middle: dict[str, int | None] = {}
        for name in ("train_99", "test_10", "test_98_thrice"):
            steps = [last if (step := of[name]) is None else min(step, last) for of in reference]
            middle[name] = int(statistics.median_low(steps))
        shown += phases(middle, last)
    return [replace(window, steps=shared) for window in shown]


def residue_runs(runs: Sequence[Run]) -> list[ResidueRun]:
    """Runs that recorded a path and were evaluated on both sets, by operation, decay and seed.

    Of several, those that were intervened in are left out: an arm is no seed of its baseline.
    """
    called = names(runs)
    recorded = [ResidueRun.of(run, called[run]) for run in runs if (run.path / TRAJECTORY).is_file()]
    evaluated = [run for run in recorded if len(run.series(TEST)) and len(run.series(TRAIN))]
    order: dict[str, int] = {name: k for k, name in enumerate(OPERATIONS)}
    return sorted(
        (run for run in evaluated if len(runs) == 1 or not run.was_disturbed),
        key=lambda run: (-run.decay, order.get(run.operation, 9), run.operation, run.rate, run.seed or 0),
    )


def median(values: Iterable[float]) -> float:
    """Median of the values that are not NaN; NaN for none."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.median(numbers) if numbers else math.nan


def settings_of(run: Run) -> dict[str, Value]:
    """Columns that say what sets a run apart from others of its task."""
    of = facts(run)
    return {"lr": plain(of["learning rate"]), "decay": plain(of["weight decay"]), "seed": plain(of["seed"])}


def step_of(step: int | None) -> int | str:
    """A step, or in words that it was never reached."""
    return "never" if step is None else step


def generalised(run: Run) -> tuple[str, ...]:
    """When a run memorised and generalised, in a sentence for the head of its report; nothing for any other run."""
    runs = residue_runs([run])
    if not runs:
        return ()
    steps, end = (runs[0].steps["train_99"], runs[0].steps["test_90"]), runs[0].series(TEST)
    memorised, t90 = ("were never reached" if step is None else f"were reached at step {step:,}" for step in steps)
    last = f"the last evaluation, at step {int(end.index[-1]):,}, has {end.iloc[-1]:.1%}"
    return (f"99 % of the training set {memorised}, 90 % of the test set {t90}; {last}.",)


# ------------------------------------------------------------------------------------------- runs side by side

_OWN_COLUMNS = ("operation", "learning rate", "weight decay", "seed")
_LENGTH = ("steps", "steps a snapshot")
"""Facts that say how long and how often a run was recorded, rather than how it goes."""


def _setting(run: ResidueRun, *free: str) -> str:
    """What decides how a run goes, but for some facts, as one string."""
    return repr((run.operation, {key: value for key, value in run.facts.items() if key not in free}))


def groups_of(runs: Sequence[ResidueRun]) -> list[list[ResidueRun]]:
    """Gather runs that agree in all facts but the seed, in the order in which they were given."""
    groups: dict[str, list[ResidueRun]] = {}
    for run in runs:
        groups.setdefault(_setting(run, "seed"), []).append(run)
    return list(groups.values())


def distinct(runs: Sequence[ResidueRun]) -> list[ResidueRun]:
    """Keep one run of each setting and seed, the longest: the same run once more is no second draw."""
    draws: dict[str, list[ResidueRun]] = {}
    for k, run in enumerate(runs):
        draws.setdefault(_setting(run, *_LENGTH) if run.seed is not None else str(k), []).append(run)
    longest = [max(alike, key=lambda run: (bool(run.reported), run.last_step)) for alike in draws.values()]
    return [run for run in runs if any(run is other for other in longest)]


def repeated_note(runs: Sequence[ResidueRun]) -> str | None:
    """Name the runs that `distinct` leaves out; None if there are none."""
    draws = distinct(runs)
    twice = [run.label for run in runs if not any(run is draw for draw in draws)]
    return f"Of one setting and seed as a longer run, and not counted again: {', '.join(twice)}." if twice else None


def run_values(run: ResidueRun, runs: Sequence[ResidueRun], seeds: int | None = None) -> Values:
    """What a run was, at the head of its row; what else the runs of the table differ in has a column.

    In the row of a group of `groups_of`, of which it is any, the number of seeds takes the place of its own.
    """
    facts = run.facts
    apart = [key for key in facts if key not in _OWN_COLUMNS and len({repr(r.facts.get(key)) for r in runs}) > 1]
    differing = [f"{key} {plain(facts[key])}" for key in apart if facts[key] is not None]
    return {
        "operation": run.operation,
        "lr": plain(run.rate),
        "decay": plain(run.decay),
        "else": "; ".join(differing) or "-",
        **({"seed": run.seed} if seeds is None else {"seeds": seeds}),
    }


def spread(values: Sequence[float], form: str = "{:,.0f}") -> Cell | None:
    """Least and greatest of some values; nothing without any."""
    if not values:
        return None
    low, high = form.format(min(values)), form.format(max(values))
    ends = {"low": float(min(values)), "high": float(max(values))}
    return Cell(low if low == high else f"{low} to {high}", None, ends)


def lay_runs(name: str, rows: Iterable[Values], runs: Sequence[ResidueRun], **noted: object) -> Table:
    """Lay out a table over runs; see `lay`. Notes may say which commutator is shown, or why no published number is."""
    return lay(name, rows, commutator=commutator_note(runs), setting=_setting_note(runs), **noted)


def _setting_note(runs: Sequence[ResidueRun]) -> str | None:
    other = next((run for run in runs if run.differs), None)
    said = "Published numbers stand only beside runs that repeat the paper's;"
    return None if other is None else f"{said} {other.label} has {listed(other.differs)}."


def commutator_note(runs: Sequence[ResidueRun]) -> str | None:
    """Say which commutator a table shows where runs have several."""
    several = next((run for run in runs if len(run.commutators) > 1), None)
    if several is None:
        return None
    others = ", ".join(name for name in several.commutators if name != several.reported)
    return f"The commutator is {several.reported}; {several.label} also measured {others}, which this does not show."
