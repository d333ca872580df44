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

from mini_gpt_pl.atomic import write_json
from mini_gpt_pl.callbacks.fisher import FisherProbe
from mini_gpt_pl.callbacks.probe import Estimate, state_key
from mini_gpt_pl.callbacks.recorded import RecordedProbe
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import switching
from mini_gpt_pl.geometry.path.switching import Axes, Event, Interval, Switch, SwitchReport
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.runs.logs import log_now

SWITCHING_FILE = "switching.json"

Reports = dict[str, dict[str, float]]


class SwitchingProbe(RecordedProbe):
    """Declare peaks and troughs of a metric as they happen, and show which way the weights went in between.

    Read at every evaluation. A peak or trough is declared at the first later evaluation that makes it certain; with
    its trough, a peak is a switch. An evaluation at a step without a snapshot counts for the nearest snapshot before
    it, and a switch between two evaluations of one snapshot has no direction, so let evaluations and snapshots
    coincide.

    Logged under `switching/` when something is declared, and under `switching/<group>/` when a switch is certain: how
    it lies to the directions of the snapshots up to the peak, which know nothing of it, and its rank among stretches of
    equal length without a switch (chance is uniform). Where two switches become certain at once, the later one is
    logged.

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
        self._reset()

    @override
    def _reset(self) -> None:
        self._steps: list[int] = []
        self._values: list[float] = []
        self._axes = Axes()
        self._resumed = False

    @property
    @override
    def state_key(self) -> str:
        return state_key(self, metric=self.metric)

    @override
    def estimate(self, steps: int, dim: int) -> Estimate:
        return Estimate(type(self).__name__, 16.0 * steps, 0.0)  # it works on inner products that are there already

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
        super().setup(trainer, pl_module, stage)
        for other in trainer.callbacks if stage == "fit" else ():  # type: ignore[attr-defined]
            if isinstance(other, FisherProbe):
                other.add_direction("switch", self._latest_switch)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._resumed:
            return
        # The evaluation of the checkpoint's own step: Lightning saves before it evaluates, and does not do so again.
        series = _read_series(_file(trainer), self.metric)
        count = len(self._steps)
        if series[:count] == list(zip(self._steps, self._values, strict=True)):
            missing = [(step, value) for step, value in series[count:] if step <= trainer.global_step]
            self._steps += [step for step, _ in missing]
            self._values += [value for _, value in missing]

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
            _write(trainer, self._series())

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not on_train_end: the recorder takes its last snapshot there, and may come after this callback.
        with self.watch.running():
            result, metrics = self._whole_run()
        log_now(trainer, metrics, trainer.global_step)
        _write(trainer, result)

    @override
    def state_dict(self) -> dict[str, Any]:
        # Events are a function of the series.
        return {"steps": list(self._steps), "values": list(self._values)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps, self._values = list(state_dict["steps"]), list(state_dict["values"])
        self._resumed = True

    # --------------------------------------------------------------------------------------------- measuring

    @property
    def _trajectory(self) -> Trajectory:
        assert self.recorder.trajectory is not None
        return self.recorder.trajectory

    def _read(self, trainer: Trainer) -> float:
        logged = trainer.callback_metrics
        if self.metric not in logged:
            near = get_close_matches(self.metric, logged, n=3) or sorted(logged)[:3]  # there may be hundreds
            raise UserError(
                f"SwitchingProbe watches {self.metric!r}, which validation does not log: "
                f"set its metric to one that it does, such as {', '.join(near) or '(none is logged)'}"
            )
        return float(logged[self.metric])

    def _news(self) -> dict[str, float]:
        """Whatever the latest evaluation has made certain."""
        now, events = len(self._steps) - 1, self.events
        metrics: dict[str, float] = {}
        for event in events:
            if event.declared == now:
                kind = event.kind
                metrics[f"switching/{kind}s"] = float(sum(e.kind == kind and e.declared <= now for e in events))
                metrics |= {f"switching/{kind}_step": float(event.step), f"switching/{kind}_value": event.value}
        certain = [switch for switch in self.switches if switch.declared <= now]
        for switch in certain:
            if switch.declared == now:
                metrics |= self._live(switch, certain)
        return metrics

    def _live(self, switch: Switch, certain: list[Switch]) -> dict[str, float]:
        """Describe a switch by what was known before it; controls from the run so far."""
        placed, trajectory, whole = self._placed(certain), self._trajectory, f"switching/{self.recorder.name}"
        if (stretch := placed.get(switch)) is None:
            return {}
        metrics: dict[str, float] = {}
        for label, numbers in self._reports(stretch, placed, past=True).items():
            metrics |= {f"switching/{label}/{key}": value for key, value in numbers.items()}
        metrics[f"{whole}/groups"] = switching.effective_groups(
            [metrics[f"switching/{group}/share"] for group in trajectory.groups]
        )
        metrics[f"{whole}/steps"] = float(trajectory.steps[stretch.last] - trajectory.steps[stretch.first])
        others = [other for other in placed.values() if not switching.overlap(other, stretch)]
        if others:
            cosines = switching.pairwise_cosines(trajectory.gram(), [stretch, *others])[0, 1:]
            metrics[f"{whole}/pair_cosine"] = float(cosines.abs().mean())
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def _latest_switch(self, trajectory: Trajectory) -> Float[Tensor, "G1 n"] | None:
        """Coefficients of the latest certain switch that has a direction, for the Fisher along it."""
        if not (stretches := list(self._placed(self.switches).values())):
            return None
        line = switching.switch_direction(len(trajectory), *stretches[-1])
        return line.expand(len(trajectory.groups) + 1, -1)

    def _placed(self, switches: list[Switch]) -> dict[Switch, Interval]:
        """Where switches lie among the snapshots; those between two evaluations of one snapshot are left out."""
        places = ((switch, switching.interval_of(switch, self._trajectory.steps)) for switch in switches)
        return {switch: stretch for switch, stretch in places if stretch is not None}

    def _reports(self, stretch: Interval, placed: dict[Switch, Interval], *, past: bool) -> Reports:
        """Name what is logged and written of one switch, by group."""
        avoid = list(placed.values())
        reports = switching.report(self._trajectory, stretch, avoid, self._axes, past=past, limit=self.controls)
        return {group or self.recorder.name: _numbers(report) for group, report in reports.items()}

    # ----------------------------------------------------------------------------------------- the whole run

    def _whole_run(self) -> tuple[dict[str, Any], dict[str, float]]:
        """The file's content, and the means that are logged."""
        placed, trajectory = self._placed(self.switches), self._trajectory
        whole, gram, stretches = f"switching/{self.recorder.name}", trajectory.gram(), list(placed.values())
        entries, collected = [], dict[str, list[float]]()
        for switch, stretch in placed.items():
            run, past = (self._reports(stretch, placed, past=past) for past in (False, True))
            entries.append(
                {
                    "peak": switch.peak.step,
                    "trough": switch.trough.step,
                    "snapshots": [trajectory.steps[stretch.first], trajectory.steps[stretch.last]],
                    "groups": switching.effective_groups([run[group]["share"] for group in trajectory.groups]),
                    "run": run,
                    "past": past,
                }
            )
            for label, numbers in run.items():
                for key, value in numbers.items():
                    if not math.isnan(value):
                        collected.setdefault(f"switching/{label}/run_{key}", []).append(value)
        pairs: dict[str, Any] = {
            "cosines": switching.pairwise_cosines(gram, stretches).tolist(),
            "mean": switching.mean_cosine(gram, stretches),
            "control_mean": switching.control_mean_cosine(trajectory, stretches, self.controls),
        }
        metrics = {name: math.fsum(values) / len(values) for name, values in collected.items()}
        metrics |= {f"{whole}/run_pair_cosine": pairs["mean"], f"{whole}/run_pair_control": pairs["control_mean"]}
        metrics["switching/switches"] = float(len(entries))
        defined = {name: value for name, value in metrics.items() if not math.isnan(value)}
        return self._series() | {"switches": entries, "pairwise": pairs}, defined

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


def _numbers(report: SwitchReport) -> dict[str, float]:
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


def _file(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / SWITCHING_FILE


def _read_series(path: Path, metric: str) -> list[tuple[int, float]]:
    """Read the evaluations in a file; none where there is no such file, or it is about another metric."""
    try:
        content = json.loads(path.read_text())
        return list(zip(content["steps"], content["values"], strict=True)) if content["metric"] == metric else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _write(trainer: Trainer, content: dict[str, Any]) -> None:
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        write_json(_file(trainer), content)
