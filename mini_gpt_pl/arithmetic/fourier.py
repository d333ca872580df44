r"""Which frequencies a table of residues holds: Fourier power over the residue axis, and what chance puts there.

A network that adds modulo p can do it with few characters r -> exp(2 pi i k r / p): then the rows of its embedding,
taken along the residues r, hold few frequencies k. For a product the characters are those of the multiplicative group,
r = g^n -> exp(2 pi i k n / (p - 1)), with a generator g: the same transform along the discrete logarithm n.

The null is a table with the same singular values whose residues are turned at random (a Haar rotation of the p - 1
dimensions across the constant): shares are then known in mean and variance without any draw. It holds for tables that
are random, and for tables of few columns or of low rank, whose shares scatter more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mini_gpt_pl.arithmetic.encoder import Attention, Block, Encoder
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.directions.subspace_nulls import ShareNull

Axis = Literal["additive", "multiplicative"]
AXES: tuple[Axis, ...] = ("additive", "multiplicative")


@dataclass(frozen=True)
class Spectrum:
    """Shares of the frequencies k = 1, 2, ... in a table of residues, beside their null.

    Args:
        shares: Of ||X - mean row||^2; they sum to 1.
        evenness: Sum of the squared shares of the singular values' squares, 1/r for r equal ones.
        rows: Residues on the axis, m: p, or p - 1 on the multiplicative one.

    Example:
        >>> wave = torch.cos(2 * torch.pi * 5 * torch.arange(97) / 97)[:, None]
        >>> of = spectrum(wave, "additive")
        >>> of.frequency, round(of.largest, 3)
        (5, 1.0)
    """

    shares: Float[Tensor, " F"]
    evenness: float
    rows: int

    @property
    def largest(self) -> float:
        """Share of the frequency that has most."""
        return float(self.shares.max())

    @property
    def frequency(self) -> int:
        """The frequency k that has most."""
        return int(self.shares.argmax()) + 1

    @property
    def effective(self) -> float:
        """Effective number of frequencies, 1 / sum of squared shares: 1 for a single one."""
        return 1.0 / float(self.shares.square().sum())

    @property
    def effective_null(self) -> float:
        """`effective` from the expected sum of squared shares."""
        return 1.0 / sum(null.mean**2 + null.variance for null in self._nulls)

    def largest_null(self, q: float = 0.5) -> float:
        """Quantile q of the largest share by chance.

        Shares are taken as independent, each with the Beta distribution of its mean and variance. The true quantile is
        larger by up to 8 % where few columns dominate (tests/arithmetic/test_fourier.py), and the same where many do.
        """
        first, last = self._nulls[0], self._nulls[-1]
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            below = first.below(middle) ** (len(self._nulls) - 1) * last.below(middle)
            low, high = (middle, high) if below < q else (low, middle)
        return high

    @cached_property
    def _nulls(self) -> list[ShareNull]:
        """Of each frequency: two dimensions of the m across the constant, or one for the last of an even number."""
        m = self.rows - 1

        def null(dimensions: int) -> ShareNull:
            mean = dimensions / m
            one = mean * (1 - mean) / (m / 2 + 1)  # variance of a single random direction's share: a Beta distribution
            # Columns are orthogonal: what one has of a frequency the others lack, with covariance -one / (m - 1).
            return ShareNull(mean, max(one * (self.evenness - (1 - self.evenness) / (m - 1)), 1e-300))

        return [null(2)] * (len(self.shares) - 1) + [null(2 if self.rows % 2 else 1)]


def spectrum(table: Float[Tensor, "p d"], axis: Axis = "additive") -> Spectrum:
    """Fourier power of a table, a row for each residue 0 .. p - 1, along an axis of `residues`.

    Raises:
        UserError: The multiplicative group has no generator, as p is no prime, or the table is constant.
    """
    return read(moments(table, axis).tolist(), len(residues(len(table), axis)))


def moments(table: Float[Tensor, "p d"], axis: Axis) -> Float[Tensor, " F1"]:
    """What a spectrum consists of, on the table's device: the shares, then their evenness. See `spectrum`."""
    order = residues(len(table), axis).to(table.device)
    rows = table.detach().double()[order]
    rows = rows - rows.mean(0)
    power = torch.fft.rfft(rows, dim=0, norm="ortho")[1:].abs().square().sum(1)
    power = torch.cat([2 * power[:-1], power[-1:] * (2 if len(order) % 2 else 1)])  # k and m - k are one frequency
    small = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
    evenness = small.square().sum() / small.trace().square()
    return torch.cat([power / power.sum(), evenness[None]])


def read(numbers: Sequence[float], rows: int) -> Spectrum:
    """Make a spectrum of what `moments` found, on the host.

    Raises:
        UserError: The table was constant, or not finite.
    """
    if not varies(numbers):
        raise UserError("a table that is the same for all residues, or not finite, has no frequencies: leave it out")
    return Spectrum(torch.tensor(numbers[:-1], dtype=torch.float64), numbers[-1], rows)


def varies(numbers: Sequence[float]) -> bool:
    """Whether `moments` is of a table that differs between residues and is finite."""
    return math.isfinite(numbers[-1])


def residues(p: int, axis: Axis) -> Int[Tensor, " m"]:
    """The residues in the order of an axis: 0 .. p - 1, or g^0, g^1, ..., g^(p-2) with the smallest generator g.

    Raises:
        UserError: p is no odd prime, so that the axis does not exist; or it is below 3.

    Example:
        >>> residues(7, "multiplicative").tolist()
        [1, 3, 2, 6, 4, 5]
    """
    if p < 3:
        raise UserError(f"{p} residues have no frequencies: give 3 or more")
    if axis == "additive":
        return torch.arange(p)
    if any(p % k == 0 for k in range(2, p)):
        raise UserError(
            f"the residues modulo {p} have no multiplicative axis, as {p} is no prime: use the additive one"
        )
    for g in range(2, p):
        powers = [1]
        while (nearest := powers[-1] * g % p) != 1:
            powers.append(nearest)
        if len(powers) == p - 1:
            return torch.tensor(powers)
    raise AssertionError("every prime has a generator")


@torch.no_grad()
def tables(encoder: Encoder, tasks: Sequence[str] = ()) -> dict[str, Float[Tensor, "p d"]]:
    """What an encoder knows of the residues, a row each: embedding E, E W_Q', E W_V' W_O' of each block, and the head.

    LayerNorms, positions and biases are left out, so that a product says which frequencies of E its matrices pass on;
    from the second block on E reaches it along the residual stream alone.

    Names are `embedding`, `blocks.0.query`, `blocks.0.value_output`, ..., and `head`, or `head.<task>` for tasks that
    share the head, its rows in their order.

    Raises:
        UserError: Its classes are no residues, so that tokens and classes have no common axis.
    """
    embedding = encoder.embedding.weight.detach()
    p, classes = len(embedding), encoder.head.out_features
    if classes != p * max(1, len(tasks)):
        raise UserError(f"{p} tokens and {classes} classes are not the residues modulo one number: there is no axis")
    by_name = {"embedding": embedding}
    for number, block in enumerate(encoder.blocks):
        assert isinstance(block, Block)
        attention: Attention = block.attn
        by_name[f"blocks.{number}.query"] = embedding @ attention.w_q.weight.T
        by_name[f"blocks.{number}.value_output"] = embedding @ attention.w_v.weight.T @ attention.w_o.weight.T
    heads = encoder.head.weight.detach().split(p)
    labels = [f"head.{task}" for task in tasks] or ["head"]
    return by_name | dict(zip(labels, heads, strict=True))
