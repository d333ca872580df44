r"""Inner products of a few long vectors with a few others, as matrix products.

K directions and M gradients of D = 25 M values are gigabytes: to be read as seldom as can be, which a matrix product
does, and never to be copied as float64. So float32 vectors are multiplied and summed in float32 over tiles of 4096
coordinates, and the tiles are summed in float64. Roundings inside of a tile are about independent of one another, so
that for a random order of coordinates

    |found - <x, y>| < 1e-6 sum_j |x_j y_j|        (about 1e-7 in practice; float64 vectors: 1e-15)

which the tests hold it to. Relative to a small <x, y> the error is larger by what cancels: 1e-6 ||x|| ||y|| at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.kernels import row_kernels
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection

# Coordinates that are summed in the vectors' own precision.
_TILE = 1 << 12


def inner_products(
    a: Float[Tensor, "M D"], b: Float[Tensor, "K D"], selection: ParameterSelection
) -> Float[Tensor, "G M K"]:
    """Inner products of every row with every other, per group, in float64.

    Rows are flat vectors of the selection, all on one device. Where the ranks share the weights, over all coordinates:
    every rank must call it.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    with _full_precision(a.device):
        return selection.total(torch.stack([_products(a[:, span], b[:, span]) for span in selection.slices]))


def products_at_once(
    rows: Sequence[Float[Tensor, " D"]], new: Float[Tensor, " D"], selection: ParameterSelection
) -> Float[Tensor, "G n"] | None:
    """Inner products of one vector with rows, per group, in float64, by one kernel for all groups; None without a GPU.

    A probe that looks at every step has no time for some kernels a group.
    """
    if row_kernels is None or not row_kernels.takes([*rows, new]):
        return None
    return selection.total(row_kernels.inner_products(rows, new, selection.spans))


def gram_at_once(rows: Sequence[Float[Tensor, " D"]], selection: ParameterSelection) -> Float[Tensor, "G K K"] | None:
    """Inner products of vectors with one another, per group, products and sums in float64; None without a GPU.

    There a product of matrices this narrow and long is left to a single multiprocessor.
    """
    if row_kernels is None or not row_kernels.takes(rows):
        return None
    gram = torch.zeros(len(selection.spans), len(rows), len(rows), dtype=torch.float64, device=rows[0].device)
    for last, row in enumerate(rows):
        gram[:, last, : last + 1] = row_kernels.inner_products(rows[: last + 1], row, selection.spans)
    return selection.total(gram + gram.tril(-1).mT)


def squared_norms(a: Float[Tensor, "M D"], selection: ParameterSelection) -> Float[Tensor, "G M"]:
    """Squared length of every row, per group, in float64; over all coordinates, as `inner_products` is."""
    a = a.to(torch.promote_types(a.dtype, torch.float32))
    return selection.total(torch.stack([_squares(a[:, span]) for span in selection.slices]))


def squared_length(values: Tensor) -> Float[Tensor, ""]:
    """Squared length of a tensor of any shape, in float64, on its device."""
    return torch.linalg.vector_norm(values, dtype=torch.float64).square()


def _products(a: Float[Tensor, "M n"], b: Float[Tensor, "K n"]) -> Float[Tensor, "M K"]:
    whole = a.shape[1] - a.shape[1] % _TILE
    # Views, no copies: a tile is a matrix whose rows lie D values apart.
    tiles = torch.bmm(_tiled(a, whole).transpose(0, 1), _tiled(b, whole).permute(1, 2, 0))  # (tiles, M, K)
    return tiles.sum(0, dtype=torch.float64) + (a[:, whole:] @ b[:, whole:].T).double()


def _squares(a: Float[Tensor, "M n"]) -> Float[Tensor, " M"]:
    whole = a.shape[1] - a.shape[1] % _TILE
    tiles = torch.linalg.vector_norm(_tiled(a, whole), dim=-1).double()  # (M, tiles)
    return tiles.square().sum(-1) + torch.linalg.vector_norm(a[:, whole:], dim=-1).double().square()


def _tiled(a: Float[Tensor, "M n"], whole: int) -> Float[Tensor, "M tiles _"]:
    return a[:, :whole].unflatten(1, (whole // _TILE, _TILE))


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Multiply float32 as float32: whatever training allows its own products (TF32, bfloat16, autocast)."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    # Where nothing has to be changed nothing is: a compiled model looks at these settings before each of its calls.
    before = [(backend, backend.fp32_precision) for backend in backends if _rounds(backend.fp32_precision)]
    try:
        for backend, _ in before:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in before:
            backend.fp32_precision = precision


def _rounds(precision: str) -> bool:
    """Whether a setting allows less than float32; "none" leaves it to the general one."""
    full = ("none", "ieee")
    return precision not in full or (precision == "none" and torch.backends.fp32_precision not in full)  # type: ignore[attr-defined]
