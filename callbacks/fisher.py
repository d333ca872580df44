"""Fisher curvature along the backbone, on fixed batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.callbacks.fixed_gradients import FixedGradients, Kind, count_of
from mini_gpt_pl.callbacks.measuring import KnowsItsLoss, Mode, NamesItsLosses, SamplesItsLabels, evaluating
from mini_gpt_pl.callbacks.nests import digest_of, filled, first_length, map_tensors, packed, unpacked
from mini_gpt_pl.callbacks.probe import DeferringProbe, Estimate, Row, state_key
from mini_gpt_pl.callbacks.recorded import RecordedProbe
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.curvature import fisher
from mini_gpt_pl.geometry.directions.axes import BACKBONE, Axes, Axis, RandomDirections, path_coefficients
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.alignment import noise_floor
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection

# Gives a direction's coefficients, per group and then for the whole, from the snapshots so far; None while unknown.
Rule = Callable[[Trajectory], Float[Tensor, "G1 n"] | None]


class FisherProbe(RecordedProbe, DeferringProbe):
    r"""Rayleigh quotients, anisotropy and leading modes of the Fisher, from M gradients on fixed batches.

    The batches are copies of the first M micro-batches that pass, on rank zero, so any module and loader will do and
    no random number is drawn; nothing is measured before they have passed. They travel in the checkpoint. Each due step
    measures the weights as they are before the next step, along directions of the snapshots so far: the backbone,
    PC2, theta_0 and named ones. With several ranks each does all of the same work, so the numbers do not depend on it.

    Logged under `fisher/<group>/<kind>/`, for each group along its own directions and for the whole selection:
    q_backbone, trace, anisotropy (q over the mean across it: 1 where the Fisher is isotropic), lambda_1 and overlap =
    |<u_1, v_b>|; for the whole also q of the other directions, `<name>_se` (standard errors over the gradients, by
    jackknife where it is no mean), lambda_2 .., overlap_z (in units of sqrt(2/(pi D)), what chance gives) and
    mean_share, the share of the mean gradient in the trace.

    Args:
        schedule: When to measure.
        kinds: Which Fishers: `batch_mean`, the second moment of the batches' gradients (the paper's); `per_sample`, the
            empirical Fisher of single samples (by the module's `sample_loss`, else `batch_loss` of a batch of one);
            `monte_carlo`, the true Fisher, by the module's `sampled_loss` with labels drawn from the model.
        batches: M, the number of fixed batches.
        samples_per_batch: Samples taken from each batch by `per_sample`, each a forward and a backward.
        spectrum: Whether to find leading modes, which takes the M x M Gram matrix.
        block: Gradients held at a time, which bounds the memory: (block + 1) D values and those of the directions.
            Directions are read once for each block. With `spectrum` and a block below M, gradients are computed again,
            M (M / block + 1) / 2 of them in all: 80 for M = 32 and a block of 8.
        eigenvalues: Leading eigenvalues logged for the whole selection.
        random_directions: Also estimate the anisotropy's denominator with this many Gaussian directions, as the paper
            did with 10: `anisotropy_sampled`. The exact one is free; this takes a draw of D numbers each, per gradient.
        segments: Named displacements between two snapshots' steps, such as `switch: [1800, 2200]`, measured from the
            later one on.
        seed: Of the drawn labels and the random directions; the draws are the same at every step.
        mode: `eval` measures in evaluation mode; `train` in the modes of training, with dropout and batch statistics,
            whose gradients differ. What a forward draws is then a function of the seed and the gradient's number.

    Attributes:
        sha256: Of the fixed batches and all that they hold; empty until they are complete.

    Raises:
        UserError: A setting is out of range, there is no TrajectoryRecorder, the module lacks the loss of a kind, or a
            batch holds what no checkpoint can keep.

    Example:
        >>> probe = FisherProbe(Schedule(every=500), ["batch_mean", "monte_carlo"], segments={"switch": (600, 900)})
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(every=1000),  # noqa: B008 (frozen)
        kinds: Sequence[Kind] = ("batch_mean",),
        batches: int = 32,
        samples_per_batch: int = 1,
        spectrum: bool = True,
        block: int = 32,
        eigenvalues: int = 5,
        random_directions: int = 0,
        segments: dict[str, tuple[int, int]] | None = None,
        seed: int = 0,
        mode: Mode = "eval",
    ) -> None:
        super().__init__(schedule)
        if batches < 2 or min(samples_per_batch, block, eigenvalues) < 1 or random_directions < 0:
            raise UserError(
                f"FisherProbe: batches {batches} (2 or more), samples_per_batch {samples_per_batch}, block {block}, "
                f"eigenvalues {eigenvalues} (1 or more), random_directions {random_directions} (0 or more)"
            )
        if not kinds or set(kinds) - set(get_args(Kind)):
            raise UserError(f"FisherProbe: kinds {list(kinds)}; choose from {', '.join(get_args(Kind))}")
        self.kinds = tuple(dict.fromkeys(kinds))
        self.batches = batches
        self.samples_per_batch = samples_per_batch
        self.spectrum = spectrum
        self.block = block
        self.eigenvalues = eigenvalues
        self.random_directions = random_directions
        self.segments = dict(segments or {})
        self.seed = seed
        self.mode = mode
        self._rules: dict[str, Rule] = {}
        self._reset()

    @override
    def _reset(self) -> None:
        self._fixed: list[Any] = []
        self._saved: list[Any] = []
        self._complete = False
        self._pending: list[tuple[int, Kind, fisher.Survey]] = []
        self.sha256 = ""

    def add_direction(self, name: str, rule: Rule) -> None:
        """Measure along one more direction, as `q_<name>`, such as a switch that another callback detects."""
        self._rules[name] = rule

    @property
    @override
    def state_key(self) -> str:
        return state_key(self, kinds=list(self.kinds), batches=self.batches)

    @override
    def estimate(self, steps: int, dim: int) -> Estimate:
        counts = [count_of(kind, self.batches, self.samples_per_batch) for kind in self.kinds]
        held = 1 + min(self.block, max(counts))
        # Groups and the whole have a backbone and a second component of their own, and may have a rule's direction.
        directions = 5 + len(self.segments) + 2 * len(self._rules)
        times = sum(self.schedule.due(step) for step in range(steps))
        passes = sum(sum(range(count, 0, -self.block)) if self.spectrum else count for count in counts)
        bytes_held = 4.0 * dim * (held + directions)
        return Estimate(type(self).__name__, bytes=bytes_held, passes=passes * times / max(steps, 1))

    # ------------------------------------------------------------------------------------------------ hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        kind = type(pl_module).__name__
        if set(self.kinds) - {"monte_carlo"} and not isinstance(pl_module, KnowsItsLoss | NamesItsLosses):
            raise UserError(f"FisherProbe: {kind} has no batch_loss(batch), the training loss of one batch: add it")
        if "monte_carlo" in self.kinds and not isinstance(pl_module, SamplesItsLabels):
            raise UserError(
                f"FisherProbe: {kind} has no sampled_loss(batch, generator), which monte_carlo needs: "
                "add it, or leave that kind out"
            )
        for name, ends in self.segments.items():
            for step in ends:
                if step and not self.recorder.schedule.due(step):
                    raise UserError(f"FisherProbe: segment {name} ends at step {step}, where no snapshot is taken")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._saved:
            self._rebuild(batch)
        if not self._complete:
            self._collect(batch)
        self._measure_if_due(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure_if_due(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        fixed = self._saved or [{"nest": packed(batch)} for batch in self._fixed]
        return {**super().state_dict(), "batches": fixed, "complete": self._complete}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved, self._complete = state_dict["batches"], state_dict["complete"]

    # ---------------------------------------------------------------------------------------------- batches

    def _collect(self, batch: Any) -> None:
        size, wanted = first_length(batch), self.samples_per_batch
        if "per_sample" in self.kinds and 0 < size < wanted:
            raise UserError(f"FisherProbe: samples_per_batch {wanted} of a batch of {size}: give {size} or less")
        kept = map_tensors(batch, lambda leaf: leaf.detach().to("cpu", copy=True))
        packed(kept)  # raises where no checkpoint could hold it
        self._fixed.append(kept)
        if len(self._fixed) < self.batches:
            return
        assert self._trainer is not None
        if self._trainer.world_size > 1:
            self._fixed = self._trainer.strategy.broadcast(self._fixed)
        self._pin()
        self._complete, self.sha256 = True, digest_of(self._fixed)
        rank_zero_info(f"FisherProbe: {len(self._fixed)} fixed batches, SHA-256 {self.sha256}")

    def _rebuild(self, like: Any) -> None:
        """Make the batches of a checkpoint again, with the containers of the one that is now passing by."""
        saved, self._saved = self._saved, []
        # Lists of tensors alone were written by 0.1.0.
        self._fixed = [unpacked(s["nest"], like) if isinstance(s, dict) else filled(like, s) for s in saved]
        self._pin()
        if self._complete:
            self.sha256 = digest_of(self._fixed)

    def _pin(self) -> None:
        """Let a GPU fetch the batches by itself: a copy from ordinary memory makes the host wait for it every time."""
        assert self._trainer is not None
        if self._trainer.strategy.root_device.type == "cuda":
            self._fixed = map_tensors(
                self._fixed, lambda leaf: leaf.pin_memory() if leaf.layout == torch.strided else leaf
            )

    # -------------------------------------------------------------------------------------------- measuring

    def _measure_if_due(self, trainer: Trainer, module: LightningModule) -> None:
        steps = self.recorder.steps
        if not self._fixed or not self._complete or not self.due_once(steps.next - 1):
            return
        with self.watch.running():
            axes = self._axes()
            for kind in self.kinds:
                self._pending.append((steps.now, kind, self._survey(trainer, module, kind, axes)))

    def _axes(self) -> Axes:
        trajectory = self.recorder.trajectory
        assert trajectory is not None
        found = path_coefficients(trajectory, self.segments)
        for name, rule in self._rules.items():
            if (coefficients := rule(trajectory)) is not None:
                found[name] = coefficients
        return Axes.along(found, self.recorder.directions, self.recorder.selection)

    def _survey(self, trainer: Trainer, module: LightningModule, kind: Kind, axes: Mapping[str, Axis]) -> fisher.Survey:
        random = None
        if self.random_directions and BACKBONE in axes:
            random = RandomDirections(axes[BACKBONE], self.random_directions, self.seed)
        gradients = FixedGradients(
            trainer, module, self.recorder.selection, self._fixed, kind, self.samples_per_batch, self.seed, self.mode
        )
        with evaluating(module, self.mode):  # once for all gradients
            return fisher.survey(gradients, len(gradients), axes, block=self.block, gram=self.spectrum, random=random)

    # ---------------------------------------------------------------------------------------------- logging

    def _take_rows(self) -> Iterable[Row]:
        pending, self._pending = self._pending, []
        for step, kind, device in pending:
            found = device.cpu()
            if not torch.isfinite(found.squares).all():
                rank_zero_info(f"step {step}: a gradient is not finite, no Fisher is reported")
                continue
            yield step, fisher_metrics(found, self.recorder.selection, self.recorder.name, kind, self.eigenvalues)


def fisher_metrics(
    found: fisher.Survey, selection: ParameterSelection, name: str, kind: str, eigenvalues: int = 5
) -> dict[str, float]:
    """Name what a survey on the host shows, for every group of a selection and for the whole of it.

    Returns:
        Values by `fisher/<group>/<kind>/<quantity>`, as many eigenvalues for the whole as asked for; what is undefined
        is left out.
    """
    dims = (*selection.dims, selection.dim)
    estimates = {"trace": fisher.trace(found)}
    estimates |= {f"q_{axis}": fisher.rayleigh(along) for axis, along in found.projections.items()}
    if (along := found.projections.get(BACKBONE)) is not None:
        estimates["anisotropy"] = fisher.anisotropy(along.square(), found.squares, dims)
    metrics: dict[str, float] = {}
    for column, label in enumerate((*selection.groups, name)):
        prefix, whole = f"fisher/{label}/{kind}/", column == len(dims) - 1
        for quantity, (value, error) in estimates.items():
            if whole or quantity in ("trace", f"q_{BACKBONE}", "anisotropy"):
                metrics[prefix + quantity] = float(value[column])
            if whole:
                metrics[f"{prefix}{quantity}_se"] = float(error[column])
        if found.grams is not None:
            gram = found.grams.sum(0) if whole else found.grams[column]
            shown = _modes(gram, None if along is None else along[:, column], dims[column], eigenvalues if whole else 0)
            metrics |= {prefix + quantity: value for quantity, value in shown.items()}
        if whole and found.random is not None and along is not None:
            metrics[prefix + "anisotropy_sampled"] = float(fisher.sampled_anisotropy(along, found.random)[column])
    return {key: value for key, value in metrics.items() if value == value}


def _modes(
    gram: Float[Tensor, "M M"], along: Float[Tensor, " M"] | None, dim: int, eigenvalues: int
) -> dict[str, float]:
    """Leading modes; with `eigenvalues` those of the whole selection, with errors."""
    part = fisher.spectrum(gram)
    shown = {"lambda_1": float(part.eigenvalues[0])}
    if along is not None:
        shown["overlap"] = float(part.overlaps(along)[0])
    if not eigenvalues:
        return shown
    shown |= {f"lambda_{k}": value for k, value in enumerate(part.eigenvalues[:eigenvalues].tolist(), 1)}
    first = fisher.leading(gram, torch.zeros(len(gram), dtype=gram.dtype) if along is None else along)
    shown |= {"lambda_1_se": first.value_error, "mean_share": fisher.mean_gradient_share(gram)}
    if along is not None:
        shown |= {"overlap_se": first.overlap_error, "overlap_z": first.overlap / noise_floor(dim)}
    return shown
