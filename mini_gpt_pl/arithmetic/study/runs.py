"""Runs of residues as their report reads them: when they memorised and generalised, and their path in windows."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import pandas as pd
import torch
from typing_extensions import override

from mini_gpt_pl.arithmetic.milestones import BEGUN, MEMORISED, MILESTONES
from mini_gpt_pl.arithmetic.operations import OPERATIONS
from mini_gpt_pl.arithmetic.study.published import SETTING
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import innovations, nulls, resampled, windows
from mini_gpt_pl.geometry.path.centred import centred_statistics
from mini_gpt_pl.geometry.path.innovations import Correlation
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.report.families import names
from mini_gpt_pl.report.settings import differences, plain
from mini_gpt_pl.report.sheet import Cell, number, word
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import TRAJECTORY, Run

TEST, TRAIN, LOSS = "eval/test_accuracy", "eval/train_accuracy", "eval/train_loss"
_PERMUTATIONS = 20
_FEWEST = 4  # snapshots: the PC1 of two increments is arithmetic
COLUMNS: Mapping[str, str] = {
    "train_99": "train 99 %",
    "test_50": "t50",
    "test_90": "t90",
    "test_95": "t95",
    "test_98": "t98",
    "test_98_thrice": "stop",
}
"""Column of each milestone."""
NULLS: Mapping[str, str] = {
    "walk": "walk",
    "decaying_walk": "decay, ‖d‖",
    "innovation_walk": "decay, ‖e‖",
    "autoregressive_walk": "AR(1)",
    "permuted": "permuted",
}
"""Nulls of a path, and their columns."""
DECAYING = ("decaying_walk", "innovation_walk")
"""The two that keep lengths under the run's own decay; an excess over one of them names it."""
NULLS_NOTE = (
    "Walk: the run's step lengths ‖d‖ in orthogonal directions. Decay, ‖d‖: the same under the run's weight decay, "
    "with innovations as long as that takes. Decay, ‖e‖: under decay with the lengths of the measured innovations "
    "e = θ_k - ρ_k θ_(k-1). The two differ where training pushes back against "
    "decay. AR(1): the third with the measured correlation of successive innovations. Permuted: the measured "
    "increments in other orders, median of 20."
)

Numbers = Mapping[str, Mapping[str, float]]
"""Of a path: statistic -> measured and each null."""


@dataclass(frozen=True)
class Phase:
    """A stretch of steps.

    Args:
        name: What happens in it.
        first: Step that it starts at.
        last: Step that it ends at.
        steps: The snapshots in it that count; all of them for None.
    """

    name: str
    first: int
    last: int
    steps: tuple[int, ...] | None = field(default=None, repr=False)

    @property
    def words(self) -> str:
        """Name and steps."""
        return f"{self.name}, {self.first:,} to {self.last:,}"


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
        losses_of = {
            probe.get("name", "all"): probe.get("losses") for probe in self.callback_settings("CommutatorProbe")
        }

        def rank(name: str) -> int:
            losses = losses_of.get(name)
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

    @property
    def repeats(self) -> bool:
        """Whether it repeats one of the paper's runs at its main learning rate: published numbers go beside it."""
        return not self.differs and self.rate == SETTING["learning rate"]

    # ------------------------------------------------------------------------------------------- milestones

    @cached_property
    def steps(self) -> dict[str, int | None]:
        """When it memorised (train_99), began to generalise (test_10), and the grok step by every definition."""
        listed = (MEMORISED, BEGUN, *MILESTONES[1:])
        return {
            milestone.name: milestone.in_series(self.series(f"eval/{milestone.of}_accuracy")) for milestone in listed
        }

    @property
    def groks(self) -> bool:
        """Whether it reached 90 % of the test set."""
        return self.steps["test_90"] is not None

    @property
    def cut(self) -> Phase:
        """From the start to the stop of the original study, three evaluations with 98 %, or to the end."""
        return Phase("to the stop", 0, min(self.steps["test_98_thrice"] or self.last_step, self.last_step))

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
        if not labels:
            return {}
        described = _described(grams[moved].contiguous().numpy().tobytes(), len(labels), tuple(trajectory.survival))
        return dict(zip(labels, described, strict=True))

    def correlation(self, phase: Phase, label: str, *, tangential: bool) -> Correlation:
        """Correlation of successive innovations of a group, or of the whole, in a phase."""
        trajectory = self.within(phase)
        group = None if label == self.trunk else label
        return innovations.correlation(
            trajectory.gram(group), trajectory.survival, trajectory.dim_of(group), tangential=tangential
        )


