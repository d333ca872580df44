"""Follow a reheated run in its parent's basis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from mini_gpt_pl.basis import FrozenBasis, Placement
from mini_gpt_pl.geometry.selection import Vector
from mini_gpt_pl.logs import log_now

REHEAT_FILE = "reheat.json"


class ReheatProbe(Callback):
    """Log where a reheated run goes in the frozen basis of its parent, and its re-entry gain.

    At every evaluation, under `reheat/`: coordinate a and residual ||r|| from the parent's theta_0, and the
    displacement from the reheated checkpoint split along the parent's backbone (signed) and across it. At the end,
    `summary` holds the gain G = max_t p(t) - p0, where p0 is the value before the first step.

    Args:
        p0: Probe accuracy of the checkpoint, before any step.
        basis: The parent's; without one only the gain is reported.
        metric: The accuracy whose gain is reported.

    Attributes:
        summary: p0, peak, peak_step, gain, and with a basis the change of a and of ||r||.
    """

    def __init__(self, p0: float, basis: FrozenBasis | None, metric: str = "probe/p_ood") -> None:
        super().__init__()
        self.p0 = p0
        self.basis = basis
        self.metric = metric
        self.summary: dict[str, float] = {}
        self._peak, self._peak_step = p0, 0
        self._start: Vector | None = None
        self._first: Placement | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.basis is not None:
            self.basis = self.basis.to(pl_module.device)
            self._start = self.basis.theta0.selection.weights(pl_module)
            self._first = self.basis.place(pl_module)
        log_now(trainer, {self.metric: self.p0, **self._positions(pl_module)}, trainer.global_step)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.training and not trainer.validating:
            return
        value = float(trainer.callback_metrics[self.metric])
        if value > self._peak:
            self._peak, self._peak_step = value, trainer.global_step
        log_now(trainer, self._positions(pl_module), trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.summary = {
            "p0": self.p0,
            "peak": self._peak,
            "peak_step": float(self._peak_step),
            "gain": self._peak - self.p0,
        }
        if self.basis is not None and self._first is not None:
            last = self.basis.place(pl_module)
            self.summary |= {
                "coordinate_before": self._first.coordinate,
                "coordinate_after": last.coordinate,
                "residual_before": self._first.residual_norm,
                "residual_after": last.residual_norm,
            }
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / REHEAT_FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self.summary, indent=2) + "\n")

    def _positions(self, module: LightningModule) -> dict[str, Any]:
        if self.basis is None or self._start is None:
            return {}
        place = self.basis.place(module)
        along, across = self.basis.split(self._start, module)
        return {
            "reheat/coordinate": place.coordinate,
            "reheat/residual": place.residual_norm,
            "reheat/along": along,
            "reheat/across": across,
        }
