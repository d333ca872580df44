"""A run as the subject of a report: its path, windows and nulls, and what a replay or the run itself measured."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from matplotlib.axes import Axes

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import Change, mark_change
from mini_gpt_pl.geometry.path import nulls, windows
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.geometry.path.pca import Gram
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.alignment import noise_floor
from mini_gpt_pl.report.settings import facts
from mini_gpt_pl.runs.folder import METRICS, TRAJECTORY, Run
from mini_gpt_pl.tasks import tasks

SPAN = 200
"""Optimizer steps of an update, where snapshots allow."""
WINDOW = 10
"""Snapshots of a rolling window."""
_READ = ("config", "metrics", "trajectory")

Estimate = tuple[float, float]
"""A value and its standard error or standard deviation, NaN for what is missing."""


@dataclass(frozen=True)
class Backdrop:
    """What a study adds to figures and tables of every run of it.

    Args:
        behind: Metric that is drawn behind the backbone, and its label; None for none.
        change: Where a run's objective changes; its step is also the border of early and late phase.
        losses: Parts of the loss whose gradients are measured, by metric, in words.
    """

    behind: tuple[str, str] | None = None
    change: Callable[[Run], Change | None] = lambda run: None
    losses: Mapping[str, str] = field(default_factory=dict)


class Estimates(NamedTuple):
    """A quantity by step; `live` if it was measured while the run went on, with the v_b of the snapshots before."""

    values: dict[int, Estimate]
    live: bool


class Paths(NamedTuple):
    """Gram matrices of a path, of its walk and of its decaying walk."""

    measured: Gram
    walk: Gram
    decaying: Gram


@dataclass(frozen=True)
class Subject(Run):
    """A run whose path is read, measured and calibrated once, with `bootstrap` resamples behind the 95 % intervals.

    Example:
        >>> subject = Subject.of(Run(Path("runs/mine")))  # doctest: +SKIP
        >>> subject.calibrated()["pc1"].excess  # doctest: +SKIP
    """

    name: str = ""
    bootstrap: int = 200

    @classmethod
    def of(cls, run: Run, name: str = "", bootstrap: int | None = None) -> Self:
        """Return a run as a subject; one that is the same already is itself, and what was read is not read again."""
        name = name or getattr(run, "name", "")
        bootstrap = getattr(run, "bootstrap", 200) if bootstrap is None else bootstrap
        if isinstance(run, cls) and (run.name, run.bootstrap) == (name, bootstrap):
            return run
        subject = cls(run.path, name, bootstrap)
        subject.__dict__.update({key: value for key, value in run.__dict__.items() if key in _READ})
        return subject

    # ---------------------------------------------------------------------------------------------- what it is

    @property
    def label(self) -> str:
        """What the run is called."""
        return self.name or self.path.resolve().name

    @property
    def whole(self) -> str:
        """The whole selection in words: the recorder's name for it, where a configuration or a study gives it one."""
        named = self.task or any("name" in settings for settings in self.callback_settings("TrajectoryRecorder"))
        return self.trunk if named else "all recorded weights"

    def in_words(self, label: str) -> str:
        """A group's label, or that of the whole selection, in words."""
        return self.whole if label == self.trunk else label

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """What decides how the run goes; see `settings.facts`."""
        return facts(self)

    @property
    def has_metrics(self) -> bool:
        """Whether the run logged anything."""
        return (self.path / METRICS).is_file()

    @property
    def last_step(self) -> int:
        """Step of the last snapshot."""
        return self.trajectory.steps[-1]

    @property
    def length(self) -> int:
        """Steps that the run was meant to last, by its schedule: phases and windows are shares of it.

        A run that was broken off, or stopped early, has the phases of the whole.
        """
        return max(self.last_step, int(self.facts.get("schedule length") or 0))

    @cached_property
    def backdrop(self) -> Backdrop:
        """What the run's study adds to its figures; nothing for a run of no study."""
        task = tasks().get(self.task)
        return Backdrop() if task is None else task.load("contents").backdrop

    @property
    def gradient_parts(self) -> dict[str, tuple[str, str]]:
        """Gradients whose alignment is measured, by metric: their name in a replay, and in words."""
        losses = self.backdrop.losses
        return {"gradient": ("combined", "combined")} | {name: (name, words) for name, words in losses.items()}

    def mark(self, *all_axes: Axes) -> None:
        """Draw where the run's objective changes into a figure's axes."""
        mark_change(self.backdrop.change(self), *all_axes)

    @cached_property
    def border(self) -> int:
        """Step between the early and the late phase: where the objective changes or, if it does not, half-way."""
        change = self.backdrop.change(self)
        return change.step if change is not None else self.last_step // 2

    # ---------------------------------------------------------------------------------------------- the path

    @cached_property
    def _calibrations(self) -> dict[str | None, dict[str, Calibrated]]:
        return {}

    def calibrate(self, group: str | None = None) -> dict[str, Calibrated]:
        """Put every statistic of a group's path, or of the whole selection's for None, beside its nulls.

        Raises:
            UserError: There are fewer than three snapshots, or the weights never moved.
        """
        trajectory = self.trajectory
        if len(trajectory) < 3:
            raise UserError(f"the run {self.path} has {len(trajectory)} snapshots: nulls need at least three")
        if len(trajectory.groups) == 1:
            group = None  # a selection without groups is one group, and its own whole
        if group not in self._calibrations:
            try:
                self._calibrations[group] = nulls.calibrate(
                    trajectory.gram(group),
                    trajectory.survival_of(group),
                    null=trajectory.decaying_walk(group),
                    curves=True,
                    bootstrap=self.bootstrap,
                )
            except ValueError as error:
                raise UserError(f"the weights of {group or 'the run'} in {self.path} never moved ({error})") from None
        return dict(self._calibrations[group])

    def calibrated(self, group: str | None = None) -> dict[str, Calibrated]:
        """Return the same as `calibrate`, and nothing for weights that never moved, or hardly any snapshots."""
        try:
            return self.calibrate(group)
        except UserError:
            return {}

    @property
    def moved(self) -> bool:
        """Whether there is a path to speak of: three snapshots at least, and weights that moved."""
        return bool(self.calibrated())

    @property
    def decay_known(self) -> bool:
        """Whether it is known what weight decay took of the weights, if there is a path at all."""
        return not (self.path / TRAJECTORY).is_file() or self.trajectory.decay_known()

    @property
    def decay_left(self) -> str:
        """Share of the initial weights that weight decay alone left, in words."""
        left = self.trajectory.survival[-1]
        return "not known" if math.isnan(left) else f"{left:.0%}"

    @property
    def labels(self) -> list[str]:
        """Groups, moved or not, then the whole selection; a selection of one group is its own whole."""
        groups = list(self.trajectory.groups)
        return [*(groups if len(groups) > 1 else ()), self.trunk]

    @property
    def parts(self) -> dict[str, str | None]:
        """Groups that moved and the whole selection: label -> name of the group, None for the whole."""
        labelled = {label: None if label == self.trunk else label for label in self.labels}
        return {label: group for label, group in labelled.items() if self.calibrated(group)}

    def floor(self, label: str) -> float:
        """Mean |cos| of isotropic vectors with as many coordinates as a group, or as the whole selection."""
        return noise_floor(self.trajectory.dim_of(None if label == self.trunk else label))

    def paths(self, group: str | None = None) -> Paths:
        """Return the path of a group, or of the whole selection for None, and both of its nulls.

        Raises:
            UserError: No weights have moved.
        """
        self.drift_rows  # noqa: B018 (raises for a run without a path)
        gram = self.trajectory.gram(group)
        return Paths(gram, nulls.walk(gram), self.trajectory.decaying_walk(group))

    def against_nulls(
        self, describe: Callable[[Gram], Mapping[str, float]], group: str | None = None, *, thinned: bool = False
    ) -> dict[str, Calibrated]:
        """Put numbers of a group's path, or of the whole selection's for None, beside those of both walks.

        Args:
            describe: Numbers of any H, by name.
            group: Of parameters.
            thinned: Of the path as it is seen every `SPAN` steps.

        Raises:
            ValueError: Nothing moved.
        """
        trajectory = self.thinned if thinned else self.trajectory
        return against_nulls(trajectory.gram(group), trajectory.decaying_walk(group), describe)

    @cached_property
    def thinned(self) -> Trajectory:
        """The path seen every `SPAN` steps; see `update_span`."""
        return thin(self.trajectory, update_span(self.trajectory.steps))

    # ------------------------------------------------------------------------------------------ what was measured

    @cached_property
    def replay(self) -> dict[int, dict[str, Any]]:
        """What a replay measured at each stored checkpoint, by rising step; empty without one."""
        return dict(sorted(self.replayed.items()))

    def replayed_at(self, *keys: str) -> dict[int, Any]:
        """Return one entry of every replayed checkpoint that has it, by step."""
        return {step: value for step, record in self.replay.items() if (value := dig(record, *keys)) is not None}

    def estimates(self, keys: Sequence[str], metric: str) -> Estimates:
        """Return a quantity as it was replayed or, where it was not, as the run logged it.

        Args:
            keys: Where a replay's record of a checkpoint has it, a number or a number and its spread; none if nowhere.
            metric: Its name among the logged metrics; `<metric>_se` is its spread.
        """
        replayed = {step: estimate(value) for step, value in self.replayed_at(*keys).items()} if keys else {}
        if replayed or not self.has_metrics:
            return Estimates(replayed, live=False)
        values, errors = self.series(metric), self.series(f"{metric}_se").to_dict()
        steps = map(int, values.index)
        logged = {at: (float(x), float(errors.get(at, math.nan))) for at, x in zip(steps, values, strict=True)}
        return Estimates(logged, live=True)


