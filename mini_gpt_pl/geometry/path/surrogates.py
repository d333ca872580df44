"""What chance, and weight decay, would have put in a measurement's place: stand-ins of the measured lengths.

Where `nulls` has a closed form, it is better: these are for quantities that nobody has derived one for. A generator is
the one source of randomness, on the vectors' device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.selection import Vector


def isotropic(vector: Vector, generator: torch.Generator) -> Vector:
    """Draw a Gaussian vector with the given vector's length in every group."""
    drawn = _gaussian(vector, generator)
    return _scaled(drawn, vector.dots(vector), drawn.dots(drawn))


def decaying_step(update: Vector, weights: Vector, rate: float | Sequence[float], generator: torch.Generator) -> Vector:
    """Draw the step of a decaying walk, -rate theta + e, with the measured step's length in every group.

    The innovation e is orthogonal to theta; a group in which decay alone is longer than the measured step gets none.

    Args:
        update: The measured step.
        weights: theta before it.
        rate: Share of the weights that decay takes in this step, such as lr x weight decay; one for each weight of the
            selection where they differ. NaN, where it is not known, makes the step NaN.
        generator: Draws e.
    """
    drawn = _gaussian(update, generator)
    size = weights.dots(weights)
    drawn = drawn - _each(weights, torch.where(size > 0, drawn.dots(weights) / size, 0.0))
    if isinstance(rate, float):
        decay, square = Vector(rate * weights.values, weights.selection), rate**2 * size
    else:
        sizes = torch.tensor(weights.selection.sizes, device=weights.values.device)
        rates = torch.tensor(rate, dtype=weights.values.dtype, device=weights.values.device)
        decay = Vector(rates.repeat_interleave(sizes) * weights.values, weights.selection)
        square = decay.dots(decay)
    left = (update.dots(update) - square).clamp_min(0.0)
    return _scaled(drawn, left, drawn.dots(drawn)) - decay


def decaying_walk(trajectory: Trajectory) -> Trajectory:
    """Put the decaying walk of `nulls.decaying_walk` in the place of each group's path."""
    return replace(trajectory, grams=torch.stack([trajectory.decaying_walk(group) for group in trajectory.groups]))


def _gaussian(like: Vector, generator: torch.Generator) -> Vector:
    values = torch.randn(like.values.shape, generator=generator, device=like.values.device)
    return Vector(values, like.selection)


def _scaled(drawn: Vector, target: Float[Tensor, " G"], squares: Float[Tensor, " G"]) -> Vector:
    """Give each group the target squared length."""
    return _each(drawn, torch.where(squares > 0, target / squares, 0.0).sqrt())


def _each(vector: Vector, factors: Float[Tensor, " G"]) -> Vector:
    """Multiply each group by its own factor."""
    parts = [vector.values[part] * factor for part, factor in zip(vector.selection.slices, factors, strict=True)]
    return Vector(torch.cat([part.to(vector.values.dtype) for part in parts]), vector.selection)
