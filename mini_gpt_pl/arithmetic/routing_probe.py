"""What moving the weights along their path's directions does to attention, beside random moves of equal length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.arithmetic.routing import chosen_groups, joint_directions
from mini_gpt_pl.callbacks.attention import fixed_batches, query_rows, require_attention
from mini_gpt_pl.callbacks.measuring import ShowsItsAttention, measuring
from mini_gpt_pl.callbacks.probe import DeferringProbe, Estimate
from mini_gpt_pl.callbacks.recorded import RecordedProbe
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry import concentration
from mini_gpt_pl.geometry.path.surrogates import isotropic
from mini_gpt_pl.geometry.vectors.free_weights import FreeWeights
from mini_gpt_pl.geometry.vectors.selection import Vector


class RoutingProbe(RecordedProbe, DeferringProbe):
    r"""Entropy of attention at weights moved by a fixed length along +-v, for directions of the path so far.

    The directions v are the first centred principal directions of the chosen groups' path, snapshots up to now, and
    `weights`, the groups' weights as they are: moving along these rescales all scores, which sharpens attention by
    itself, and v_1 is largely the decay of theta_0. With H(x) the entropy at theta + x, a mean over examples, heads and
    batches, logged under `routing/<direction>/layer<l>/`: odd = (H(+v) - H(-v)) / 2 and even = (H(+v) + H(-v)) / 2 -
    H(0), in nats. Beside them `_null`: the root mean square of odd, and the mean of even, over random directions that
    have the length of v in every group; and odd_below, the share of these that move the entropy less.

    With several ranks each does all of the same work, and rank zero's numbers are logged.

    Args:
        schedule: When to measure, the weights before the next step.
        groups: Which of the recorder's groups, searched in their names.
        directions: Number of principal directions.
        norm: Length of the move, in parameter units.
        draws: Random directions for each direction.
        size: Examples in each batch, as `AttentionProbe` draws them.
        query: Position whose attention is looked at, as `AttentionProbe` has it.
        seed: Of the batches and of the random directions.

    Raises:
        UserError: A setting is out of range, there is no recorder with such groups, it keeps sketches, the ranks share
            the weights, or the module does not show its attention.

    Example:
        >>> probe = RoutingProbe(Schedule(every=500), groups=r"w_[qk]$")
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(every=500),  # noqa: B008 (frozen)
        groups: str = r"w_[qk]$",
        directions: int = 2,
        norm: float = 0.5,
        draws: int = 16,
        size: int = 128,
        query: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(schedule)
        if directions < 1 or draws < 2 or size < 1 or not norm > 0:
            raise UserError(
                f"RoutingProbe: directions {directions} and size {size} (1 or more), draws {draws} (2 or more), "
                f"norm {norm} (above 0)"
            )
        self.groups = groups
        self.directions = directions
        self.norm = norm
        self.draws = draws
        self.size = size
        self.query = query
        self.seed = seed
        self._batches: dict[str, Any] = {}

    @override
    def estimate(self, steps: int, dim: int) -> Estimate:
        times = sum(self.schedule.due(step) for step in range(steps)) / max(steps, 1)
        passes = 2 * (self.directions + 1) * (self.draws + 1) + 1
        return Estimate(type(self).__name__, bytes=4.0 * (self.directions + 5) * dim, passes=passes / 3 * times)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            require_attention(pl_module, type(self).__name__)
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.recorder.sketch is not None:
            raise UserError("RoutingProbe: directions cannot be rebuilt from sketches: give the recorder sketch null")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.recorder.trajectory is not None
        if self.recorder.selection.shards is not None:
            raise UserError("RoutingProbe: the ranks share the weights (FSDP2): measure on one device or under DDP")
        chosen_groups(self.recorder.trajectory, self.groups)
        self._batches = fixed_batches(trainer, pl_module, self.seed, self.size, type(self).__name__)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._measure_if_due(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure_if_due(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def _measure_if_due(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        if not self.due_once(step):
            return
        with self.watch.running(), measuring(trainer, module), torch.no_grad():
            metrics = self._measure(module, step)
        if metrics:
            self._deferred.add(step, list(metrics), torch.stack(list(metrics.values())))

    def _measure(self, module: LightningModule, step: int) -> dict[str, Tensor]:
        free = FreeWeights(module, self.recorder.selection, torch.float32)
        at = free.value(lambda: self._entropies(module))
        theta = free.weights
        still = at(theta.values)
        seed = np.random.SeedSequence((self.seed, step)).generate_state(1, np.uint64)[0] >> np.uint64(1)
        generator = torch.Generator(theta.values.device).manual_seed(int(seed))
        metrics: dict[str, Tensor] = {}
        for name, direction in self._directions(theta).items():
            drawn = [isotropic(direction, generator) for _ in range(self.draws)]
            moved = zip(*(self._moved(at, theta, v, still) for v in [direction, *drawn]), strict=True)
            odd, even = map(torch.stack, moved)  # (N, L), the direction first
            for layer in range(odd.shape[1]):
                own, others = odd[0, layer], odd[1:, layer]
                metrics |= {
                    f"routing/{name}/layer{layer}/odd": own,
                    f"routing/{name}/layer{layer}/odd_null": others.square().mean().sqrt(),
                    f"routing/{name}/layer{layer}/odd_below": (others.abs() < own.abs()).double().mean(),
                    f"routing/{name}/layer{layer}/even": even[0, layer],
                    f"routing/{name}/layer{layer}/even_null": even[1:, layer].mean(),
                }
        return metrics

    def _directions(self, theta: Vector) -> dict[str, Vector]:
        """Unit vectors by name: those of the path, once it has any, and the weights' own."""
        recorder, selection = self.recorder, self.recorder.selection
        assert recorder.trajectory is not None
        named: dict[str, Tensor] = {}
        if coefficients := joint_directions(recorder.trajectory, self.groups, self.directions):
            named = {f"pc{k}": row for k, row in enumerate(recorder.directions(coefficients), 1)}
        own = torch.zeros_like(theta.values)
        for group in chosen_groups(recorder.trajectory, self.groups):
            span = selection.slices[group]
            own[span] = theta.values[span]
        named["weights"] = own
        return {name: Vector(row / torch.linalg.vector_norm(row), selection) for name, row in named.items()}

    def _moved(
        self, at: Any, theta: Vector, direction: Vector, still: Float[Tensor, " L"]
    ) -> tuple[Float[Tensor, " L"], Float[Tensor, " L"]]:
        """Odd and even part of what a move changes."""
        ends = [at(theta.values + sign * self.norm * direction.values) for sign in (1, -1)]
        return (ends[0] - ends[1]) / 2, (ends[0] + ends[1]) / 2 - still

    def _entropies(self, module: LightningModule) -> Float[Tensor, " L"]:
        """Mean entropy of each layer over all batches."""
        assert isinstance(module, ShowsItsAttention)
        entropies = []
        for batch in self._batches.values():
            rows = [query_rows(weights, module, self.query) for weights in module.attention(batch)]
            entropies.append(torch.stack([concentration.entropy(row).double().mean() for row in rows]))
        return torch.stack(entropies).mean(0)