def dig(record: Any, *keys: str) -> Any:
    """Follow keys into nested mappings; None where one is missing."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def estimate(value: Any) -> Estimate:
    """Read a number, or a number and its spread; NaN for what is missing."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    plain = [math.nan if one is None else float(one) for one in (*values, None)]
    return plain[0], plain[1]


def against_nulls(gram: Gram, null: Gram, describe: Callable[[Gram], Mapping[str, float]]) -> dict[str, Calibrated]:
    """Put numbers of a path beside those of both walks; NaN for what a null does not have, or where decay is unknown.

    Args:
        gram: H of the run.
        null: H of its decaying walk.
        describe: Numbers of any H, by name.
    """
    measured, free = describe(gram), describe(nulls.walk(gram))
    decaying = describe(null) if bool(torch.isfinite(null).all()) else {}
    return {
        name: Calibrated(value, free.get(name, math.nan), decaying.get(name, math.nan))
        for name, value in measured.items()
    }


# ------------------------------------------------------------------------------------------------- even spacing


def update_span(steps: Sequence[int]) -> int:
    """Steps between the snapshots that updates are taken of: 200 where there are such, else the commonest distance."""
    if sum((step - steps[0]) % SPAN == 0 for step in steps) > 3:
        return SPAN
    common = Counter(later - earlier for earlier, later in itertools.pairwise(steps))
    return max(common, key=lambda span: (common[span], span)) if common else 1


def thin(trajectory: Trajectory, span: int) -> Trajectory:
    """Keep the snapshots a multiple of `span` optimizer steps after the first, as if no other had been taken."""
    steps = trajectory.steps
    kept = [index for index, step in enumerate(steps) if (step - steps[0]) % span == 0]
    survival = [trajectory.survival[index] for index in kept]
    grams = windows.part(trajectory.grams, kept)
    return replace(trajectory, steps=[steps[index] for index in kept], grams=grams, survival=survival, rates=None)
