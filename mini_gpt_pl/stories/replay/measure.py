"""Measure stored checkpoints of a run, one after the other, against the directions of the whole run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

import torch
from lightning.fabric.utilities import move_data_to_device

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.curvature import fisher
from mini_gpt_pl.geometry.directions.axes import BACKBONE
from mini_gpt_pl.geometry.vectors.alignment import noise_floor
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.data.batch import Batch
from mini_gpt_pl.stories.evaluation import EVALUATIONS
from mini_gpt_pl.stories.replay.gradients import BatchGradients, curvature, summarise
from mini_gpt_pl.stories.replay.lens import lens_accuracy
from mini_gpt_pl.stories.replay.records import Record
from mini_gpt_pl.stories.stored import CPU, StoredRun, autocast, fixed_batches, sha256
from mini_gpt_pl.stories.switches import switch_of

# Leading eigenvalues of the Fisher that are listed.
_EIGENVALUES = 20


@dataclass(frozen=True)
class Settings:
    """How a replay measures.

    Args:
        batches: Fixed batches for gradient alignment, bias and interference.
        fisher_batches: Fixed batches for the Fisher, the same first ones.
        precision: `32`, or `bf16` for autocast of the forward pass.
        lens: At which replayed checkpoints the logit lens looks: the peaks and troughs of p_ood and the last stored
            one (`events`), `all` or `none`.
        block: Combined gradients held at a time for the Gram of the Fisher, each D float32 values; all of them for 0.
            With fewer, gradients are computed several times.

    Raises:
        UserError: A number is too small.
    """

    batches: int = 16
    fisher_batches: int = 32
    precision: Literal["32", "bf16"] = "32"
    lens: Literal["all", "events", "none"] = "events"
    block: int = 0

    def __post_init__(self) -> None:
        if min(self.batches, self.fisher_batches) < 2 or self.block < 0:
            raise UserError(
                f"replay: --batches {self.batches}, --fisher_batches {self.fisher_batches} (2 or more, for an error "
                f"bar), --block {self.block} (0 or more)"
            )


class Replay(StoredRun):
    """A stored run that can be measured at its checkpoints; what they share is made once, when it is first needed.

    Example:
        >>> replay = Replay(Run(Path("runs/mine")))  # doctest: +SKIP
        >>> replay.measure(500)["gradient"]["combined"]["trunk"]["abs_cos"]  # doctest: +SKIP
    """

    def __init__(
        self,
        run: Run,
        settings: Settings = Settings(),
        device: torch.device = CPU,
        overrides: Sequence[str] = (),
    ) -> None:
        super().__init__(run, device, overrides)
        self.settings = settings

    @cached_property
    def batches(self) -> list[Batch]:
        """The fixed batches, on the host."""
        return fixed_batches(self.data, max(self.settings.batches, self.settings.fisher_batches))

    @cached_property
    def _on_device(self) -> list[Batch]:
        moved: list[Batch] = move_data_to_device(self.batches, self.device)
        return moved

    @cached_property
    def sha256(self) -> str:
        """Of the fixed batches."""
        return sha256(self.batches)

    @cached_property
    def described(self) -> Record:
        """Everything besides the checkpoint and the batches that the numbers depend on."""
        trajectory, switch = self.run.trajectory, switch_of(self.run)
        settings = asdict(self.settings)
        del settings["block"]  # how it is computed, not what
        return settings | {
            "batch_size": self.data.batch_size,
            "snapshots": len(trajectory),
            "last_snapshot": trajectory.steps[-1],
            "switch": None if switch is None else list(switch),
            "fingerprint": trajectory.fingerprint,
            # A run that went on, or was repeated, has other directions.
            "grams": hashlib.sha256(trajectory.grams.contiguous().numpy().tobytes()).hexdigest(),
        }

    def prepare(self) -> None:
        """Read all that every checkpoint needs, so that what is missing is told before anything is measured.

        Raises:
            UserError: Snapshots or data are missing or of something else.
        """
        self.axes  # noqa: B018
        self.batches  # noqa: B018
        if self.settings.lens != "none":
            self.data.setup("validate")

    def measure(self, step: int) -> Record:
        """Measure one stored checkpoint; its combined loss has lambda(step), as the published analysis has it.

        Returns:
            The record, as it is written; numbers may be NaN.

        Raises:
            UserError: The checkpoint cannot be read or is of another model, or the data is gone.
        """
        module, weight, settings = self.load(step), self.probe_weight(step), self.settings
        gradients = BatchGradients(
            module,
            self.selection,
            self._on_device,
            weight,
            self.axes[BACKBONE],
            autocast(self.device, self.settings.precision),
            settings.batches,
        )
        number = settings.fisher_batches
        survey = fisher.survey(gradients, number, self.axes, block=settings.block or number, gram=True).cpu()
        # Weights that have diverged have no curvature to speak of.
        finite = bool(torch.isfinite(survey.squares).all())
        record: Record = {
            "step": step,
            "probe_weight": weight,
            "settings": self.described,
            "sha256": self.sha256,
            "device": self.device.type,
            "event": self.events.get(step),
            "noise_floor": {label: noise_floor(dim) for label, dim in zip(self.labels, self.dims, strict=True)},
            **summarise(gradients.scalars(), self.labels),
            "fisher": curvature(survey, self.labels, self.dims, _EIGENVALUES) if finite else {},
        }
        if settings.lens == "all" or (settings.lens == "events" and step in {*self.events, max(self.files)}):
            self.data.setup("validate")
            loaders = dict(zip(EVALUATIONS, self.data.val_dataloader(), strict=True))
            record["logit_lens"] = {
                name: lens_accuracy(module.gpt, loaders[name], autocast(self.device, self.settings.precision))
                for name in ("in", "ood")
            }
        return record
