"""The six binary operations modulo p: all pairs, their results, and the split into training and test pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mini_gpt_pl.arithmetic.draws import Purpose, generator
from mini_gpt_pl.errors import UserError

OperationName = Literal["add", "sub", "mul", "x2_y2", "x2_xy_y2", "x3_xy"]


class Examples(NamedTuple):
    """Token sequences and their classes, for several tasks at once a column for each; a batch or a whole set."""

    tokens: Int[Tensor, "B T"]
    labels: Int[Tensor, "B ..."]


@dataclass(frozen=True)
class Operation:
    """A function of two residues; the smallest is 1 where 0 would give the same result with everything."""

    function: Callable[[Tensor, Tensor], Tensor]
    first: int = 0


OPERATIONS: Mapping[OperationName, Operation] = {
    "add": Operation(lambda a, b: a + b),
    "sub": Operation(lambda a, b: a - b),
    "mul": Operation(lambda a, b: a * b, first=1),
    "x2_y2": Operation(lambda a, b: a**2 + b**2),
    "x2_xy_y2": Operation(lambda a, b: a**2 + a * b + b**2),
    "x3_xy": Operation(lambda a, b: a**3 + a * b),
}
"""The operations of arXiv 2602.16746. With its training the last two do not generalise within 200,000 steps."""


def all_pairs(operation: OperationName, modulus: int) -> Examples:
    """Every ordered pair of residues modulo p, a in the outer loop, with the operation's result as its class.

    The two residues are the two tokens; there is no token for the operation. `mul` leaves out 0.

    Raises:
        UserError: The modulus is below 3.
    """
    return pairs_from(operation, modulus, OPERATIONS[operation].first)


def pairs_from(operation: OperationName, modulus: int, first: int) -> Examples:
    """Every ordered pair of residues from `first` on, as in `all_pairs`."""
    if modulus < 3:
        raise UserError(f"--data.modulus={modulus}: give 3 or more")
    residues = torch.arange(first, modulus)
    tokens = torch.cartesian_prod(residues, residues)  # (N, 2)
    return Examples(tokens, OPERATIONS[operation].function(tokens[:, 0], tokens[:, 1]) % modulus)


def split_pairs(
    tokens: Int[Tensor, "N 2"], fraction: float, seed: int, *, mirror_together: bool = False
) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """Divide pairs by chance into training and test pairs.

    Pairs are divided one by one, as in arXiv 2602.16746, so that for a symmetric operation about half of the test
    pairs have their mirror image (b, a) in the training set. With `mirror_together` both are on one side: then a test
    pair of a symmetric operation is one whose result was never shown.

    Args:
        tokens: The pairs.
        fraction: Share of the pairs to train on; floor(fraction N) of them, or one less where mirror images are kept
            together and the border would fall between two.
        seed: Of the shuffle.
        mirror_together: Keep (a, b) and (b, a) on the same side.

    Returns:
        Positions of the training pairs and of the test pairs.

    Raises:
        UserError: One of the two sides would be empty.
    """
    rng = generator(seed, Purpose.SPLIT, 0)
    if mirror_together:
        unordered = np.unique(np.sort(tokens.numpy(), axis=1), axis=0, return_inverse=True)[1].reshape(-1)
        rank = rng.permutation(int(unordered.max()) + 1)  # of each unordered pair in the shuffle
        order = torch.from_numpy(np.argsort(rank[unordered], kind="stable"))
    else:
        order = torch.from_numpy(rng.permutation(len(tokens)))
    border = int(fraction * len(order))
    if mirror_together and 0 < border < len(order):
        before, behind = (sorted(tokens[order[k]].tolist()) for k in (border - 1, border))
        border -= before == behind
    if not 0 < border < len(order):
        raise UserError(f"--data.train_fraction={fraction}: {border} of {len(order)} pairs to train on; change it")
    return order[:border], order[border:]
