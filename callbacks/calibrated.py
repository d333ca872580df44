"""Base of a reader's own probe: it measures what training did, and again what chance would have done."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.callbacks.last_gradient import loss_scale
from mini_gpt_pl.callbacks.measuring import measuring
from mini_gpt_pl.callbacks.probe import Estimate, state_key
from mini_gpt_pl.callbacks.recorded import StepProbe
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import surrogates
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.alignment import cosines
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.observation.steps import Step

Need = Literal["gradient", "update", "backbone"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class View:
    """What a probe sees of one optimizer step. Directions and the trajectory know nothing of the step itself.

    Args:
        step: Counted from 1.
        past: Gram matrices of the snapshots before it, as they were recorded.
        selection: The recorded weights, their order and groups.
        module: As it is after the step, in evaluation mode; for a forward pass of its own, `training_loss(module,
            batch)` of `mini_gpt_pl.callbacks.measuring`.
        batch: The step's last micro-batch.
        decay: Share of the weights that weight decay takes in this step, such as lr x weight decay: a number, NaN where
            it is not known; one for each weight of the selection where they differ.
        given: The vectors that the probe needs, by name.
        original: The view that this one stands in for; None for what training did.
        asked: Holds `module` once that has been read.
    """

    step: int
    past: Trajectory
    selection: ParameterSelection
    module: LightningModule
    batch: Any
    decay: float | Sequence[float]
    given: Mapping[str, Any] = field(repr=False)
    original: View | None = field(default=None, repr=False)
    asked: set[str] = field(default_factory=set, repr=False)

    def __getattribute__(self, name: str) -> Any:
        if name == "module":  # its own null is then measured at other weights
            object.__getattribute__(self, "asked").add(name)
        return object.__getattribute__(self, name)

    @property
    def trajectory(self) -> Trajectory:
        """Gram matrices of the snapshots before the step."""
        return self.past if self.original is None else self.original._walk

    @property
    def gradient(self) -> Vector:
        """The gradient that the step was made of: accumulated, averaged over ranks, before clipping."""
        return self._need("gradient", Vector)

    @property
    def update(self) -> Vector:
        """What the step did to the weights, theta_after - theta_before."""
        return self._need("update", Vector)

    @property
    def weights(self) -> Vector:
        """The weights before the step."""
        return self._need("weights", Vector)

    def backbone_cosines(self, vector: Vector) -> Tensor:
        """Cosines with the past's v_b: each group with its own, then the whole with the whole's, (G + 1,)."""
        own, whole = self._need("backbone", tuple)
        return torch.cat([cosines(vector, own)[:-1], cosines(vector, whole)[-1:]])

    def by_chance(self, generator: torch.Generator) -> View:
        """Return the same step as a decaying walk would have made it.

        The gradient becomes an isotropic vector, the update a step of the decaying walk (both of the measured length
        in every group), the trajectory the walk itself. Weights, backbone and batch stay. A measure that looks at the
        module finds it, while the null is measured, at the weights to which the drawn update leads.
        """
        drawn = dict(self.given)
        if "gradient" in drawn:
            drawn["gradient"] = surrogates.isotropic(self.gradient, generator)
        if "update" in drawn:
            drawn["update"] = surrogates.decaying_step(self.update, self.weights, self.decay, generator)
        return replace(self, given=drawn, original=self)

    @cached_property
    def _walk(self) -> Trajectory:
        # Only where a measure asks for it, and once for all draws: a pass over the snapshots of every group.
        return surrogates.decaying_walk(self.past)

    def _need(self, name: str, kind: type[_T]) -> _T:
        if name not in self.given:
            declared = "update" if name == "weights" else name
            raise UserError(f"a probe asks for {name}, which it does not declare: add {declared!r} to its `needs`")
        value: _T = self.given[name]
        return value


class CalibratedProbe(StepProbe):
    """Base of a probe of your own: say what you need and what you make of it, and the null comes with it.

    A subclass gives `measure`, and declares in `needs` which vectors are to be kept for it. The base does the rest: it
    asks on a schedule that a budget may stretch, once per optimizer step however many micro-batches it has; measures
    without a trace in training; leaves the numbers on the device until the trainer logs; keeps `memory` in
    checkpoints; and measures again on `draws` stand-ins of the step that chance and weight decay would have made
    (`View.by_chance`). Logged for each quantity, under `<family>/<group>/`: `<name>`, `<name>_null` (mean over the
    draws), `<name>_null_sd` (their spread; left out where nothing was drawn) and `<name>_excess`. A measure of the
    module itself needs `update`, or a `null` of its own: otherwise its null is unknown, and only the value is logged.

    Args:
        schedule: When to measure.
        draws: Stand-ins for the null; more make its mean and spread surer, at a measurement each.
        seed: Of the stand-ins, which are a function of it, the step and the draw.

    Attributes:
        family: First part of metric names; the class name in snake case for an empty one.
        needs: Any of `gradient`, `update` and `backbone`. Each of the first two is a copy of D values at every
            measurement (the update two); with the last nothing is measured before there is a backbone.
        memory: Vectors, tensors and numbers to compare the next measurement with. Set them in `remember`.

    Raises:
        UserError: There is no TrajectoryRecorder, a need is unknown or was not declared, or a measured value is neither
            a number nor one per group.

    Example:
        >>> class UpdateAlignment(CalibratedProbe):
        ...     needs = ("update", "backbone")
        ...
        ...     def measure(self, seen: View) -> dict[str, Tensor]:
        ...         return {"cosine": seen.backbone_cosines(seen.update)}
        >>> probe = UpdateAlignment(Schedule(every=50))
    """

    family: ClassVar[str] = ""
    needs: ClassVar[tuple[Need, ...]] = ()

    def __init__(self, schedule: Schedule = Schedule(every=100), draws: int = 8, seed: int = 0) -> None:  # noqa: B008
        super().__init__(schedule)
        if unknown := set(self.needs) - {"gradient", "update", "backbone"}:
            raise UserError(
                f"{type(self).__name__} needs {', '.join(sorted(unknown))}; there is gradient, update, backbone"
            )
        if draws < 1:
            raise UserError(
                f"{type(self).__name__}: draws {draws} would leave its numbers without a null: give 1 or more"
            )
        self.draws = draws
        self.seed = seed
        self.memory: dict[str, Vector | Tensor | float] = {}
        self._complete: Callable[[Any], View] | None = None
        self._restored: dict[str, tuple[str, Any]] = {}
        self._batch: Any = None

    # ---------------------------------------------------------------------------------------- to be written

    def measure(self, seen: View) -> Mapping[str, Tensor | float]:
        """Turn one step into numbers.

        It is called again on stand-ins of the step, so it must depend on its argument and on `memory` alone, and change
        neither.

        Returns:
            By name: a scalar, for the whole selection; G values, one per group; or G + 1, the last for the whole. An
            empty mapping where there is nothing to say yet.
        """
        raise NotImplementedError

    def null(self, seen: View) -> Mapping[str, Tensor | float] | None:
        """Give the null in closed form, in the form of what `measure` returns, if you have one; None draws it."""
        return None

    def remember(self, seen: View) -> None:
        """Put what the next measurement is compared with into `memory`; called after each measurement."""

    # ------------------------------------------------------------------------------------------------ hooks

    @property
    @override
    def state_key(self) -> str:
        return state_key(self, family=self._family)

    @property
    def _family(self) -> str:
        return self.family or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @override
    def _reset(self) -> None:
        self._complete, self.memory, self._restored = None, {}, {}

    @override
    def estimate(self, steps: int, dim: int) -> Estimate:
        vectors = len({"gradient"} & set(self.needs)) + 2 * len({"update"} & set(self.needs))
        return Estimate(type(self).__name__, bytes=4.0 * dim * (2 * vectors + 1), passes=0.0)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restored, self._restored = self._restored, {}
        for name, (kind, value) in restored.items():
            value = value.to(pl_module.device) if isinstance(value, Tensor) else value
            self.memory[name] = Vector(value, self.recorder.selection) if kind == "vector" else value
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch

    @override
    def before_step(self, step: Step) -> None:
        """Keep what the step is about to change, if it is due."""
        self._complete = None
        if self.due(step.count):
            with self.watch.running():
                self._complete = self._look(step)

    @override
    def after_step(self, step: Step) -> None:
        """Measure what the step did."""
        complete, self._complete = self._complete, None
        if complete is not None:
            assert self._trainer is not None
            with self.watch.running(), measuring(self._trainer, self._trainer.lightning_module), torch.no_grad():
                self._measure(complete(self._batch))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def state_dict(self) -> dict[str, Any]:
        memory: dict[str, tuple[str, Any]] = {}
        for name, value in self.memory.items():
            if isinstance(value, Vector) and value.selection.shards is not None:
                # This rank holds a share of it, and a checkpoint is written by rank zero.
                self._once(f"{type(self).__name__}: vectors of a sharded run are not kept in checkpoints")
                continue
            kind, plain = ("vector", value.values) if isinstance(value, Vector) else ("plain", value)
            memory[name] = kind, plain.detach().to("cpu", copy=True) if isinstance(plain, Tensor) else plain
        return {**super().state_dict(), "memory": memory}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict["memory"])

    # -------------------------------------------------------------------------------------------- measuring

    def _look(self, step: Step) -> Callable[[Any], View] | None:
        """Keep what the step is about to change; the result makes the view of it once the step is done."""
        recorder, selection = self.recorder, self.recorder.selection
        assert self._trainer is not None and recorder.trajectory is not None
        module = self._trainer.lightning_module
        given: dict[str, Any] = {}
        if "backbone" in self.needs:
            if (directions := recorder.backbone()) is None:
                return None
            given["backbone"] = directions
        if "gradient" in self.needs:
            if recorder.gradient.lost:
                return None
            scale = loss_scale(self._trainer, step.optimizer)
            gradient = recorder.gradient.of(module, scale)
            given["gradient"] = gradient if scale == 1.0 else Vector(gradient.values / scale, selection)
        if "update" in self.needs:
            given["weights"] = selection.weights(module)
        past = recorder.trajectory.until(step.number - 1)

        def complete(batch: Any) -> View:
            if "update" in self.needs:
                given["update"] = selection.weights(module) - given["weights"]
            return View(step.number, past, selection, module, batch, recorder.decayed, given)

        return complete

    def _measure(self, seen: View) -> None:
        measured = self._checked(self.measure(seen))
        if measured:
            chance, spread = self._chance(seen, measured, of_module="module" in seen.asked)
            numbers: dict[str, Tensor | float] = dict(measured)
            for name, null in chance.items():
                numbers |= {f"{name}_null": null, f"{name}_excess": measured[name] - null}
            self._keep(seen.step, self._family, numbers | {f"{name}_null_sd": sd for name, sd in spread.items()})
        self.remember(seen)

    def _chance(
        self, seen: View, measured: Mapping[str, Tensor], *, of_module: bool
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Mean and spread of the null by quantity; nothing where it is unknown."""
        if (closed := self.null(seen)) is not None:
            return self._checked(closed, measured), {}
        if of_module and ("update" not in self.needs or seen.selection.shards is not None):
            self._once(
                f"{type(self).__name__} measures the module: without 'update' in its `needs` (and where ranks share "
                "the weights) its null is unknown, and no excess is logged"
            )
            return {}, {}
        # What is neither of a gradient nor of an update has the walk's own Gram matrix, in closed form.
        draws = self.draws if {"gradient", "update"} & set(self.needs) else 1
        drawn = []
        for draw in range(draws):
            view = seen.by_chance(self._generator(seen, draw))
            with _stepped(view) if of_module else nullcontext():
                drawn.append(self._checked(self.measure(view), measured))
        if draws == 1:
            return drawn[0], {}
        stacked = {name: torch.stack([values[name] for values in drawn]) for name in measured}
        return {name: v.mean(0) for name, v in stacked.items()}, {name: v.std(0) for name, v in stacked.items()}

    def _generator(self, seen: View, draw: int) -> torch.Generator:
        shards = seen.selection.shards
        rank = 0 if shards is None else shards.index
        key = np.random.SeedSequence((self.seed, seen.step, draw, rank)).generate_state(1, np.uint64)[0]
        return torch.Generator(seen.module.device).manual_seed(int(key >> np.uint64(1)))

    def _checked(
        self, values: Mapping[str, Tensor | float], like: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Take values that were measured as float64; those of a null must be `like` what they are beside."""
        assert self._trainer is not None
        groups, checked = len(self.recorder.selection.groups), dict[str, Tensor]()
        for name, value in values.items():
            tensor = torch.as_tensor(value, dtype=torch.float64, device=self._trainer.strategy.root_device).detach()
            if tensor.shape not in {(), (groups,), (groups + 1,)}:
                raise UserError(
                    f"{type(self).__name__} measured {name!r} in the shape {tuple(tensor.shape)}: give a number, "
                    f"{groups} values (one per group) or {groups + 1} (the last for the whole selection)"
                )
            checked[name] = tensor
        for name, value in (like or {}).items():
            if name not in checked or checked[name].shape != value.shape:
                raise UserError(
                    f"{type(self).__name__}: the null of {name!r} is missing or of another shape: "
                    "let `measure` return the same names on every view, and `null` the same as `measure`"
                )
        return checked if like is None else {name: checked[name] for name in like}


@contextmanager
def _stepped(view: View) -> Iterator[None]:
    """Put the module at the weights to which a view's update leads; its own are exchanged, not written."""
    parameters = view.selection.parameters(view.module)
    after = view.selection.unflatten(Vector(view.weights.values + view.update.values, view.selection))
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, values in zip(parameters, after.values(), strict=True):
            parameter.data = values.to(parameter.dtype)
        yield
    finally:
        for parameter, data in zip(parameters, own, strict=True):
            parameter.data = data
