"""Where the weights go when a metric switches between its peaks and its troughs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.atomic import write_text
from mini_gpt_pl.callbacks.fisher import FisherProbe
from mini_gpt_pl.callbacks.probe import Estimate, Probe
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.callbacks.state_keys import state_key
from mini_gpt_pl.callbacks.trajectory import TrajectoryRecorder, find_recorder
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import switching
from mini_gpt_pl.geometry.path.switching import Axes, Event, Interval, Switch, SwitchReport
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.runs.logs import log_now

SWITCHING_FILE = "switching.json"

Reports = dict[str | None, SwitchReport]


class SwitchingProbe(Probe):
    """Declare peaks and troughs of a metric as they happen, and show which way the weights went in between.

    Read at every evaluation. A peak or trough is declared at the first later evaluation that makes it certain; with
    its trough, a peak is a switch. An evaluation at a step without a snapshot counts for the nearest snapshot before
    it, and a switch between two evaluations of one snapshot has no direction, so let evaluations and snapshots
    coincide.

    Logged when something is declared: `switching/peaks`, `peak_step`, `peak_value` and the same for troughs. Logged
    when a switch is certain, under `switching/<group>/`: cosine = |cos(v_sw, v_b)|, transverse = 1 - cos^2, energy_2_6
    in PCs 2 to 6, energy_2_6_across with v_b projected out, share = ||.||^2 of the group over the whole's. Controls
    are stretches of equal length without a switch: control_cosine and control_share are their means, and
    `<quantity>_percentile` is the switch's rank among them (chance is uniform). For the whole selection also steps,
    the switch's length; groups, the number of groups that it is spread over; and pair_cosine, mean |cos| with the
    other switches so far. All of these use the directions of the snapshots up to the peak, which know nothing of the
    switch. Where two switches become certain at once, the later one is logged.

    `switching.json` in the trainer's root folder holds the evaluations and events so far. At the end of a run,
    `switching/<group>/run_<quantity>` are means over all switches against the directions of the whole run, and the
    file holds every switch both ways (controls from the whole run) and their pairwise cosines as well.

    Args:
        metric: Any metric that the module logs at validation.
        prominence: Least height of a peak, in the metric's units.
        reach: Number of evaluations to either side that it is measured against.
        controls: Most control stretches for each switch.

    Raises:
        UserError: The trainer has no TrajectoryRecorder, the metric is not logged, or an option makes no sense.
    """

    def __init__(
        self, metric: str = "probe/p_ood", prominence: float = 0.03, reach: int = 3, controls: int = 50
    ) -> None:
        # Every evaluation: a budget must not stretch this, as a series with gaps has other peaks.
        super().__init__(Schedule(every=1))
        if not prominence >= 0 or reach < 1 or controls < 1:
            raise UserError(
                "SwitchingProbe needs prominence >= 0, reach >= 1 and controls >= 1, "
                f"got {prominence}, {reach} and {controls}"
            )
        self.metric = metric
        self.prominence = prominence
        self.reach = reach
        self.controls = controls
        self._steps: list[int] = []
        self._values: list[float] = []
        self._axes = Axes()
        self._recorder: TrajectoryRecorder | None = None
        self._resumed = False

    @property
    @override
    def state_key(self) -> str:
        return state_key(self, metric=self.metric)

    def estimate(self, steps: int, dim: int) -> Estimate:
        """What the probe takes: it works on inner products that are there already."""
        return Estimate(type(self).__name__, 16.0 * steps, 0.0)

    @property
    def events(self) -> list[Event]:
        """Peaks and troughs that are certain by now."""
        return switching.events(self._steps, self._values, self.prominence, self.reach)

    @property
    def switches(self) -> list[Switch]:
        """Each peak with the first trough after it."""
        return switching.switches(self.events, self.reach)

    # ------------------------------------------------------------------------------------------------ hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._recorder = find_recorder(trainer, type(self).__name__)
            self._steps, self._values, self._axes, self._resumed = [], [], Axes(), False
            for other in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(other, FisherProbe):
                    other.add_direction("switch", self._latest_switch)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed:
            self._recover(_file(trainer), trainer.global_step)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        step, value = trainer.global_step, self._read(trainer)
        if not math.isfinite(value) or (self._steps and step <= self._steps[-1]):
            return  # diverged, or evaluated twice at one step
        with self.watch.running():
            self._steps.append(step)
            self._values.append(value)
            log_now(trainer, self._news(), step)
            if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                _write(_file(trainer), self._series())

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not on_train_end: the recorder takes its last snapshot there, and may come after this callback.
        with self.watch.running():
            result, metrics = self._whole_run()
        if metrics:
            log_now(trainer, metrics, trainer.global_step)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _write(_file(trainer), result)

    @override
    def state_dict(self) -> dict[str, Any]:
        # Events are a function of the series.
        return {"steps": list(self._steps), "values": list(self._values)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps, self._values = list(state_dict["steps"]), list(state_dict["values"])
        self._resumed = True

    def _recover(self, file: Path, step: int) -> None:
        """Take up the evaluation of the checkpoint's own step.

        Lightning saves a checkpoint before it evaluates at the same step, and does not evaluate again on resume.
        """
        known = _read_series(file, self.metric)
        if known[: len(self._steps)] == list(zip(self._steps, self._values, strict=True)):
            missing = [(at, value) for at, value in known[len(self._steps) :] if at <= step]
            self._steps += [at for at, _ in missing]
            self._values += [value for _, value in missing]

    # --------------------------------------------------------------------------------------------- measuring

    @property
    def _trajectory(self) -> Trajectory:
        if self._recorder is None or self._recorder.trajectory is None:
            raise RuntimeError("the probe is used before Trainer.fit has set it up")
        return self._recorder.trajectory

    @property
    def _name(self) -> str:
        assert self._recorder is not None
        return self._recorder.name

    def _read(self, trainer: Trainer) -> float:
        found = trainer.callback_metrics
        if self.metric not in found:
            near = get_close_matches(self.metric, found, n=3) or sorted(found)[:3]  # with all probes there are hundreds
            raise UserError(
                f"SwitchingProbe watches {self.metric!r}, which validation does not log: "
                f"set its metric to one that it does, such as {', '.join(near) or '(none is logged)'}"
            )
        return float(found[self.metric])

    def _news(self) -> dict[str, float]:
        """Whatever the latest evaluation has made certain."""
        now, found = len(self._steps) - 1, self.events
        metrics: dict[str, float] = {}
        for event in found:
            if event.declared == now:
                kind = event.kind
                metrics[f"switching/{kind}s"] = float(sum(e.kind == kind and e.declared <= now for e in found))
                metrics |= {f"switching/{kind}_step": float(event.step), f"switching/{kind}_value": event.value}
        known = [switch for switch in self.switches if switch.declared <= now]
        for switch in known:
            if switch.declared == now:
                metrics |= self._live(switch, known)
        return metrics

    def _live(self, switch: Switch, known: list[Switch]) -> dict[str, float]:
        """Describe a switch by what was known before it; controls from the run so far."""
        stretch, stretches = self._interval(switch), self._intervals(known)
        if stretch is None:
            return {}
        trajectory = self._trajectory
        metrics: dict[str, float] = {}
        for group, report in self._report(stretch, stretches, past=True).items():
            metrics |= {f"switching/{group or self._name}/{key}": value for key, value in _numbers(report).items()}
        shares = [metrics[f"switching/{group}/share"] for group in trajectory.groups]
        metrics[f"switching/{self._name}/groups"] = switching.effective_groups(shares)
        metrics[f"switching/{self._name}/steps"] = float(_length(trajectory, stretch))
        others = [other for other in stretches if not switching.overlap(other, stretch)]
        if others:
            cosines = switching.pairwise_cosines(trajectory.gram(), [stretch, *others])[0, 1:]
            metrics[f"switching/{self._name}/pair_cosine"] = float(cosines.abs().mean())
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def _latest_switch(self, trajectory: Trajectory) -> Float[Tensor, "G1 n"] | None:
        """Coefficients of the latest certain switch that has a direction, for the Fisher along it."""
        for switch in reversed(self.switches):
            if (stretch := self._interval(switch)) is not None:
                line = switching.switch_direction(len(trajectory), *stretch)
                return line.expand(len(trajectory.groups) + 1, -1)
        return None

    def _interval(self, switch: Switch) -> Interval | None:
        return switching.interval_of(switch, self._trajectory.steps)

    def _intervals(self, switches: list[Switch]) -> list[Interval]:
        return [stretch for switch in switches if (stretch := self._interval(switch)) is not None]

    def _report(self, stretch: Interval, avoid: list[Interval], *, past: bool) -> Reports:
        return switching.report(self._trajectory, stretch, avoid, self._axes, past=past, limit=self.controls)

    # ----------------------------------------------------------------------------------------- the whole run

    def _whole_run(self) -> tuple[dict[str, Any], dict[str, float]]:
        """The file's content, and the means that are logged."""
        placed = [(switch, stretch) for switch in self.switches if (stretch := self._interval(switch)) is not None]
        stretches = [stretch for _, stretch in placed]
        entries, runs = [], []
        for switch, stretch in placed:
            runs.append(self._report(stretch, stretches, past=False))
            past = self._report(stretch, stretches, past=True)
            entries.append(self._entry(switch, stretch, {"run": runs[-1], "past": past}))
        pairs = self._pairs(stretches)
        return self._series() | {"switches": entries, "pairwise": pairs}, self._means(runs, pairs)

    def _series(self) -> dict[str, Any]:
        """The part of the file that is there from the first evaluation on."""
        return {
            "metric": self.metric,
            "prominence": self.prominence,
            "reach": self.reach,
            "steps": self._steps,
            "values": self._values,
            "events": [asdict(event) | {"declared": self._steps[event.declared]} for event in self.events],
        }

    def _entry(self, switch: Switch, stretch: Interval, views: dict[str, Reports]) -> dict[str, Any]:
        steps = self._trajectory.steps
        shares = [report.stretch.share for group, report in views["run"].items() if group is not None]
        return {
            "peak": switch.peak.step,
            "trough": switch.trough.step,
            "snapshots": [steps[stretch.first], steps[stretch.last]],
            "groups": switching.effective_groups(shares),
        } | {
            view: {group or self._name: _numbers(report) for group, report in reports.items()}
            for view, reports in views.items()
        }

    def _pairs(self, stretches: list[Interval]) -> dict[str, Any]:
        trajectory = self._trajectory
        gram = trajectory.gram()
        return {
            "cosines": switching.pairwise_cosines(gram, stretches).tolist(),
            "mean": switching.mean_cosine(gram, stretches),
            "control_mean": switching.control_mean_cosine(trajectory, stretches, self.controls),
        }

    def _means(self, runs: list[Reports], pairs: dict[str, Any]) -> dict[str, float]:
        collected: dict[str, list[float]] = {}
        for reports in runs:
            for group, report in reports.items():
                for key, value in _numbers(report).items():
                    collected.setdefault(f"switching/{group or self._name}/run_{key}", []).append(value)
        metrics = {name: _mean(values) for name, values in collected.items()}
        metrics[f"switching/{self._name}/run_pair_cosine"] = pairs["mean"]
        metrics[f"switching/{self._name}/run_pair_control"] = pairs["control_mean"]
        metrics["switching/switches"] = float(len(runs))
        return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _numbers(report: SwitchReport) -> dict[str, float]:
    """Name what is logged and written of one switch in one group."""
    stretch = report.stretch
    return {
        "cosine": abs(stretch.cosine),
        "transverse": stretch.transverse,
        "energy_2_6": stretch.energy,
        "energy_2_6_across": stretch.energy_across,
        "share": stretch.share,
        "cosine_percentile": report.cosine_percentile,
        "energy_2_6_percentile": report.energy_percentile,
        "energy_2_6_across_percentile": report.energy_across_percentile,
        "share_percentile": report.share_percentile,
        "control_cosine": report.control_cosine,
        "control_share": report.control_share,
        "controls": float(report.controls),
    }


def _length(trajectory: Trajectory, stretch: Interval) -> int:
    return trajectory.steps[stretch.last] - trajectory.steps[stretch.first]


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _file(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / SWITCHING_FILE


def _read_series(path: Path, metric: str) -> list[tuple[int, float]]:
    """Read the evaluations in a file; none where there is no such file, or it is about another metric."""
    try:
        found = json.loads(path.read_text())
        return list(zip(found["steps"], found["values"], strict=True)) if found["metric"] == metric else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _write(path: Path, result: dict[str, Any]) -> None:
    """Write JSON, NaN as null, so that a reader sees the old file or the whole new one."""
    write_text(path, json.dumps(_without_nan(result), indent=2, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
