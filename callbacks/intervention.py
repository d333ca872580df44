"""Change what a step does inside, or across, a subspace of the weights: an experiment, not a measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from mini_gpt_pl.callbacks.bases import BasisSource
from mini_gpt_pl.callbacks.probe import state_key
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.directions.steering import Steering
from mini_gpt_pl.geometry.optimizer.moments import Settings, rule_of
from mini_gpt_pl.geometry.vectors.selection import Vector, plain_name
from mini_gpt_pl.observation.decay import DecayShadows
from mini_gpt_pl.runs.logs import log_now, logging_due


class SubspaceIntervention(Callback):
    r"""Change every n-th step: x <- a P x + b (x - P x), x the gradient or the update, P the projection on a basis.

    Gains a = 1, b = 1 - s suppress the orthogonal part; a = 0, b = 1 remove the parallel one; a = b = 1 - s scale
    alone; a = 1 / (1 - s), b = 1 amplify the parallel part alone. With a = b = 1 nothing is touched, bit for bit.

    The gradient is that of all trained weights, accumulated and clipped, as the optimizer is about to see it. Adam
    then divides each coordinate by its own size: the motion leaves the subspace at once, and a constant factor is
    lost. The update is what the optimizer does beside weight decay, theta' - (1 - lr wd) theta; changed there, the
    motion stays where it is put. Decay that is inside the gradient (L2) counts as part of the update. Of an optimizer
    other than Adam, AdamW, SGD and SGDW decay is what is measured (`DecayShadows`).

    Weight decay goes on by itself: where the gradient of a weight is removed, the weight shrinks by exp(-lr wd t), and
    with b = 0 the network is erased rather than confined. `decay` switches it off, or restricts it to the span, from
    the first changed step on. Both set the optimizer's own decay to 0, which a recorder's nulls read: with `none` they
    know all of it, with `span` they leave out the decay of the span, which is taken behind the step.

    Logged under `intervention/<name>/` at the first changed step of every `log_every_n_steps`: parallel = |P x| / |x|
    before the change, parallel_null, what random directions in the same blocks hold, and change = |x' - x| / |x|.

    Args:
        parallel: a.
        orthogonal: b.
        basis: Where the directions come from; null where the gains are the same and decay is not restricted.
        space: What is changed.
        others: Whether weights outside of the basis are `orthogonal` to it, as in the original, or `untouched`.
        decay: What is decayed: `all` as configured, `span` the parallel part of the weights, `none` nothing.
        start: Steps to take before the first changed one.
        every: Change every n-th step from there.
        name: In metric names.

    Raises:
        UserError: A setting is out of range, the basis cannot be made, there is not one optimizer, float16 with a loss
            scaler may skip the step whose update is changed, a restricted decay is not decoupled, or, at the first
            changed step, the decay of an optimizer is not known, or goes on where it should not.

    Example:
        >>> scale = SubspaceIntervention(parallel=0.25, orthogonal=0.25, start=400)
        >>> remove = SubspaceIntervention(parallel=0.0, basis=BasisSource("path", run="runs/baseline"))
    """

    def __init__(
        self,
        parallel: float = 1.0,
        orthogonal: float = 1.0,
        basis: BasisSource | None = None,
        space: Literal["gradient", "update"] = "gradient",
        others: Literal["orthogonal", "untouched"] = "orthogonal",
        decay: Literal["all", "span", "none"] = "all",
        start: int = 0,
        every: int = 1,
        name: str = "subspace",
    ) -> None:
        if start < 0 or every < 1:
            raise UserError(f"SubspaceIntervention: start {start} (0 or more), every {every} (1 or more)")
        if basis is None and (parallel != orthogonal or decay == "span" or others == "untouched"):
            raise UserError("SubspaceIntervention: telling parallel from orthogonal parts needs a basis: give one")
        self.parallel = parallel
        self.orthogonal = orthogonal
        self.basis = basis
        self.space = space
        self.others = others
        self.decay = decay
        self.start = start
        self.every = every
        self.name = name
        self._reset()

    def _reset(self) -> None:
        self._steering: Steering | None = None
        self._named: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._decays: list[float] = []
        self._before: dict[str, Tensor] = {}
        self._rates: dict[str, float] = {}  # share of each weight that decay takes in the step
        self._shadows: DecayShadows | None = None
        self._started = False
        self._saved: dict[str, Any] | None = None
        self._span: Vector | None = None
        self._found: dict[str, Tensor] = {}
        self._telling = False

    @property
    @override
    def state_key(self) -> str:
        return state_key(self, name=self.name)

    # ------------------------------------------------------------------------------------------------ hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = self._the_optimizer(trainer)
        basis = None if self.basis is None else self.basis.build(pl_module)
        self._steering = Steering(basis, self.parallel, self.orthogonal, self.others == "orthogonal")
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(p.is_complex() for group in optimizer.param_groups for p in group["params"]):
            raise UserError("SubspaceIntervention: complex weights have no projection here: train real ones")
        self._named = {plain_name(raw): p for raw, p in pl_module.named_parameters() if id(p) in mine}
        if rule_of(optimizer) == "other" and (self.space == "update" or self.decay == "none"):
            self._shadows = DecayShadows(list(self._named.values()))
            if self._saved is not None:
                self._shadows.load_state_dict(self._saved)
        self._hooks = [
            optimizer.register_step_pre_hook(lambda _, args, kwargs: self._around(trainer, optimizer, args, kwargs)),
            optimizer.register_step_post_hook(lambda *_: self._after(optimizer)),
        ]

    def _the_optimizer(self, trainer: Trainer) -> Optimizer:
        if len(trainer.optimizers) != 1:
            raise UserError(f"SubspaceIntervention: {len(trainer.optimizers)} optimizers: it changes the steps of one")
        optimizer = trainer.optimizers[0]
        if self.space == "update" and getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise UserError(
                "SubspaceIntervention: float16 with a loss scaler skips steps: train in bf16-mixed or 32-true"
            )
        kinds = {Settings.of(optimizer, group).decay_at for group in optimizer.param_groups}
        if self.decay == "span" and kinds != {"before"}:
            raise UserError("SubspaceIntervention: decay span restricts decoupled decay: use AdamW")
        return optimizer

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.decay == "all" or trainer.global_step < self.start:
            return
        groups = trainer.optimizers[0].param_groups
        found = [float(group.get("weight_decay", 0.0)) for group in groups]
        if any(found):  # the first time, and again after a module that restores its settings on resume
            self._decays = found
            for group in groups:
                group["weight_decay"] = 0.0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        found, self._found = self._found, {}
        if found:
            metrics = {f"intervention/{self.name}/{key}": value for key, value in found.items()}
            log_now(trainer, metrics, trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @override
    def state_dict(self) -> dict[str, Any]:
        shadows = None if self._shadows is None else self._shadows.state_dict()
        return {"decays": list(self._decays), "shadows": shadows}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._decays, self._saved = list(state_dict["decays"]), state_dict.get("shadows")

    # -------------------------------------------------------------------------------------------- the step

    def _around(
        self, trainer: Trainer, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Come between the gradients, which Lightning computes and clips in the step's closure, and the step itself."""
        if kwargs.get("closure") is None and not (len(args) > 1 and args[1] is not None):
            self._act(trainer, optimizer)  # under a loss scaler they are there already
            return None
        own: Callable[[], Any] = kwargs["closure"] if kwargs.get("closure") is not None else args[1]

        def closure() -> Any:
            result = own()
            self._act(trainer, optimizer)
            return result

        return args[:1], {**kwargs, "closure": closure}

    @torch.no_grad()
    def _act(self, trainer: Trainer, optimizer: Optimizer) -> None:
        assert self._steering is not None
        step, basis = trainer.global_step, self._steering.basis
        if self._shadows is not None:
            self._shadows.read(optimizer)
        self._started = step >= self.start
        if not self._started:
            return
        if self.decay == "span" and basis is not None and self._span is None:
            weights = basis.selection.flatten([self._named[name] for name in basis.selection.names])
            self._span = basis.parallel(weights)
        if (step - self.start) % self.every != 0 or self._steering.is_identity:
            return
        self._telling = self._telling_due(trainer, step + 1)
        if self.space == "update":
            if not self._before:  # not again at the weights of a second closure
                self._before = {name: p.clone() for name, p in self._named.items() if p.grad is not None}
                self._rates = {} if self._shadows is not None else self._known_rates(optimizer)
            return
        self._steer({name: p.grad for name, p in self._named.items() if p.grad is not None})

    def _telling_due(self, trainer: Trainer, step: int) -> bool:
        """Whether the trainer has logged since the last changed step: changed steps need not be logged ones."""
        return any(logging_due(trainer, past) for past in range(step - self.every + 1, step + 1))

    def _known_rates(self, optimizer: Optimizer) -> dict[str, float]:
        rates: dict[int, float] = {}
        for group in optimizer.param_groups:
            settings = Settings.of(optimizer, group)
            rate = 0.0 if settings.decay_at == "gradient" else settings.lr * settings.decay
            rates |= {id(p): rate for p in group["params"]}
        return {name: rates[id(p)] for name, p in self._named.items()}

    def _measure_rates(self, optimizer: Optimizer) -> None:
        """Read off the shadows what decay has taken in the step that has just been made."""
        assert self._shadows is not None
        self._shadows.step()
        self._rates = dict(zip(self._named, self._shadows.taken, strict=True))
        if self._shadows.inside:
            self._rates = {name: 0.0 if rate != rate else rate for name, rate in self._rates.items()}
        if self._before and any(rate != rate for rate in self._rates.values()):
            raise UserError(
                f"SubspaceIntervention: {self._shadows.reasons[0]}, so that its update cannot be told from decay: "
                "set its weight decay to 0, or change the gradient (space: gradient)"
            )
        if self._started and self.decay == "none" and any(rate > 0.0 for rate in self._rates.values()):
            raise UserError(
                f"SubspaceIntervention: {type(optimizer).__name__} decays with a weight_decay of 0: switch that off in "
                "its own settings, and give decay: all"
            )

    def _steer(self, tensors: dict[str, Tensor]) -> None:
        assert self._steering is not None
        if self._telling:
            self._found = self._steering.measure(tensors)
        self._steering.apply_(tensors)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer) -> None:
        """Behind the step: put its update together otherwise, and decay what is to be decayed."""
        if self._shadows is not None:
            self._measure_rates(optimizer)
        before, self._before = self._before, {}
        if before:
            decayed = {name: weight.mul_(1.0 - self._rates[name]) for name, weight in before.items()}
            updates = {name: self._named[name] - weight for name, weight in decayed.items()}
            self._steer(updates)
            for name, update in updates.items():
                self._named[name].copy_(decayed[name].add_(update))
        span, self._span = self._span, None
        if span is not None:
            rates = {
                id(p): float(group["lr"]) * decay
                for group, decay in zip(optimizer.param_groups, self._decays, strict=True)
                for p in group["params"]
            }
            for name, part in span.selection.unflatten(span).items():
                self._named[name].sub_(part, alpha=rates[id(self._named[name])])
