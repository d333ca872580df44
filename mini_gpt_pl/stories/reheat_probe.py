"""Follow a reheated run in its parent's basis."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from mini_gpt_pl.atomic import write_text
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.directions.frozen import FrozenBasis, Placement
from mini_gpt_pl.geometry.vectors.selection import Vector
from mini_gpt_pl.runs.folder import LINEAGE
from mini_gpt_pl.runs.logs import log_now


class ReheatProbe(Callback):
    """Log where a reheated run goes in the frozen basis of its parent, and its re-entry gain.

    At every evaluation, under `reheat/`: coordinate a and residual ||r|| from the parent's theta_0, and the
    displacement from the reheated checkpoint split along the parent's backbone (signed) and across it. `reheat.json`
    in the run folder holds the lineage from the start, and what was found up to the last evaluation:
    the gain G = max_t p(t) - p0, where p0 is the value before the first step, and the recovery
    R = G / (best p of the parent - p0).

    Args:
        p0: Probe accuracy of the checkpoint, before any step; a resumed run takes it from its checkpoint.
        basis: The parent's; without one only the accuracies are reported.
        start: The reheated checkpoint's selected weights, where there is a basis.
        moments: The `state_dict` of an optimizer whose state is taken, not its settings; None starts without memory.
        lineage: What is to be recorded of the parent and of the settings.
        parent_best: Best accuracy of the parent up to the checkpoint.
        threshold: Accuracy whose first reaching is reported.
        metric: The accuracy.

    Attributes:
        summary: p0, peak, peak_step, gain, recovery, final, steps_to_threshold, and with a basis the change of a and
            of ||r||. What there is none of is left out.
    """

    def __init__(
        self,
        p0: float,
        basis: FrozenBasis | None = None,
        start: Vector | None = None,
        moments: dict[str, Any] | None = None,
        lineage: Mapping[str, Any] | None = None,
        parent_best: float = float("nan"),
        threshold: float = 0.6,
        metric: str = "probe/p_ood",
    ) -> None:
        super().__init__()
        self.p0 = p0
        self.basis = basis
        self.parent_best = parent_best
        self.threshold = threshold
        self.metric = metric
        self.lineage = dict(lineage or {})
        self.summary: dict[str, float] = {}
        self._start = start
        self._moments = moments
        self._accuracy: dict[int, float] = {}
        self._first: Placement | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Moments of another form are refused here, before any callback records something.
        if self._moments is not None and trainer.ckpt_path is None:
            _take_moments(trainer.optimizers[0], self._moments)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        resumed = trainer.global_step > 0
        if self.basis is not None and self._start is not None:
            self.basis, self._start = self.basis.to(pl_module.device), self._start.to(pl_module.device)
            self._first = self.basis.place(self._start)
        if resumed:
            return
        self._accuracy = {0: self.p0}
        self._report(trainer, pl_module, {self.metric: self.p0})

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.training and not trainer.validating:
            return
        self._accuracy[trainer.global_step] = float(trainer.callback_metrics[self.metric])
        self._report(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, self._placed(pl_module))
        log_now(trainer, {f"reheat/{name}": value for name, value in self.summary.items()}, trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"p0": self.p0, "accuracy": dict(self._accuracy)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.p0, self._accuracy = state_dict["p0"], dict(state_dict["accuracy"])

    def _report(self, trainer: Trainer, module: LightningModule, known: Mapping[str, float] | None = None) -> None:
        """Log where the weights are, beside what is known already, and bring the file up to date."""
        placed = self._placed(module)
        log_now(trainer, {**(known or {}), **{f"reheat/{k}": v for k, v in placed.items()}}, trainer.global_step)
        self._record(trainer, placed)

    def _record(self, trainer: Trainer, placed: Mapping[str, float]) -> None:
        self.summary = self._gains()
        if placed and self._first is not None:
            self.summary |= {
                "coordinate_before": self._first.coordinate,
                "coordinate_after": placed["coordinate"],
                "residual_before": self._first.residual_norm,
                "residual_after": placed["residual"],
                "along": placed["along"],
                "across": placed["across"],
            }
        if trainer.is_global_zero:
            record = json.dumps({**self.lineage, **self.summary}, indent=2) + "\n"
            write_text(Path(trainer.default_root_dir) / LINEAGE, record)

    def _placed(self, module: LightningModule) -> dict[str, float]:
        """Read the weights once, and place them in the parent's basis, from theta_0 and from the checkpoint."""
        if self.basis is None or self._start is None:
            return {}
        weights = self._start.selection.weights(module)
        here, moved = self.basis.place(weights), self.basis.place(weights, self._start)
        return {
            "coordinate": here.coordinate,
            "residual": here.residual_norm,
            "along": moved.coordinate,
            "across": moved.residual_norm,
        }

    def _gains(self) -> dict[str, float]:
        peak_step, peak = max(self._accuracy.items(), key=lambda item: item[1])  # the first of equal ones
        gain = peak - self.p0
        gains = {"p0": self.p0, "peak": peak, "peak_step": float(peak_step), "gain": gain}
        if self.parent_best > self.p0:
            gains["recovery"] = gain / (self.parent_best - self.p0)
        reached = [step for step, value in sorted(self._accuracy.items()) if value >= self.threshold]
        if reached:
            gains["steps_to_threshold"] = float(reached[0])
        return {**gains, "final": self._accuracy[max(self._accuracy)]}


def _take_moments(optimizer: Optimizer, parent: Mapping[str, Any]) -> None:
    ours = optimizer.state_dict()
    form, theirs = _form(ours), _form(parent)
    if form != theirs:
        raise UserError(
            f"reheat: the checkpoint's optimizer is of another form ({theirs}) than this one ({form}): "
            "keep the parent's optimizer, or give --moments zeroed"
        )
    optimizer.load_state_dict({**ours, "state": parent["state"]})


def _form(state: Mapping[str, Any]) -> str:
    """What tells optimizers apart whose states do not fit each other: how parameters are grouped, and the settings."""
    groups = state["param_groups"]
    settings = sorted(set(groups[0]) - {"params", "kind", "lr", "initial_lr", "weight_decay"})
    return f"groups of {[len(group['params']) for group in groups]} tensors, with {', '.join(settings)}"