# Tables, claims and figures of one report ask for the same paths; fifteen runs have 90 windows.
@lru_cache(maxsize=512)
def _described(content: bytes, count: int, survival: tuple[float, ...]) -> list[Numbers]:
    """Statistics of several paths of one decay, given as the bytes of their Grams, and of each of their nulls."""
    grams = torch.frombuffer(bytearray(content), dtype=torch.float64).view(count, len(survival), len(survival))
    paths = [
        grams,
        nulls.walk(grams),
        nulls.decaying_walk(grams, survival),
        innovations.innovation_walk(grams, survival),
        innovations.autoregressive_walk(grams, survival),
        *[resampled.permuted(gram, _PERMUTATIONS) for gram in grams],
    ]
    statistics_of = centred_statistics(torch.cat(paths), survival)
    described: list[Numbers] = []
    for k in range(count):
        one: dict[str, dict[str, float]] = {}
        for name, values in statistics_of.items():
            closed = values[: 5 * count].view(5, count)[:, k].tolist()
            drawn = values[5 * count :].view(count, _PERMUTATIONS)[k]
            one[name] = dict(zip(("measured", *NULLS), [*closed, float(drawn.nanquantile(0.5))], strict=True))
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
    listed = [
        Phase("memorisation", 0, memorised),
        Phase("plateau", memorised, begun),
        Phase("transition", begun, ended),
        Phase("after", ended, last),
    ]
    return [window for window in listed if window.last > window.first]


def common_windows(runs: Sequence[ResidueRun]) -> list[Phase]:
    """The same steps for all runs: as far as the shortest goes, and the median phases of those that generalise.

    Only snapshots that all runs have count, so that a run recorded more often is thinned: a PC1 depends on the number
    of snapshots.
    """
    recorded = [run.trajectory.steps for run in runs]
    shared = tuple(sorted(set(recorded[0]).intersection(*recorded[1:])))
    last = shared[-1] if shared else 0
    shown = [Phase("all runs alike", 0, last)]
    if reference := [run.steps for run in runs if run.groks and run.decay]:
        middle: dict[str, int | None] = {}
        for name in ("train_99", "test_10", "test_98_thrice"):
            reached = [steps[name] for steps in reference]
            reached_by = [last if step is None else min(step, last) for step in reached]
            middle[name] = int(statistics.median_low(reached_by))
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


def median(values: Sequence[float]) -> float:
    """Median of what is known, NaN for nothing."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.median(numbers) if numbers else math.nan


def reached(run: ResidueRun, name: str) -> Cell:
    """Step of a milestone, in words where it was never reached."""
    step = run.steps[name]
    return word("never") if step is None else number(step, "{:,.0f}")


def generalised(run: Run) -> tuple[str, ...]:
    """When a run memorised and generalised, in a sentence for the head of its report; nothing for any other run."""
    said = []
    for one in residue_runs([run]):
        memorised, t90, end = one.steps["train_99"], one.steps["test_90"], one.series(TEST)
        said.append(
            f"99 % of the training set {_reached(memorised)}, 90 % of the test set {_reached(t90)}; the last "
            f"evaluation, at step {int(end.index[-1]):,}, has {end.iloc[-1]:.1%}."
        )
    return tuple(said)


def _reached(step: int | None) -> str:
    return "were never reached" if step is None else f"were reached at step {step:,}"
