"""Push the weights once, or now and then, across a subspace: along the commutator, or anywhere, equally far."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.callbacks.bases import BasisSource, draw_seed
from mini_gpt_pl.callbacks.commutator import trained
from mini_gpt_pl.callbacks.measuring import measuring, training_loss
from mini_gpt_pl.callbacks.pairs import BatchPairs
from mini_gpt_pl.callbacks.probe import state_key
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.curvature import commutator
from mini_gpt_pl.geometry.directions.steering import Steering
from mini_gpt_pl.geometry.vectors.free_weights import FreeWeights
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.runs.logs import log_now


class Kick(Callback):
    r"""Add a vector across a subspace to the weights, between two steps: theta <- theta + l u, |u| = 1.

    u is the part orthogonal to the basis of either the commutator, the coordinate-wise median over K pairs of batches
    of H_B g_A - H_A g_B, or a Gaussian vector. The length l is given, or in units of a gradient step as the original
    has it: l = multiple x eta x |g|, |g| the median over the same pairs of |g_A| at the weights as they are. Both
    directions then measure the same pairs, so that the arms are matched: at one point they kick equally far.

    Pairs and Gaussian vectors are a function of (seed, `seed_everything`, step). Gradients are taken on a copy, in
    float64; those of training, and the optimizer's state, stay as they are. A kick counts to no step: a recorder sees
    it in its next snapshot. Where the commutator vanishes, so does the kick.

    Logged under `intervention/<name>/` at each kick: its length, also relative to |theta|.

    Args:
        direction: What u is made from.
        basis: Of the subspace that u is orthogonal to; null for none.
        length: l in parameter units; or
        multiple: l in units of eta |g|.
        eta: Size of that gradient step.
        samples: K.
        start: Steps to take before the kick.
        every: Kick again every so many steps; null for once.
        size: Samples in a batch; null for the drawer's own, or half of the training batch.
        seed: Of pairs and directions.
        name: In metric names.

    Raises:
        UserError: A setting is out of range, not exactly one of length and multiple is given, the basis cannot be
            made, the module has no loss of one batch or one without a second derivative, or there are several devices.

    Example:
        >>> kick = Kick("commutator", BasisSource("path", run="runs/baseline"), multiple=10.0, start=500)
    """

    def __init__(
        self,
        direction: Literal["commutator", "gaussian"] = "commutator",
        basis: BasisSource | None = None,
        length: float | None = None,
        multiple: float | None = None,
        eta: float = 1e-3,
        samples: int = 5,
        start: int = 0,
        every: int | None = None,
        size: int | None = None,
        seed: int = 0,
        name: str = "kick",
    ) -> None:
        if direction not in ("commutator", "gaussian"):
            raise UserError(f"Kick: direction {direction!r}; choose commutator or gaussian")
        if (length is None) == (multiple is None):
            raise UserError("Kick: give its length, or its multiple of a gradient step, and not both")
        if not (multiple if length is None else length) > 0:  # type: ignore[operator]
            raise UserError(f"Kick: length {length}, multiple {multiple}: give one above 0")
        if start < 0 or samples < 1 or not eta > 0 or (every is not None and every < 1):
            raise UserError(f"Kick: start {start} (0 or more), every {every}, samples {samples} (1 or more), eta {eta}")
        self.direction = direction
        self.basis = basis
        self.length = length
        self.multiple = multiple
        self.eta = eta
        self.samples = samples
        self.start = start
        self.every = every
        self.size = size
        self.seed = seed
        self.name = name
        self._reset()

    def _reset(self) -> None:
        self._steering: Steering | None = None
        self._selection: ParameterSelection | None = None
        self._pairs: BatchPairs | None = None
        self._done = -1
        self._kicked: tuple[int, dict[str, Tensor]] | None = None

    @property
    @override
    def state_key(self) -> str:
        return state_key(self, name=self.name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise UserError("Kick: each rank would kick its own weights: train on one device")
        self._selection = trained(pl_module, "", type(self).__name__)
        FreeWeights(pl_module, self._selection)  # raises, here rather than at the first kick, where it cannot be made
        self._pairs = BatchPairs(trainer, pl_module, draw_seed(self.seed), self.size, torch.float64)
        if self.basis is not None:
            self._steering = Steering(self.basis.build(pl_module).to(dtype=torch.float64), 0.0, 1.0)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        past = step - self.start
        due = past == 0 or (past > 0 and self.every is not None and past % self.every == 0)
        if not due or step == self._done:
            return
        assert self._selection is not None
        self._done = step  # once per optimizer step, before its first micro-batch
        with measuring(trainer, pl_module):
            kick = self._kick(pl_module, batch, step)
        with torch.no_grad():
            for parameter, part in zip(self._selection.parameters(pl_module), kick.values(), strict=True):
                parameter.add_(part.to(parameter.dtype))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._kicked is not None:
            (step, numbers), self._kicked = self._kicked, None
            log_now(trainer, {f"intervention/{self.name}/{key}": value for key, value in numbers.items()}, step)

    def _kick(self, module: LightningModule, batch: Any, step: int) -> dict[str, Tensor]:
        assert self._selection is not None
        selection = self._selection
        free = FreeWeights(module, selection)
        theta = free.weights.values
        norm, direction = self._measure(free, module, batch, step)
        if direction is None:
            # On the host, so that a GPU has the same.
            generator = torch.Generator().manual_seed(draw_seed(self.seed, step))
            direction = torch.randn(len(theta), generator=generator, dtype=theta.dtype).to(theta.device)
        if self._steering is not None:
            self._steering.apply_(selection.unflatten(Vector(direction, selection)))
        size = torch.linalg.vector_norm(direction)
        length = torch.where(size > 0, norm, 0.0)
        kick = direction * (length / size.clamp_min(torch.finfo(torch.float64).tiny))
        self._kicked = (step, {"length": length, "relative": length / torch.linalg.vector_norm(theta)})
        return selection.unflatten(Vector(kick, selection))

    def _measure(
        self, free: FreeWeights, module: LightningModule, batch: Any, step: int
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " D"] | None]:
        """The length to kick, and the commutator if that is the direction."""
        assert self._pairs is not None
        theta, norms, brackets = free.weights.values, [], []
        fixed = None if self.length is None else torch.as_tensor(self.length, dtype=theta.dtype, device=theta.device)
        if fixed is not None and self.direction == "gaussian":
            return fixed, None
        for sample in range(self.samples):
            losses = [free.loss(partial(training_loss, module, part)) for part in self._pairs(step, sample, batch)]
            if self.direction == "gaussian":
                gradient = commutator.gradient(losses[0], theta)
            else:
                try:
                    pair = commutator.by_hessian(losses[0], losses[1], theta)
                except commutator.NotTwiceError as error:
                    raise UserError(f"Kick: {error}: kick in direction gaussian") from None
                gradient = pair.grad_a
                brackets.append(pair.bracket)
            norms.append(torch.linalg.vector_norm(gradient))
        length = fixed if fixed is not None else (self.multiple or 0.0) * self.eta * middle(norms)
        return length, middle(brackets) if brackets else None


def middle(values: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, "*shape"]:
    """Median over a sequence, coordinate by coordinate; the mean of the middle two where its length is even."""
    ordered = torch.stack(list(values)).sort(0).values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
