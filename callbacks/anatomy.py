"""From the gradient to the update, rung by rung, beside the backbone of the past: what beta2 and decay do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from mini_gpt_pl.callbacks.last_gradient import loss_scale
from mini_gpt_pl.callbacks.probe import Deferred, Estimate, Row, StepProbe
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.callbacks.trajectory import TrajectoryRecorder, find_recorder
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.optimizer import predictions
from mini_gpt_pl.geometry.optimizer.counterfactual import OtherSecondMoments
from mini_gpt_pl.geometry.optimizer.displacement import DisplacementSplit
from mini_gpt_pl.geometry.optimizer.moments import BeforeStep, Ladder, Settings, rule_of
from mini_gpt_pl.geometry.path import nulls
from mini_gpt_pl.geometry.vectors.alignment import Products, noise_floor
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.observation.steps import Step

# The ladder holds seven vectors at once, and as many while it is built.
_TRANSIENT = 14


class OptimizerAnatomy(StepProbe):
    r"""How an optimizer turns gradients that hardly see the backbone into updates that follow it.

    Reads the optimizer's own state after a step: Adam and AdamW (single-tensor, foreach, fused, amsgrad), SGD with
    momentum, Nesterov and dampening, and SGDW. Of any other optimizer only the gradient and the true update are shown.
    Directions are those of the snapshots before the step. Logged under `anatomy/<group>/`, signed as steps, so that
    cos_gradient is minus the `alignment/<group>/gradient` of the clipped gradient:

    * cos_gradient, cos_momentum, cos_normalised, cos_update: each rung with the backbone; cos_decay of the decoupled
      decay alone; noise_floor, the mean |cos| of an isotropic vector.
    * For each counterfactual beta2, `cos_normalised_beta2_<value>` and `cos_update_beta2_<value>`: what this step would
      have been, from the same gradients, had the second moment another memory.

    For the whole selection only:

    * unexplained: ||true update - its formula|| / ||true update||, the rounding of the weights if all is well.
    * memory_beta1, memory_beta2: -1/ln(beta) in steps; preconditioner_spread: decades between the 10 % and the 90 %
      quantile of sqrt(v_hat) + eps; `agreement_beta2_<value>`: cosine of that normalised rung with the true one.
    * coherence and coherence_median of u_i^2, u = m_hat / (sqrt(v_hat) + eps), beside what gradients without mean give,
      coherence_null and coherence_median_null; snr: effective signal-to-noise ratio, freed of that null.
    * The paper beside the measurement: momentum_variance (eq. 17), amplification (eq. 18) and update_size, the mean
      |u_i| (eq. 19), each with `_predicted`; update_size_null. Eqs. 20 and 21, whenever a snapshot is new:
      fraction and fraction_predicted, both also of the two null walks, as `_walk` and `_decaying_walk`.

    With `split`, for the interval that ends at each step of the recorder's schedule: share_gradient, share_decay and
    share_clipping, projections of the three parts on the true displacement in units of its length (they sum to 1);
    along_gradient, along_decay and along_clipping, their coordinates on the backbone in parameter units (per group
    too); split_unexplained, the length of what the formula does not explain (the rounding of the
    weights, counted with the gradient), in units of the displacement's.

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
        self._recorder: TrajectoryRecorder | None = None
        self._subset: Tensor = torch.zeros(0, dtype=torch.int64)
        self._others: OtherSecondMoments | None = None
        self._parts: DisplacementSplit | None = None
        self._restored: Mapping[str, Any] | None = None
        self._noted: set[str] = set()
        self._reset()

    def _reset(self) -> None:
        self._deferred = Deferred()
        self._known: dict[int, dict[str, float]] = {}  # numbers that never were on the device
        self._before: BeforeStep | None = None
        self._directions: tuple[Vector, Vector] | None = None
        self._reading = self._closing = False
        self._earlier: tuple[int, Tensor] | None = None
        self._grown = 0

    @override
    def estimate(self, steps: int, dim: int) -> Estimate:
        held = len(self.counterfactual_beta2) + (8 if self.split else 0)
        return Estimate(type(self).__name__, bytes=4.0 * dim * (held + _TRANSIENT), passes=0.0)

    # ------------------------------------------------------------------------------------------------ hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._recorder = find_recorder(trainer, type(self).__name__)
            self._trainer = trainer
            self._others = self._parts = self._restored = None
            self._reset()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        selection = self.recorder.selection
        parameters, optimizer = selection.parameters(pl_module), self._first_optimizer(trainer)
        self._subset = coordinate_subset(selection.local_dim, self.coordinates, self.seed).to(parameters[0].device)
        if (rule := rule_of(optimizer)) == "other":
            self._note(f"the anatomy knows no rule of {type(optimizer).__name__}: it shows gradient and update only")
        elif self.split:
            self._parts = DisplacementSplit(optimizer, parameters)
        if self.counterfactual_beta2 and rule == "adam":
            if any(group.get("amsgrad") for group in optimizer.param_groups):
                raise UserError("counterfactual_beta2 knows no amsgrad: set the optimizer's amsgrad to false")
            self._others = OtherSecondMoments(optimizer, parameters, self.counterfactual_beta2)
        elif self.counterfactual_beta2:
            self._note(f"{type(optimizer).__name__} has no beta2: the anatomy shows no counterfactual one")
        if self._restored is not None:
            self._restore(self._restored, selection)
        self.recorder.attach(self)

    def _first_optimizer(self, trainer: Trainer) -> Optimizer:
        mine = (optimizer for optimizer in trainer.optimizers if self.recorder.steps.trains(optimizer))
        return next(mine, trainer.optimizers[0])

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
            self._before = BeforeStep.of(
                optimizer,
                self.recorder.selection.parameters(module),
                weights=reading or self._parts is not None or _has_scaler(self._trainer) or _has_l2(optimizer),
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
        self._flush()
        state: dict[str, Any] = {"grown": self._grown, "split": None, "others": None, "earlier": None}
        if self._recorder is not None and self._recorder.trajectory is not None:
            state["fingerprint"] = self._recorder.selection.fingerprint
        if self._shared:
            return state  # a checkpoint holds one rank's callback state, and the rest is spread over all of them
        if self._earlier is not None:
            state["earlier"] = {"step": self._earlier[0], "values": self._earlier[1].cpu()}
        if self._parts is not None:
            state["split"] = self._parts.state_dict()
        if self._others is not None:
            state["others"] = self._others.state_dict()
        return state

    @property
    def _shared(self) -> bool:
        """Whether ranks share the weights (FSDP): a resumed run then begins split and counterfactuals anew."""
        recorder = self._recorder
        return recorder is not None and recorder.trajectory is not None and recorder.selection.shards is not None

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def _restore(self, state: Mapping[str, Any], selection: ParameterSelection) -> None:
        self._restored = None
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

    @property
    def recorder(self) -> TrajectoryRecorder:
        """The callback that owns the backbone."""
        if self._recorder is None:
            raise RuntimeError("the probe is used before Trainer.fit has set it up")
        return self._recorder

    def _after(self, step: Step, before: BeforeStep) -> None:
        assert self._trainer is not None
        optimizer = step.optimizer
        if any(parameter.grad is None for _, _, parameter in before.touched()):
            self._note("the gradients are gone when the step is over: the anatomy has nothing to read")
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

    def _read(self, at: Step, ladder: Ladder, before: BeforeStep) -> None:
        """Everything about one step."""
        step = at.number
        vectors = ladder.rungs() | {"difference": ladder.difference}
        if not any(s.decay for _, s, _ in before.touched() if s.decay_at != "gradient"):
            vectors.pop("decay", None)
        others = {} if self._others is None else self._others.steps(before, ladder)
        for beta2, (normalised, update) in others.items():
            vectors |= {f"normalised_beta2_{beta2:g}": normalised, f"update_beta2_{beta2:g}": update}
        products = Products(self._with_directions(vectors))
        rungs = [name for name in vectors if name != "difference"]
        if self._directions is not None:
            self._add(step, {f"cos_{name}": _against(products, name) for name in rungs})
            self._know(step, "noise_floor", [noise_floor(dim) for dim in self._dims()])
        whole: dict[str, Tensor] = {"unexplained": _left_over(products, "difference", "update")}
        for beta2 in others:
            whole[f"agreement_beta2_{beta2:g}"] = products.cosine(f"normalised_beta2_{beta2:g}", "normalised")[-1]
        self._add_whole(step, whole | self._moments(at, ladder))

    def _moments(self, step: Step, ladder: Ladder) -> dict[str, Tensor]:
        """Adam's memory, and the paper's eqs. 17 to 19."""
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
        self._known.setdefault(step.number, {}).update({self._key(name): value for name, value in constants.items()})
        u, m, root = (v.values[self._subset] for v in (ladder.normalised, ladder.momentum, ladder.denominator))
        found = predictions.memory_metrics(u, null) | {"preconditioner_spread": predictions.spread(root)}
        if self._earlier is not None:
            past, values = self._earlier
            found |= predictions.averaging_metrics(m, values, root.square(), beta1, step.count - past)
        self._earlier = (step.count, m)
        return found

    def _growth(self, step: int) -> None:
        """Eqs. 20 and 21 on the snapshots so far, if one is new; on the host, where the Gram lies."""
        trajectory = self.recorder.trajectory
        if trajectory is None or len(trajectory) == self._grown:
            return
        self._grown = len(trajectory)
        gram = trajectory.gram()
        grams = {"": gram, "_walk": nulls.walk(gram), "_decaying_walk": trajectory.decaying_walk()}
        known = self._known.setdefault(step, {})
        for suffix, matrix in grams.items():
            if matrix.isnan().any():
                continue  # what decay takes is not known
            if (growth := predictions.backbone_growth(matrix)) is not None:
                known[self._key(f"fraction{suffix}")] = growth.measured
                known[self._key(f"fraction_predicted{suffix}")] = growth.predicted

    def _close(self, step: int) -> None:
        """The interval that ends here, in its parts."""
        assert self._parts is not None
        vectors = self._parts.close(self.recorder.selection)
        products = Products(self._with_directions(vectors))
        square = products.dot("displacement", "displacement")[-1]
        whole = {f"share_{part}": products.dot(part, "displacement")[-1] / square for part in self._parts.PARTS}
        whole["split_unexplained"] = (products.dot("rounding", "rounding")[-1] / square).sqrt()
        self._add_whole(step, whole)
        if self._directions is not None:
            self._add(step, {f"along_{part}": _along(products, part) for part in self._parts.PARTS})

    def _with_directions(self, vectors: dict[str, Vector]) -> dict[str, Vector]:
        if self._directions is None:
            return vectors
        return vectors | {"own": self._directions[0], "whole": self._directions[1]}

    # ----------------------------------------------------------------------------------------------- logging

    def _key(self, quantity: str, label: str | None = None) -> str:
        return f"anatomy/{label or self.recorder.name}/{quantity}"

    def _labels(self) -> tuple[str, ...]:
        return (*self.recorder.selection.groups, self.recorder.name)

    def _dims(self) -> tuple[int, ...]:
        return (*self.recorder.selection.dims, self.recorder.selection.dim)

    def _add(self, step: int, found: Mapping[str, Float[Tensor, " G1"]]) -> None:
        names = [self._key(quantity, label) for quantity in found for label in self._labels()]
        self._deferred.add(step, names, torch.cat(list(found.values())))

    def _add_whole(self, step: int, found: Mapping[str, Tensor]) -> None:
        values = torch.stack([value.double() for value in found.values()])
        self._deferred.add(step, [self._key(quantity) for quantity in found], values)

    def _know(self, step: int, quantity: str, values: Sequence[float]) -> None:
        named = zip(self._labels(), values, strict=True)
        self._known.setdefault(step, {}).update({self._key(quantity, label): value for label, value in named})

    def _take_rows(self) -> Iterable[Row]:
        measured, known = self._deferred.take(), self._known
        self._known = {}
        for step, numbers in measured:
            known.setdefault(step, {}).update(numbers)
        for step in sorted(known):
            # Where nothing has moved, what is in units of the step is none.
            yield step, {name: value for name, value in known[step].items() if value == value}

    def _note(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            rank_zero_info(text)


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


def _left_over(products: Products, true: str, formula: str) -> Float[Tensor, ""]:
    """Length of true - formula over that of true, of the whole."""
    square = products.dot(true, true)[-1]
    rest = square - 2.0 * products.dot(true, formula)[-1] + products.dot(formula, formula)[-1]
    return (rest.clamp_min(0.0) / square).sqrt()


def _has_scaler(trainer: Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _has_l2(optimizer: Optimizer) -> bool:
    return any(Settings.of(optimizer, group).l2 != 0.0 for group in optimizer.param_groups)
