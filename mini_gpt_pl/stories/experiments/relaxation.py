"""Training for a few steps from given weights: what every experiment does to the weights that it has disturbed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.optim import AdamW

from mini_gpt_pl.stories.data.batch import Batch
from mini_gpt_pl.stories.data.datamodule import ProbedStories
from mini_gpt_pl.stories.data.probe import Stream, sample_rng
from mini_gpt_pl.stories.evaluation import StoryEvaluation
from mini_gpt_pl.stories.module import ProbedGPT
from mini_gpt_pl.stories.objective import combine
from mini_gpt_pl.stories.stored import autocast
from mini_gpt_pl.training.optimizers import decay_groups


@dataclass(frozen=True)
class Protocol:
    """How weights are trained on: a fresh AdamW at a constant rate, one batch a step, gradients clipped at norm 1.

    Args:
        lr: Learning rate.
        probe_weight: Constant lambda of L_LM + lambda L_probe.
        steps: Optimizer steps.
        eval_every: Steps between evaluations; there is one before the first step and one after the last in any case.
        betas: Of AdamW.
        weight_decay: Decoupled.
        batch_size: Stories a step.
        decay_vectors: Whether LayerNorms are decayed like matrices.
    """

    lr: float
    probe_weight: float
    steps: int
    eval_every: int
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.5
    batch_size: int = 64
    decay_vectors: bool = False


class Answers(NamedTuple):
    """An evaluation on probes at long gaps.

    Attributes:
        step: Optimizer steps since the disturbed weights.
        p_ood: Share of exact answers.
        nll_ood: Nats per probed token.
        lm_ood: Nats per ordinary token around the probes.
    """

    step: int
    p_ood: float
    nll_ood: float
    lm_ood: float


class Laboratory:
    """A model, its data and a device: evaluates the model's weights, and trains them by a protocol.

    The batches of a trial are a function of the data's seed, the trial and the step: whatever the weights are, the
    same trial sees the same batches, so that two starts are compared on the same training.

    Args:
        module: The model; its weights are changed.
        data: Of the run.
        device: Where to train.
        precision: `32`, or `bf16` for autocast of the forward pass.
    """

    def __init__(self, module: ProbedGPT, data: ProbedStories, device: torch.device, precision: str = "32") -> None:
        data.setup("fit")
        self.module = module.to(device)
        self.device = device
        self._data = data
        self._autocast = autocast(device, precision)
        self._evaluation = StoryEvaluation().to(device)
        self._questions = _on(data.val_dataloader()[2], device)
        self._batches: tuple[tuple[int, int], list[Batch]] = ((-1, 0), [])

    @property
    def questions(self) -> int:
        """Number of questions behind each p_ood."""
        return sum(len(batch.tokens) for batch in self._questions)

    def evaluate(self, step: int = 0) -> Answers:
        """Ask the model's present weights all questions at long gaps."""
        self._evaluation.reset()
        self.module.eval()
        with torch.no_grad(), self._autocast():
            for batch in self._questions:
                self._evaluation.update(batch, self.module._scores(batch), "ood")
        found = self._evaluation.compute()
        return Answers(step, found["probe/p_ood"], found["probe/nll_ood"], found["probe/lm_ood"])

    def relax(self, protocol: Protocol, trial: int = 0) -> list[Answers]:
        """Train the present weights by a protocol.

        Args:
            protocol: How.
            trial: Which stream of batches.

        Returns:
            The evaluations, the first before any step and the last after all.
        """
        found = [self.evaluate()]
        groups: Any = self.module.parameters() if protocol.decay_vectors else decay_groups(self.module)
        optimizer = AdamW(groups, lr=protocol.lr, betas=protocol.betas, weight_decay=protocol.weight_decay)
        for step, batch in enumerate(self._training_batches(protocol, trial), 1):
            self.module.train()
            with self._autocast():
                loss = combine(*self.module.batch_terms(batch), protocol.probe_weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % protocol.eval_every == 0 or step == protocol.steps:
                found.append(self.evaluate(step))
        return found

    def _training_batches(self, protocol: Protocol, trial: int) -> Iterator[Batch]:
        """The batches of a trial; those of the last one are kept, as experiments repeat a trial from many weights."""
        if self._batches[0] != (trial, protocol.batch_size):
            self._batches = ((trial, protocol.batch_size), [])
        made = self._batches[1]
        for step in range(protocol.steps):
            if step == len(made):
                rng = sample_rng(self._data.seed, Stream.EXPERIMENTS, trial, step)
                made.append(move_data_to_device(self._data.draw_batch(rng, protocol.batch_size), self.device))
            yield made[step]


def _on(loader: Any, device: torch.device) -> Sequence[Batch]:
    return [move_data_to_device(batch, device) for batch in loader]


def displaced(weights: Tensor, length: Tensor | float, generator: torch.Generator) -> Tensor:
    """Move a matrix by a given length in a direction drawn isotropically.

    Args:
        weights: On any device.
        length: Frobenius norm of the displacement.
        generator: On the host, so that the direction is the same on any device.
    """
    drawn = torch.randn(weights.shape, generator=generator).to(weights.device)
    return weights + drawn * (length / drawn.norm())
