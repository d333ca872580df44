"""The Trainer of stories, which restarts a late checkpoint and continues a prompt."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from typing_extensions import override

from mini_gpt_pl.callbacks.trajectory import TrajectoryRecorder
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.directions.frozen import FrozenBasis
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection
from mini_gpt_pl.runs.checkpoints import read_checkpoint
from mini_gpt_pl.runs.folder import METRICS, Run
from mini_gpt_pl.stories.data.datamodule import ProbedStories
from mini_gpt_pl.stories.module import ProbedGPT, check_identity
from mini_gpt_pl.stories.reheat_probe import ReheatProbe
from mini_gpt_pl.stories.reheating import DataOrder, Moments, Reheating, is_reheated
from mini_gpt_pl.stories.switches import P_OOD


class StoryTrainer(Trainer):
    """Lightning's Trainer with two more things to do: restart a late checkpoint, and continue a prompt."""

    def reheat(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str = "",
        steps: int = 2000,
        lr: float | None = None,
        factor: float | None = None,
        warmup: int = 200,
        floor: float = 0.1,
        probe_weight: float | None = 4.0,
        eval_every: int = 100,
        moments: Moments = "zeroed",
        data_order: DataOrder = "restart",
        threshold: float = 0.6,
        basis: str | None = None,
        resume: str | None = None,
    ) -> dict[str, float]:
        """Restart a checkpoint, with a new learning-rate schedule or with the parent's times a factor.

        The probe's accuracy is measured before the first step, so that the gain is against the checkpoint itself.

        Args:
            model: The module whose weights are replaced.
            datamodule: Its data.
            ckpt_path: The checkpoint to restart.
            steps: Optimizer steps to take.
            lr: Peak learning rate of a new schedule; that of the configured optimizer for None.
            factor: Go on with the parent's schedule, times this, instead of a new one.
            warmup: Steps of linear warm-up of a new schedule.
            floor: Smallest factor of a new schedule, a clipped cosine.
            probe_weight: Weight lambda of the probe loss, constant; None goes on with the parent's.
            eval_every: Optimizer steps between evaluations.
            moments: Whether the optimizer starts without memory or keeps the checkpoint's.
            data_order: Whether the data start anew or go on where the checkpoint stood.
            threshold: Accuracy whose first reaching is reported.
            basis: Run folder whose backbone the displacement is split by; that of the checkpoint for None.
            resume: A checkpoint of this reheated run, to go on from.

        Returns:
            p0, peak, peak_step, gain, final and more; with a basis, a and ||r|| in it before and after.

        Raises:
            UserError: A setting is out of range, or the checkpoint or the basis cannot be read or is of another model.
        """
        assert isinstance(model, ProbedGPT)
        settings = Reheating(steps, lr, factor, warmup, floor, probe_weight, eval_every, moments, data_order, threshold)
        checkpoint = read_checkpoint(ckpt_path)
        check_identity(checkpoint, model)
        model.load_state_dict(checkpoint["state_dict"])
        parent, offset = Run.of_checkpoint(ckpt_path), int(checkpoint["global_step"])
        if parent is not None and is_reheated(parent) and (factor is not None or probe_weight is None):
            what, option = ("schedule", "--lr") if factor is not None else ("probe weight", "--probe_weight")
            raise UserError(
                f"reheat: the parent is itself a reheated run, whose {what} is not configured: give {option}"
            )
        frozen = self._frozen_basis(model, ckpt_path, basis, offset)
        start = None if frozen is None else frozen.theta0.selection.weights(model)
        p0 = float("nan") if resume else self._probe_accuracy(model, datamodule)
        model.schedule = settings.schedule(model.schedule, offset)
        model.probe_weight = settings.weight(model.probe_weight, offset)
        model.peak_lr = lr
        if isinstance(datamodule, ProbedStories):
            datamodule.start = settings.data_position(checkpoint)
        lineage = _lineage(settings, ckpt_path, offset, frozen, Path(self.default_root_dir))
        best = float("nan") if parent is None else _best_until(parent, offset)
        probe = ReheatProbe(
            p0, frozen, start, settings.optimizer_state(checkpoint), lineage, parent_best=best, threshold=threshold
        )
        # Before ModelCheckpoint, which Lightning keeps last.
        self.callbacks.insert(0, probe)  # type: ignore[attr-defined]
        self.fit_loop.epoch_loop.max_steps = steps
        self.fit_loop.max_epochs = -1
        self.val_check_interval = eval_every * self.accumulate_grad_batches
        self.check_val_every_n_epoch = None
        self.fit(model, datamodule=datamodule, ckpt_path=resume)
        return probe.summary

    def _frozen_basis(self, model: ProbedGPT, ckpt_path: str, basis: str | None, step: int) -> FrozenBasis | None:
        run = Run(Path(basis)) if basis else Run.of_checkpoint(ckpt_path)
        pattern = next((c.pattern for c in self.callbacks if isinstance(c, TrajectoryRecorder)), None)  # type: ignore[attr-defined]
        if run is None or pattern is None:
            rank_zero_warn("no parent run or no recorder: the displacement is not split along the parent's backbone")
            return None
        selection = ParameterSelection.of(model, pattern)
        last = step if basis is None else run.trajectory.steps[-1]
        if len(run.trajectory.until(last)) < 2:
            rank_zero_warn(f"{run.path} has no path before step {last}: the displacement is not split")
            return None
        return FrozenBasis.read(run.snapshot_folder, run.trajectory, selection, last)

    def _probe_accuracy(self, model: ProbedGPT, datamodule: LightningDataModule | None) -> float:
        loggers, self.loggers = self.loggers, []
        try:
            self.validate(model, datamodule=datamodule, verbose=False)
        finally:
            self.loggers = loggers
        return float(self.callback_metrics[P_OOD])

    @override
    def predict(  # type: ignore[override]
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        prompt: str = "Once upon a time",
        max_new_tokens: int = 150,
        temperature: float = 0.8,
        top_k: int | None = 50,
        seed: int = 0,
    ) -> str:
        """Continue a prompt with a trained model.

        Args:
            model: The module.
            datamodule: Its data, for the tokenizer.
            ckpt_path: The checkpoint to read.
            prompt: How the text begins.
            max_new_tokens: Tokens to add.
            temperature: Divides the logits; 0 takes the most likely token.
            top_k: Sample among the k most likely tokens only.
            seed: Of the sampling.

        Raises:
            UserError: The prompt is empty.
        """
        assert isinstance(datamodule, ProbedStories)
        tokens = datamodule.encoding.encode_ordinary(prompt)
        if not tokens:
            raise UserError("the prompt is empty: give --prompt at least one word")
        request = {"tokens": torch.tensor([tokens]), "max_new_tokens": max_new_tokens, "seed": seed}
        request |= {"temperature": temperature, "top_k": top_k}
        loader: DataLoader[Any] = DataLoader([request], batch_size=None)  # type: ignore[arg-type]
        outputs: Any = super().predict(model, loader, ckpt_path=ckpt_path)
        new = outputs[0][0].tolist()
        if datamodule.eos_id in new:
            new = new[: new.index(datamodule.eos_id)]
        return datamodule.encoding.decode(new)


def _best_until(run: Run, step: int) -> float:
    """The largest p_ood up to a step; NaN if it was never logged."""
    return float(run.series(P_OOD).loc[:step].max()) if (run.path / METRICS).is_file() else float("nan")


def _lineage(settings: Reheating, ckpt_path: str, step: int, basis: FrozenBasis | None, folder: Path) -> dict[str, Any]:
    """Say where a reheated run comes from and what it was started with."""
    run = Run.of_checkpoint(ckpt_path)
    # Relative to the reheated run, so that both can move together.
    parent = os.path.relpath((run.path if run else Path(ckpt_path)).resolve(), folder.resolve())
    lineage: dict[str, Any] = {"parent": parent, "parent_step": step, **asdict(settings)}
    if basis is not None:
        lineage |= {"basis_step": basis.step, "basis_fingerprint": basis.theta0.selection.fingerprint}
    return lineage
