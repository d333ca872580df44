"""How concentrated a model's attention is while it trains, and how much of it its answers need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.callbacks.measuring import ChangesItsAttention, DrawsBatches, DrawsKinds, ShowsItsAttention, measuring
from mini_gpt_pl.callbacks.probe import Estimate, StateProbe
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry import concentration


class AttentionProbe(StateProbe):
    """Entropy of attention and mass of its largest weights, per layer, on batches that stay the same.

    Logged for each batch under `attention/<batch>/layer<l>/`, means over heads and examples for one query position;
    the null is even attention on as many visible positions. Where the module has `accuracy_through`, also under
    `attention/<batch>/`: its accuracy, and that with the attention of all layers replaced by the k largest weights of
    each row, scaled to sum to 1, beside that of k visible positions kept by chance.

    With several ranks each does all of the same work, and rank zero's numbers are logged.

    Args:
        schedule: When to measure, after a step; 0 is before the first.
        ks: Numbers of positions. Those that no row exceeds are left out.
        size: Examples in each batch.
        query: Position whose attention is looked at, from the end if negative. None for the module's own
            `query_position`, the one that its answer is read at, if it has that, else the last.
        seed: Of the batches and of what is kept by chance.

    Raises:
        UserError: A setting is out of range, the module does not show its attention, or nothing draws batches.

    Example:
        >>> probe = AttentionProbe(Schedule(every=500), ks=[1, 2, 4, 8])
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(every=500),  # noqa: B008 (frozen)
        ks: Sequence[int] = (1, 2, 4, 8),
        size: int = 128,
        query: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(schedule)
        if not ks or min(ks) < 1 or size < 1:
            raise UserError(f"AttentionProbe: ks {list(ks)} and size {size}: give numbers of 1 or more")
        self.ks = tuple(sorted(set(ks)))
        self.size = size
        self.query = query
        self.seed = seed
        self._batches: dict[str, Any] = {}

    @override
    def estimate(self, steps: int, dim: int) -> Estimate:
        times = sum(self.schedule.due(step) for step in range(steps)) / max(steps, 1)
        return Estimate(type(self).__name__, bytes=0.0, passes=(1 + len(self.ks)) * times)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            require_attention(pl_module, type(self).__name__)
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = fixed_batches(trainer, pl_module, self.seed, self.size, type(self).__name__)
        super().on_train_start(trainer, pl_module)

    @override
    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        with measuring(trainer, module), torch.no_grad():
            for name, batch in self._batches.items():
                numbers = self._shapes(batch, module) | self._answers(batch, module)
                values = torch.stack([value.double() for value in numbers.values()])
                self._deferred.add(trainer.global_step, [f"attention/{name}/{key}" for key in numbers], values)

    def _shapes(self, batch: Any, module: LightningModule) -> dict[str, Tensor]:
        """Entropy and top masses of each layer, beside those of even attention."""
        assert isinstance(module, ShowsItsAttention)
        numbers: dict[str, Tensor] = {}
        for layer, weights in enumerate(module.attention(batch)):
            rows, prefix = query_rows(weights, module, self.query), f"layer{layer}/"
            count = concentration.visible(rows)
            numbers |= {prefix + "entropy": concentration.entropy(rows).mean(), prefix + "entropy_null": count.log()}
            ks = self._below(rows.shape[-1])
            for k, mass in zip(ks, concentration.top_mass(rows, ks).mean((0, 1)), strict=True) if ks else ():
                numbers |= {f"{prefix}top{k}": mass, f"{prefix}top{k}_null": (k / count).clamp_max(1.0)}
        return numbers

    def _answers(self, batch: Any, module: LightningModule) -> dict[str, Tensor]:
        """Accuracy with all attention, and with little."""
        if not isinstance(module, ChangesItsAttention):
            return {}
        assert isinstance(module, ShowsItsAttention)
        numbers = {"accuracy": module.accuracy_through(batch, lambda weights: weights)}
        generator = torch.Generator(module.device).manual_seed(self.seed)  # the same positions at every step
        for k in self._below(module.attention(batch)[0].shape[-1]):
            numbers[f"accuracy_top{k}"] = module.accuracy_through(batch, concentration.keep_top(k))
            by_chance = concentration.keep_random(k, generator)
            numbers[f"accuracy_top{k}_null"] = module.accuracy_through(batch, by_chance)
        return numbers

    def _below(self, length: int) -> list[int]:
        return [k for k in self.ks if k < length]


def require_attention(module: LightningModule, asking: str) -> None:
    """Refuse a module that does not show its attention.

    Raises:
        UserError: It has no `attention`.
    """
    if not isinstance(module, ShowsItsAttention):
        raise UserError(
            f"{asking}: {type(module).__name__} has no attention(batch), the attention weights of each layer: add it"
        )


def fixed_batches(trainer: Trainer, module: LightningModule, seed: int, size: int, asking: str) -> dict[str, Any]:
    """Draw batches that stay the same for a run: one of each kind that the module or its data know, else `drawn`.

    Raises:
        UserError: Neither the module nor the data module draws batches.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, 0xA77E], dtype=np.uint64)))
    for source in (module, getattr(trainer, "datamodule", None)):
        if isinstance(source, DrawsKinds):
            batches = dict(source.draw_kinds(generator, size))
            break
        if isinstance(source, DrawsBatches):
            batches = {"drawn": source.draw_batch(generator, size)}
            break
    else:
        raise UserError(
            f"{asking} measures on batches that stay the same: give the data module a draw_batch(generator, size)"
        )
    return {name: trainer.strategy.batch_to_device(batch, module.device) for name, batch in batches.items()}


def query_rows(
    weights: Float[Tensor, "B nh Q T"], module: LightningModule, query: int | None
) -> Float[Tensor, "B nh T"]:
    """Rows of one query position; that of the module's `query_position` for None, else of the last.

    Raises:
        UserError: There is no such position.
    """
    query = int(getattr(module, "query_position", -1)) if query is None else query
    if not -weights.shape[2] <= query < weights.shape[2]:
        raise UserError(f"query {query}: the attention has {weights.shape[2]} positions; -1 is the last")
    return weights[:, :, query].float()
