"""From the gradient to the update, rung by rung, beside the backbone of the past: what beta2 and decay do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.callbacks.last_gradient import loss_scale
from mini_gpt_pl.callbacks.probe import Estimate
from mini_gpt_pl.callbacks.recorded import StepProbe
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.optimizer import predictions
from mini_gpt_pl.geometry.optimizer.counterfactual import OtherSecondMoments
from mini_gpt_pl.geometry.optimizer.displacement import DisplacementSplit
from mini_gpt_pl.geometry.optimizer.moments import BeforeStep, Ladder, Settings, rule_of
from mini_gpt_pl.geometry.path import nulls
from mini_gpt_pl.geometry.vectors.alignment import Products, noise_floor
from mini_gpt_pl.geometry.vectors.selection import Vector
from mini_gpt_pl.observation.steps import Step

# The ladder holds seven vectors at once, and as many while it is built.
_TRANSIENT = 14


class OptimizerAnatomy(StepProbe):
    r"""How an optimizer turns gradients that hardly see the backbone into updates that follow it.

    Reads the optimizer's own state after a step: Adam and AdamW (single-tensor, foreach, fused, amsgrad), SGD with
    momentum, Nesterov and dampening, and SGDW. Of any other optimizer only the gradient and the true update are shown.
    Directions are those of the snapshots before the step. Logged under `anatomy/<group>/`, signed as steps, so that
    cos_gradient is minus the `alignment/<group>/gradient` of the clipped gradient: each rung's cosine with the
    backbone, and that of the steps which other values of beta2 would have made of the same gradients; for the whole
    selection also how much of the update its formula explains, how far the moments remember and how coherent the
    gradients are, beside what gradients without mean give and what `geometry.optimizer.predictions` says. With `split`,
    for the interval that ends at each step of the recorder's schedule, what gradient, decay and clipping moved of it.

    Args:
        schedule: When to read the ladder: some 60 passes over D values.
        counterfactual_beta2: Other values of beta2, each in [0, 1). Each costs D values of memory (4 bytes; in the
            checkpoint too) and two passes at every step. Ignored by optimizers without a second moment.
        split: Account for every step's gradient, decay and clipping part: some 25 passes over D values at every step, 5
            D values of memory (6 with L2) and in the checkpoint.
        coordinates: Size of the fixed random subset of coordinates behind quantiles, means and variances.
        seed: Of that subset.

    Raises:
        UserError: The trainer has no TrajectoryRecorder, or an argument is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from mini_gpt_pl.callbacks import TrajectoryRecorder
        >>> recorder = TrajectoryRecorder(r"(?P<group>layer\d)\..*weight", Schedule(every=100))
        >>> trainer = Trainer(callbacks=[recorder, OptimizerAnatomy(counterfactual_beta2=[0.9, 0.99])])
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(every=50),  # noqa: B008 (frozen)
        counterfactual_beta2: list[float] | None = None,
        split: bool = False,
        coordinates: int = 65536,
        seed: int = 0,
    ) -> None:
        super().__init__(schedule)
        self.counterfactual_beta2 = list(dict.fromkeys(counterfactual_beta2 or []))
        if not all(0.0 <= beta2 < 1.0 for beta2 in self.counterfactual_beta2):
            raise UserError(f"counterfactual_beta2 is {counterfactual_beta2}: give values from 0 to below 1")
        if coordinates < 1:
            raise UserError(f"the anatomy's coordinates is {coordinates}: give 1 or more")
        self.split = split
        self.coordinates = coordinates
        self.seed = seed
        self.stretchable = not (split or self.counterfactual_beta2)  # those see every step
        self._reset()

    @override
    def _reset(self) -> None:
        self._others: OtherSecondMoments | None = None
        self._parts: DisplacementSplit | None = None
        self._restored: Mapping[str, Any] | None = None
        self._before: BeforeStep | None = None
        self._directions: tuple[Vector, Vector] | None = None
        self._reading = self._closing = False
        self._subset = torch.zeros(0, dtype=torch.int64)
        self._earlier: tuple[int, Tensor] | None = None
        self._grown = 0

    @override
    def estimate(self, steps: int, dim: int) -> Estimate:
        held = len(self.counterfactual_beta2) + (8 if self.split else 0)
        return Estimate(type(self).__name__, bytes=4.0 * dim * (held + _TRANSIENT), passes=0.0)

    # ------------------------------------------------------------------------------------------------ hooks

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        selection = self.recorder.selection
        parameters = selection.parameters(pl_module)
        trained = filter(self.recorder.steps.trains, trainer.optimizers)
        optimizer = next(trained, trainer.optimizers[0])
        self._subset = coordinate_subset(selection.local_dim, self.coordinates, self.seed).to(parameters[0].device)
        if (rule := rule_of(optimizer)) == "other":
            self._once(f"the anatomy knows no rule of {type(optimizer).__name__}: it shows gradient and update only")
        elif self.split:
            self._parts = DisplacementSplit(optimizer, parameters)
        if self.counterfactual_beta2 and rule == "adam":
            if any(group.get("amsgrad") for group in optimizer.param_groups):
                raise UserError("counterfactual_beta2 knows no amsgrad: set the optimizer's amsgrad to false")
            self._others = OtherSecondMoments(optimizer, parameters, self.counterfactual_beta2)
        elif self.counterfactual_beta2:
            self._once(f"{type(optimizer).__name__} has no beta2: the anatomy shows no counterfactual one")
        if self._restored is not None:
            self._restore(self._restored)
        super().on_train_start(trainer, pl_module)

    @override
    def before_step(self, step: Step) -> None:
        """Remember what the step is about to destroy, if it is looked at."""
        self._before = None
        reading = self.due(step.count)
        closing = self._parts is not None and self.recorder.schedule.due(step.count)
        if not (reading or self._others or self._parts) or self.recorder.gradient.lost:
            return
        assert self._trainer is not None
        module, optimizer = self._trainer.lightning_module, step.optimizer
        with self.watch.running():
            scale = loss_scale(self._trainer, optimizer)
            # An optimizer that is not known may replace `.grad` within its step, as one with two closures does.
            unclipped = self._parts is not None or (reading and rule_of(optimizer) == "other")
            l2 = any(Settings.of(optimizer, group).l2 != 0.0 for group in optimizer.param_groups)
            self._before = BeforeStep.of(
                optimizer,
                self.recorder.selection.parameters(module),
                weights=reading or self._parts is not None or _has_scaler(self._trainer) or l2,
                gradients=self.recorder.gradient.parts(module, scale) if unclipped else (),
                loss_scale=scale,
            )
            self._reading, self._closing = reading, closing
            if reading or closing:
                self._directions = self.recorder.backbone()  # here, as it must not know this step
            if reading:
                self._growth(step.number)

    @override
    def after_step(self, step: Step) -> None:
        """Read what the step did."""
        before, self._before = self._before, None
        if before is not None:
            with self.watch.running():
                self._after(step, before)
            self._directions = None

    @override
    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "grown": self._grown, "split": None, "others": None, "earlier": None}
        if self._recorder is None or self._recorder.trajectory is None:
            return state
        state["fingerprint"] = self.recorder.selection.fingerprint
        if self.recorder.selection.shards is not None:
            return state  # a checkpoint holds one rank's state: a resumed run begins split and counterfactuals anew
        if self._earlier is not None:
            state["earlier"] = {"step": self._earlier[0], "values": self._earlier[1].cpu()}
        if self._parts is not None:
            state["split"] = self._parts.state_dict()
        if self._others is not None:
            state["others"] = self._others.state_dict()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def _restore(self, state: Mapping[str, Any]) -> None:
        selection, self._restored = self.recorder.selection, None
        selection.require(state.get("fingerprint", selection.fingerprint))
        self._grown = state["grown"]
        earlier = state["earlier"]
        if earlier is not None and len(earlier["values"]) == len(self._subset):
            self._earlier = (earlier["step"], earlier["values"].to(self._subset.device))
        if self._parts is not None and state["split"] is not None:
            self._parts.load_state_dict(state["split"])
        if self._others is not None and state["others"] is not None:
            self._others.load_state_dict(state["others"])

    # --------------------------------------------------------------------------------------------- measuring

    def _after(self, step: Step, before: BeforeStep) -> None:
        assert self._trainer is not None
        optimizer = step.optimizer
        if any(parameter.grad is None for _, _, parameter in before.touched()):
            self._once("the gradients are gone when the step is over: the anatomy has nothing to read")
            return
        if _has_scaler(self._trainer) and all(map(torch.equal, before.weights, before.parameters)):
            return  # fp16 training has left the step out
        if self._others is not None:
            self._others.feed(optimizer, before)
        if self._parts is not None:
            self._parts.account(optimizer, before)
        if self._reading:
            replaced = step.evaluations > 1 or step.elsewhere
            self._read(step, Ladder.of(optimizer, before, self.recorder.selection, unclipped=replaced), before)
        if self._closing:
            self._close(step.number)

    def _read(self, step: Step, ladder: Ladder, before: BeforeStep) -> None:
        """Show everything about one step."""
        vectors = ladder.rungs() | {"difference": ladder.difference}
        if not any(s.decay for _, s, _ in before.touched() if s.decay_at != "gradient"):
            vectors.pop("decay", None)
        others = {} if self._others is None else self._others.steps(before, ladder)
        for beta2, (normalised, update) in others.items():
            vectors |= {f"normalised_beta2_{beta2:g}": normalised, f"update_beta2_{beta2:g}": update}
        products = self._products(vectors)
        if self._directions is not None:
            cosines = {f"cos_{name}": _against(products, name) for name in vectors if name != "difference"}
            self._keep(step.number, "anatomy", cosines)
            floors = torch.tensor([noise_floor(dim) for dim in self.recorder.dims], dtype=torch.float64)
            self._keep(step.number, "anatomy", {"noise_floor": floors})
        square = products.dot("difference", "difference")[-1]
        rest = square - 2.0 * products.dot("difference", "update")[-1] + products.dot("update", "update")[-1]
        whole = {"unexplained": (rest.clamp_min(0.0) / square).sqrt()}
        for beta2 in others:
            whole[f"agreement_beta2_{beta2:g}"] = products.cosine(f"normalised_beta2_{beta2:g}", "normalised")[-1]
        self._keep(step.number, "anatomy", whole | self._moments(step, ladder))

    def _moments(self, step: Step, ladder: Ladder) -> dict[str, Tensor]:
        """Adam's memory, and what `predictions` says of it."""
        if ladder.momentum is None or ladder.normalised is None or ladder.denominator is None:
            return {}
        assert ladder.settings is not None
        beta1, beta2 = ladder.settings.beta1, ladder.settings.beta2
        null = predictions.white_noise(beta1, beta2, step.count)
        constants = {
            "memory_beta1": predictions.memory(beta1),
            "memory_beta2": predictions.memory(beta2),
            "coherence_median_null": null.coherence_median,
        }
        if null.has_means:
            constants |= {"coherence_null": null.coherence, "update_size_null": null.size}
        self._keep(step.number, "anatomy", constants)
        u, m, root = (v.values[self._subset] for v in (ladder.normalised, ladder.momentum, ladder.denominator))
        measured = predictions.memory_metrics(u, null) | {"preconditioner_spread": predictions.spread(root)}
        if self._earlier is not None:
            past, values = self._earlier
            measured |= predictions.averaging_metrics(m, values, root.square(), beta1, step.count - past)
        self._earlier = (step.count, m)
        return measured

    def _growth(self, step: int) -> None:
        """The backbone's share of the drift and its prediction, if a snapshot is new; on the host, with the Gram."""
        trajectory = self.recorder.trajectory
        if trajectory is None or len(trajectory) == self._grown:
            return
        self._grown = len(trajectory)
        gram = trajectory.gram()
        grams = {"": gram, "_walk": nulls.walk(gram), "_decaying_walk": trajectory.decaying_walk()}
        for suffix, matrix in grams.items():
            if matrix.isnan().any():
                continue  # what decay takes is not known
            if (growth := predictions.backbone_growth(matrix)) is not None:
                shares = {f"fraction{suffix}": growth.measured, f"fraction_predicted{suffix}": growth.predicted}
                self._keep(step, "anatomy", shares)

    def _close(self, step: int) -> None:
        """Show the parts of the interval that ends here."""
        assert self._parts is not None
        products = self._products(self._parts.close(self.recorder.selection))
        square = products.dot("displacement", "displacement")[-1]
        whole = {f"share_{part}": products.dot(part, "displacement")[-1] / square for part in self._parts.PARTS}
        whole["split_unexplained"] = (products.dot("rounding", "rounding")[-1] / square).sqrt()
        self._keep(step, "anatomy", whole)
        if self._directions is not None:
            self._keep(step, "anatomy", {f"along_{part}": _along(products, part) for part in self._parts.PARTS})

    def _products(self, vectors: dict[str, Vector]) -> Products:
        """Inner products of vectors with one another and with the backbone of the past, once there is one."""
        return Products(vectors | dict(zip(("own", "whole"), self._directions or (), strict=False)))


def coordinate_subset(dim: int, size: int, seed: int) -> Tensor:
    """Draw coordinates of a flat vector, a pure function of the arguments: sorted, without repetition.

    All of them if there are no more than `size`, otherwise `size` draws with repetitions taken out.
    """
    if dim <= size:
        return torch.arange(dim)
    draws = np.random.Generator(np.random.Philox(key=seed)).integers(dim, size=size)
    return torch.from_numpy(np.unique(draws))


def _against(products: Products, name: str) -> Float[Tensor, " G1"]:
    """Cosine of each group with its own backbone, then of the whole with the whole's."""
    return torch.cat([products.cosine(name, "own")[:-1], products.cosine(name, "whole")[-1:]])


def _along(products: Products, name: str) -> Float[Tensor, " G1"]:
    """Coordinate on the unit backbone, of each group and of the whole."""
    own = products.dot(name, "own") / products.dot("own", "own").sqrt()
    whole = products.dot(name, "whole") / products.dot("whole", "whole").sqrt()
    return torch.cat([own[:-1], whole[-1:]])


def _has_scaler(trainer: Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None
