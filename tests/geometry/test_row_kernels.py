"""The kernels over many rows against plain float64 sums; they need a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import flat_selection, normal
from torch import Tensor

from mini_gpt_pl.geometry.path import rows as rows_module
from mini_gpt_pl.geometry.path.rows import IncrementRows, inner_products
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.vectors.alignment import _grams_in_chunks
from mini_gpt_pl.geometry.vectors.products import gram_at_once
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.geometry.vectors.staging import Staging, moment

kernels = pytest.importorskip("mini_gpt_pl.geometry.kernels.rows", reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [torch.float32, torch.bfloat16]
# Groups that begin and end inside a block, one without values, and one of several blocks.
EDGES = (0, 5000, 5003, 5003, 20011)
SPANS = list(itertools.pairwise(EDGES))


def some_rows(dtype: torch.dtype, count: int = 6, device: str = "cuda") -> list[Tensor]:
    """theta_0 in float32 and increments a hundredth of it."""
    values = normal(count, EDGES[-1]).float()
    values[1:] *= 1e-2
    return [row.to(dtype if k else torch.float32).to(device) for k, row in enumerate(values)]


def test_every_column_of_a_group_is_in_one_block() -> None:
    numbers, lows, highs, groups, edges = kernels._blocks(tuple(SPANS), torch.device("cpu"), 4096)
    assert edges[0] == 0 and edges[-1] == len(numbers) == len(groups)
    for group, (lo, hi) in enumerate(SPANS):
        own = slice(edges[group], edges[group + 1])
        assert set(groups[own].tolist()) <= {group} and set(lows[own].tolist()) <= {lo}
        assert set(highs[own].tolist()) <= {hi}
        columns = [c for n in numbers[own].tolist() for c in range(4096 * n, 4096 * (n + 1)) if lo <= c < hi]
        assert columns == list(range(lo, hi))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_float64(dtype: torch.dtype) -> None:
    rows = some_rows(dtype)
    found = kernels.inner_products(rows, rows[-1], SPANS)
    exact = torch.stack(
        [torch.stack([(r.double() * rows[-1].double())[lo:hi].sum() for r in rows]) for lo, hi in SPANS]
    )
    lengths = torch.stack([row.double().norm() for row in rows])
    assert float(((found - exact).abs() / (lengths * lengths[-1])).max()) < 1e-14
    torch.testing.assert_close(found, inner_products(rows, rows[-1], SPANS), rtol=1e-9, atol=1e-12)


@needs_gpu
def test_a_gram_at_once_is_that_of_float64() -> None:
    shapes = tuple((hi - lo,) for lo, hi in SPANS if hi > lo)
    selection = ParameterSelection(("a", "b", "c"), shapes, ("x", "y", "y"))
    rows = some_rows(torch.float32)
    found = gram_at_once(rows, selection)
    assert found is not None
    exact = _grams_in_chunks([row.cpu() for row in rows], selection)
    torch.testing.assert_close(found.cpu(), exact, rtol=1e-12, atol=1e-12)


@needs_gpu
@pytest.mark.parametrize("directions", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_rows_are_those_of_float64(dtype: torch.dtype, directions: int) -> None:
    rows, weights = some_rows(dtype), normal(directions, len(SPANS), 6, seed=1)
    found = kernels.combine(rows, weights, SPANS)
    basis = torch.stack([row.double().cpu() for row in rows])
    exact = torch.cat([weights[:, g] @ basis[:, lo:hi] for g, (lo, hi) in enumerate(SPANS)], 1)
    torch.testing.assert_close(found.double().cpu(), exact, rtol=1e-5, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rows_of_a_run_use_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = flat_selection(EDGES[-1])
    found = []
    for here in (kernels, None):
        monkeypatch.setattr(rows_module, "kernels", here)
        basis = IncrementRows(selection, dtype)
        for row in some_rows(dtype):
            basis.push(Vector(row, selection))
        new = Vector(some_rows(dtype, 7)[-1], selection)
        found.append((basis.dots(new), basis.combine(normal(1, 6, seed=1)).values))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


@needs_gpu
def test_rows_out_of_the_kernels_reach_are_multiplied_all_the_same() -> None:
    rows = [row.double() for row in some_rows(torch.float32)]
    assert not kernels.takes(rows) and not kernels.takes(some_rows(torch.float32, device="cpu"))
    assert not kernels.takes([row[1:] for row in some_rows(torch.float32)])  # not aligned
    selection = ParameterSelection(("w",), ((EDGES[-1],),), ("all",))
    basis = IncrementRows(selection, torch.float64)
    basis.push(Vector(rows[0], selection))
    assert basis.dots(Vector(rows[1], selection)).shape == (1, 2)


@needs_gpu
def test_a_copy_to_the_host_waits_for_what_it_copies() -> None:
    """The values are made by work that the device has not begun when the copy is asked for."""
    staging = Staging()
    for k in range(3):
        busy = torch.randn(2048, 2048, device="cuda")
        for _ in range(50):
            busy = busy @ busy / 100
        values = torch.full((1 << 20,), float(k), device="cuda")
        found = staging.fetch(values, moment(values))
        assert found.is_pinned() and not found.is_cuda and bool((found == k).all())


@needs_gpu
def test_snapshots_of_a_device_round_trip(tmp_path: object) -> None:
    selection = flat_selection(EDGES[-1])
    folder = SnapshotFolder(tmp_path, selection)  # type: ignore[arg-type]
    rows = some_rows(torch.bfloat16)
    for step, row in enumerate(rows):
        folder.write(step, Vector(row, selection))
    folder.close()
    for step, row in enumerate(rows):
        assert torch.equal(folder.read(step).values, row.cpu())
