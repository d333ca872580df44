"""Gradients of fixed batches at one checkpoint, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.curvature import fisher
from mini_gpt_pl.geometry.directions.axes import BACKBONE, Axis
from mini_gpt_pl.geometry.vectors.alignment import with_total
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.stories.data.batch import Batch
from mini_gpt_pl.stories.module import ProbedGPT
from mini_gpt_pl.stories.objective import combine

# The combined loss L_LM + lambda L_probe, and its parts.
LOSSES = ("combined", "lm", "probe")

# Per label: the scalars of one batch that `summarise` needs.
_Row = Float[Tensor, "7 G1"]


@dataclass(eq=False)
class BatchGradients:
    """Serves the combined gradient of each fixed batch, and keeps scalars of the first few and of their parts.

    The model is in eval mode, nothing is clipped. A batch is passed forward once; the gradients of the two parts of
    its loss take a backward each, for the first batches and the first time only.

    Args:
        module: At the weights of a checkpoint.
        selection: By which weights.
        batches: On the module's device.
        weight: lambda of the combined loss.
        backbone: v_b, each group's own and the whole's.
        autocast: Makes the context of the forward pass.
        parts: Number of batches whose parts are measured.
    """

    module: ProbedGPT
    selection: ParameterSelection
    batches: Sequence[Batch]
    weight: float
    backbone: Axis
    autocast: Callable[[], AbstractContextManager[Any]]
    parts: int

    def __post_init__(self) -> None:
        self._weights = self.selection.parameters(self.module)
        self._rows: dict[int, _Row] = {}

    def __call__(self, index: int) -> Vector:
        """Gradient of the combined loss of one batch."""
        with self.autocast():
            terms, counts = self.module.batch_terms(self.batches[index])
            loss = combine(terms, counts, self.weight)
        measure = index < self.parts and index not in self._rows
        combined = self._gradient(loss, keep=measure)
        if measure:
            lm = self._gradient(terms.lm, keep=True)
            gradients = (combined, lm, self._gradient(terms.probe))
            along = [self.backbone.project(gradient) for gradient in gradients]
            squares = [with_total(gradient.dots(gradient)) for gradient in gradients]
            self._rows[index] = torch.stack([*along, *squares, with_total(lm.dots(gradients[2]))])
        return combined

    def _gradient(self, loss: Tensor, *, keep: bool = False) -> Vector:
        return self.selection.flatten(torch.autograd.grad(loss, self._weights, retain_graph=keep))

    def scalars(self) -> Float[Tensor, "B 7 G1"]:
        """Of the first batches, in order, on the host: <g, v_b> and ||g||^2 of each loss, then <g_LM, g_probe>.

        Batches that nobody has asked for are measured now.
        """
        for index in range(self.parts):
            if index not in self._rows:
                self(index)
        return torch.stack([self._rows[index] for index in range(self.parts)]).cpu()


def summarise(scalars: Float[Tensor, "B 7 G1"], labels: Sequence[str]) -> dict[str, Any]:
    """Means and standard deviations over batches.

    A batch without a probe has no probe gradient, so that nothing of it counts where one is needed.

    Args:
        scalars: From `BatchGradients.scalars`.
        labels: Names of the columns.

    Returns:
        `gradient`: |cos| and signed cos with v_b and ||g||, by loss and label; `bias`: b = <g, v_b> of the combined
        gradient; `interference`: cos(g_LM, g_probe); each `[mean, std]` over batches (ddof 1).
    """
    along, squares, crossed = scalars[:, :3], scalars[:, 3:6], scalars[:, 6]
    norms = squares.sqrt()
    cosines = torch.where(norms > 0, along / norms, torch.nan)  # (B, 3, G1)
    shown = torch.where(norms > 0, norms, torch.nan)
    values = {"abs_cos": cosines.abs(), "cos": cosines, "norm": shown}
    gradient = {
        loss: {
            label: {name: _spread(value[:, i, g]) for name, value in values.items()} for g, label in enumerate(labels)
        }
        for i, loss in enumerate(LOSSES)
    }
    scale = norms[:, 1] * norms[:, 2]
    interference = torch.where(scale > 0, crossed / scale, torch.nan)
    return {
        "gradient": gradient,
        "bias": {label: _spread(along[:, 0, g]) for g, label in enumerate(labels)},
        "interference": {label: _spread(interference[:, g]) for g, label in enumerate(labels)},
    }


def _spread(values: Float[Tensor, " B"]) -> list[float]:
    """Mean and standard deviation of what is not NaN; NaN where there is nothing, or no two of it."""
    numbers = values[~values.isnan()]
    mean = float(numbers.mean()) if len(numbers) else float("nan")
    return [mean, float(numbers.std()) if len(numbers) > 1 else float("nan")]


def curvature(survey: fisher.Survey, labels: Sequence[str], dims: Sequence[int], eigenvalues: int) -> dict[str, Any]:
    """What the Fisher shows of each label, with standard errors over the gradients.

    Args:
        survey: Of the combined gradients, with Grams, on the host.
        labels: Of the columns.
        dims: D of each.
        eigenvalues: How many to list.

    Returns:
        By label: `q` along each axis, `trace`, `anisotropy` of the backbone as [value, error]; `random`, the exact mean
        of q across v_b, (tr F - q) / (D - 1); lambda_1 and overlap = |<u_1, v_b>| with their jackknife errors.
    """
    along = survey.projections[BACKBONE]
    quotients = {name: fisher.rayleigh(projections) for name, projections in survey.projections.items()}
    trace, ratio = fisher.trace(survey), fisher.anisotropy(along.square(), survey.squares, dims)
    assert survey.grams is not None
    grams = [*survey.grams, survey.grams.sum(0)]
    shown: dict[str, Any] = {}
    for g, label in enumerate(labels):
        across = float(trace.value[g] - quotients[BACKBONE].value[g])
        first = fisher.leading(grams[g], along[:, g])
        shown[label] = {
            "q": {name: _pair(quotient, g) for name, quotient in quotients.items()},
            "trace": _pair(trace, g),
            "random": across / (dims[g] - 1) if dims[g] > 1 else float("nan"),
            "anisotropy": _pair(ratio, g),
            "lambda_1": first.value,
            "lambda_1_se": first.value_error,
            "overlap": first.overlap,
            "overlap_se": first.overlap_error,
            "eigenvalues": fisher.spectrum(grams[g]).eigenvalues[:eigenvalues].tolist(),
        }
    return shown


def _pair(estimate: fisher.Estimated, column: int) -> list[float]:
    return [float(estimate.value[column]), float(estimate.error[column])]
