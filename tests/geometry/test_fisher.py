"""Fisher quantities against dense matrices, another library, and brute force on copied batches and gradients."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, bent_path, normal, one_line_error, record
from helpers import (
    LABELS,
    WEIGHT,
    Array,
    Spy,
    cache_dir,
    checkpoints,
    drifts,
    flat,
    metrics,
    part_losses,
    quiet_trainer,
    read_path,
    recorder,
    same,
    tiny_gpt,
    tiny_stories,
)
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from mini_gpt_pl.callbacks import FisherProbe, Schedule, StreamingFisher, TrajectoryRecorder
from mini_gpt_pl.callbacks.measuring import training_loss
from mini_gpt_pl.callbacks.nests import take_sample
from mini_gpt_pl.geometry.curvature import fisher
from mini_gpt_pl.geometry.directions.axes import Axes, Axis, RandomDirections, path_coefficients
from mini_gpt_pl.geometry.vectors.products import inner_products, squared_norms
from mini_gpt_pl.geometry.vectors.selection import FingerprintError, ParameterSelection, Vector
from mini_gpt_pl.runs.logs import MetricsCSV
from mini_gpt_pl.stories.data.datamodule import Batch
from mini_gpt_pl.stories.gpt import GPTSize

M = 7


def _spans(selection: ParameterSelection) -> list[slice]:
    """Where each group lies, then the whole."""
    return [*selection.slices, slice(0, selection.dim)]


def _axis(own: Tensor, whole: Tensor, selection: ParameterSelection = SMALL) -> Axis:
    return Axis.of(Vector(own, selection), Vector(whole, selection))


def _unit(own: Tensor, whole: Tensor, column: int, selection: ParameterSelection = SMALL) -> Tensor:
    """The direction that column `column` belongs to, by itself."""
    v = whole if column == len(selection.groups) else own[selection.slices[column]]
    return v / v.norm()


def _survey(matrix: Tensor, axes: Mapping[str, Axis], **options: Any) -> fisher.Survey:
    return fisher.survey(fisher.gradient_of_rows(matrix, SMALL), len(matrix), axes, **options)


G, OWN, WHOLE = normal(M, SMALL.dim, seed=1) + normal(SMALL.dim, seed=2), 3 * normal(15, seed=3), normal(15, seed=4)
DIMS = (*SMALL.dims, SMALL.dim)


# --------------------------------------------------------------------------------------------------- dense twins


@pytest.mark.parametrize("column", range(3))
def test_quotients_trace_and_anisotropy_equal_the_dense_ones(column: int) -> None:
    found = _survey(G, {"v": _axis(OWN, WHOLE)})
    part = G[:, _spans(SMALL)[column]]
    dense = part.T @ part / M
    v = _unit(OWN, WHOLE, column)
    q = v @ dense @ v
    # An orthonormal basis of everything across v: the mean over the sphere is the mean over any of them.
    basis = torch.linalg.qr(torch.cat([v[:, None], torch.eye(len(v), dtype=torch.float64)], 1)).Q[:, 1:]
    across = torch.stack([w @ dense @ w for w in basis.T]).mean()
    along = found.projections["v"]
    torch.testing.assert_close(fisher.rayleigh(along).value[column], q, rtol=1e-12, atol=0)
    torch.testing.assert_close(fisher.trace(found).value[column], dense.trace(), rtol=1e-12, atol=0)
    ratio = fisher.anisotropy(along.square(), found.squares, DIMS).value[column]
    torch.testing.assert_close(ratio, q / across, rtol=1e-11, atol=0)


def test_an_isotropic_fisher_has_anisotropy_one() -> None:
    """Gradients along every axis alike: F = I / D whatever the direction."""
    found = _survey(torch.eye(15, dtype=torch.float64), {"v": _axis(OWN, WHOLE)})
    ratio = fisher.anisotropy(found.projections["v"].square(), found.squares, DIMS)
    torch.testing.assert_close(ratio.value, torch.ones(3, dtype=torch.float64))


def test_anisotropy_is_undefined_where_nothing_is_across() -> None:
    """One dimension, or gradients along v alone."""
    squares = torch.ones(3, 2, dtype=torch.float64)
    for dims in ((1, 1), (5, 9)):
        assert fisher.anisotropy(squares, squares, dims).value.isnan().all()


def _jackknifed(statistic: Callable[[Tensor], float]) -> float:
    """Textbook jackknife by leaving out rows of G."""
    values = np.array([statistic(torch.cat([G[:i], G[i + 1 :]])) for i in range(M)])
    return float(np.sqrt((M - 1) / M * ((values - values.mean()) ** 2).sum()))


@pytest.mark.parametrize("column", range(3))
def test_standard_errors(column: int) -> None:
    axes = {"v": _axis(OWN, WHOLE)}
    found = _survey(G, axes)
    span, v = _spans(SMALL)[column], _unit(OWN, WHOLE, column)
    squared = (G[:, span] @ v).square().numpy()
    error = fisher.rayleigh(found.projections["v"]).error[column]
    assert float(error) == pytest.approx(squared.std(ddof=1) / math.sqrt(M), rel=1e-12)

    def ratio(rows: Tensor) -> float:
        part = rows[:, span]
        q, total = float((part @ v).square().mean()), float(part.square().sum(1).mean())
        return q * (part.shape[1] - 1) / (total - q)

    error = fisher.anisotropy(found.projections["v"].square(), found.squares, DIMS).error[column]
    assert float(error) == pytest.approx(_jackknifed(ratio), rel=1e-9)
    # The jackknife of a mean is its standard error.
    assert _jackknifed(lambda rows: float((rows[:, span] @ v).square().mean())) == pytest.approx(
        float(fisher.rayleigh(found.projections["v"]).error[column]), rel=1e-9
    )


@pytest.mark.parametrize("column", range(3))
def test_spectrum_and_overlaps_equal_those_of_the_dense_matrix(column: int) -> None:
    found = _survey(G, {"v": _axis(OWN, WHOLE)}, block=3, gram=True)
    assert found.grams is not None
    gram = found.grams.sum(0) if column == 2 else found.grams[column]
    part, v = G[:, _spans(SMALL)[column]], _unit(OWN, WHOLE, column)
    energy, modes = torch.linalg.eigh(part.T @ part / M)
    rank = min(M, len(v))
    shown = fisher.spectrum(gram)
    torch.testing.assert_close(shown.eigenvalues[:rank], energy.flip(0)[:rank], rtol=1e-10, atol=1e-12)
    overlaps = shown.overlaps(found.projections["v"][:, column])
    torch.testing.assert_close(overlaps[:rank], (modes.flip(1).T @ v).abs()[:rank], rtol=1e-7, atol=1e-9)
    assert (overlaps[rank:] == 0).all()
    mean = part.mean(0)
    unbiased = (M**2 * mean @ mean - part.square().sum()) / (M - 1) / part.square().sum()
    assert fisher.mean_gradient_share(gram) == pytest.approx(float(unbiased), rel=1e-10)


def test_errors_of_the_leading_mode() -> None:
    found = _survey(G, {"v": _axis(OWN, WHOLE)}, block=2, gram=True)
    assert found.grams is not None
    v = WHOLE / WHOLE.norm()

    def first(rows: Tensor) -> tuple[float, float]:
        energy, modes = torch.linalg.eigh(rows.T @ rows / len(rows))
        return float(energy[-1]), float((modes[:, -1] @ v).abs())

    expected = (first(G)[0], _jackknifed(lambda r: first(r)[0]), first(G)[1], _jackknifed(lambda r: first(r)[1]))
    assert tuple(fisher.leading(found.grams.sum(0), found.projections["v"][:, 2])) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize(("block", "calls"), [(7, 7), (1, 28), (3, 7 + 4 + 1), (50, 7)])
def test_blocks_change_the_price_only(block: int, calls: int, gram: bool) -> None:
    asked: list[int] = []

    def serve(index: int) -> Vector:
        asked.append(index)
        return Vector(G[index], SMALL)

    found = fisher.survey(serve, M, {"v": _axis(OWN, WHOLE)}, block=block, gram=gram)
    assert len(asked) == (calls if gram else M)
    torch.testing.assert_close(found.projections["v"], _survey(G, {"v": _axis(OWN, WHOLE)}).projections["v"])
    torch.testing.assert_close(found.squares[:, -1], G.square().sum(1))
    if not gram:
        assert found.grams is None
        return
    expected = torch.stack([G[:, span] @ G[:, span].T for span in SMALL.slices])
    assert found.grams is not None
    torch.testing.assert_close(found.grams, expected, rtol=1e-12, atol=1e-12)


def test_a_survey_on_the_host_is_the_same() -> None:
    axes = {"v": _axis(OWN, WHOLE), "w": _axis(WHOLE, OWN)}
    for options in ({}, {"block": 2, "gram": True}, {"random": RandomDirections(axes["v"], 3)}):
        found = _survey(G, axes, **options)
        moved = found.cpu()
        for field in dataclasses.fields(found):
            assert same(getattr(found, field.name), getattr(moved, field.name)), field.name
    both = _survey(G, axes, gram=True, random=RandomDirections(axes["v"], 3))
    assert both.random is not None and both.random.shape == (M, 3, 3)
    assert same(both.cpu().random, both.random) and same(both.cpu().grams, both.grams)


def test_one_gradient_is_not_enough() -> None:
    with pytest.raises(ValueError, match="at least two gradients, got 1"):
        _survey(G[:1], {})


def test_many_directions_are_those_one_by_one() -> None:
    """Groups' and whole's, the same or not, one that vanishes, in blocks that do not divide the gradients."""
    axes = {f"v{k}": _axis(normal(15, seed=40 + k), normal(15, seed=50 + k)) for k in range(5)}
    axes |= {"both": Axis.of(Vector(OWN, SMALL), Vector(OWN, SMALL)), "none": _axis(0 * OWN, WHOLE)}
    same_vector = Vector(WHOLE, SMALL)
    axes["one"] = Axis.of(same_vector, same_vector)
    found = _survey(G, axes, block=3)
    table = Axes.of(axes)
    assert Axes.of(table) is table and list(table) == list(axes) and len(table.rows) == 15
    for name, axis in axes.items():
        expected = torch.stack([axis.project(Vector(row, SMALL)) for row in G])
        torch.testing.assert_close(found.projections[name], expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(table.project(G)[:, table.index(name)], expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(table[name].lengths, axis.lengths, rtol=1e-12, atol=0)
        torch.testing.assert_close(table[name].project(Vector(G[0], SMALL)), expected[0], rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="other"):
        table.index("other")
    assert not found.projections["none"][:, :2].any() and found.projections["none"][:, 2].all()


def test_coefficients_become_directions_in_one_pass() -> None:
    weights = bent_path(5, SMALL.dim, seed=9)
    rows, trajectory = record(SMALL, weights)
    coefficients = path_coefficients(trajectory, {"switch": (100, 300)})
    axes = Axes.along(coefficients, rows.combine_all, SMALL)
    assert len(axes.rows) == 6  # backbone and pc2 twice: the groups' own, and the whole's
    assert torch.equal(axes["theta0"].own.values, weights[0].float())
    assert axes["switch"].own is axes["switch"].whole or axes.places["switch"][0] == axes.places["switch"][1]
    for name, found in coefficients.items():
        whole = found[-1:].expand(2, -1)
        expected = Axis.of(rows.combine(found[:-1]), rows.combine(whole))
        torch.testing.assert_close(axes[name].lengths, expected.lengths)
        torch.testing.assert_close(axes[name].whole.values, expected.whole.values)
    assert not Axes.along({}, rows.combine_all, SMALL)


# ------------------------------------------------------------------------------------------------- many at once

# Two tiles and a rest, a group shorter than a tile, exactly one tile.
LONG = ParameterSelection(("a", "b", "c"), ((2, 4000), (100,), (64, 64)), ("a", "b", "c"))


def _dense(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x[:, span].double() @ y[:, span].double().T for span in LONG.slices])


def test_products_of_float64_vectors_are_exact() -> None:
    x, y = normal(3, LONG.dim, seed=60), normal(5, LONG.dim, seed=61)
    torch.testing.assert_close(inner_products(x, y, LONG), _dense(x, y), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(squared_norms(x, LONG), _dense(x, x).diagonal(dim1=1, dim2=2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_of_float32_vectors_keep_the_stated_error(precision: Any) -> None:
    """Also where positive terms add up, whatever training allows its own products, and inside of autocast."""
    x, y = normal(3, LONG.dim, seed=60).float(), normal(5, LONG.dim, seed=61).float()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        for a, b in ((x, y), (x.abs(), y.abs()), (x, x)):
            with torch.autocast("cpu", torch.bfloat16):
                found, squares = inner_products(a, b, LONG), squared_norms(a, LONG)
            assert float(((found - _dense(a, b)).abs() / _dense(a.abs(), b.abs())).max()) < 1e-6
            torch.testing.assert_close(squares, _dense(a, a).diagonal(dim1=1, dim2=2), rtol=1e-6, atol=0)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_do_not_touch_the_settings_of_training_even_when_they_fail() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(RuntimeError):
        inner_products(torch.zeros(1, LONG.dim), torch.zeros(1, LONG.dim, device="meta"), LONG)
    assert torch.backends.cuda.matmul.fp32_precision == before


# ------------------------------------------------------------------------------------------------ parameter order


def _permuted() -> ParameterSelection:
    """The same weights in another order, as sorted names against module order would give."""
    return ParameterSelection(("a.w", "b.v", "b.w"), ((2, 3), (2, 2), (5,)), ("a", "b", "b"))


def test_another_parameter_order_is_refused() -> None:
    """Everything has the right length, so only the fingerprint stands between a number and nonsense."""
    other = _permuted()
    assert other.dim == SMALL.dim and other.dims == SMALL.dims
    foreign = fisher.gradient_of_rows(G, other)
    with one_line_error("different parameter selections", FingerprintError):
        fisher.survey(foreign, M, {"v": _axis(OWN, WHOLE)})
    with one_line_error("different parameter selections", FingerprintError):
        Axis.of(Vector(OWN, SMALL), Vector(WHOLE, other))
    with one_line_error("different parameter selections", FingerprintError):
        Axes.of({"v": _axis(OWN, WHOLE), "w": _axis(OWN, WHOLE, other)})
    mixed = [Vector(row, SMALL if i % 2 else other) for i, row in enumerate(G)]
    with one_line_error("different parameter selections", FingerprintError):
        fisher.survey(lambda i: mixed[i], M, {}, block=2)
    for late in (1, 3):  # inside of the first block; after it, computed again for the Gram
        mixed = [Vector(row, other if i == late else SMALL) for i, row in enumerate(G)]
        with one_line_error("different parameter selections", FingerprintError):
            fisher.survey(mixed.__getitem__, M, {}, block=2, gram=True)
    with one_line_error("different parameter selections", FingerprintError):
        fisher.survey(foreign, M, {}, random=RandomDirections(_axis(OWN, WHOLE), 2))


# ----------------------------------------------------------------------------------------------- random directions


def test_random_directions_are_unit_vectors_across_the_axis() -> None:
    """Projecting the coordinate axes one by one reads the directions off."""
    axis = _axis(OWN, WHOLE)
    drawn = RandomDirections(axis, 4, seed=5)
    eye = torch.eye(15, dtype=torch.float64)
    read = drawn.project(eye)  # (D, K, G1)
    for column, span in enumerate(_spans(SMALL)):
        w, v = read[span, :, column], _unit(OWN, WHOLE, column)
        torch.testing.assert_close(w.norm(dim=0), torch.ones(4, dtype=torch.float64))
        torch.testing.assert_close(v @ w, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    again = RandomDirections(axis, 4, seed=5)
    assert torch.equal(again.project(eye), read)
    other = RandomDirections(axis, 4, seed=6)
    assert not torch.equal(other.project(eye), read)


def test_sampled_anisotropy_goes_to_the_exact_one() -> None:
    axis = _axis(OWN, WHOLE)
    found = _survey(G, {"v": axis}, random=RandomDirections(axis, 600))
    exact = fisher.anisotropy(found.projections["v"].square(), found.squares, DIMS).value
    assert found.random is not None
    sampled = fisher.sampled_anisotropy(found.projections["v"], found.random)
    torch.testing.assert_close(sampled, exact, rtol=0.15, atol=0)


# ------------------------------------------------------------------------------------------------------ directions


def test_path_directions_are_those_of_the_weights() -> None:
    weights = bent_path(6, SMALL.dim, seed=9)
    rows, trajectory = record(SMALL, weights)
    found = path_coefficients(trajectory, {"switch": (200, 400), "later": (200, 900)})
    assert set(found) == {"backbone", "pc2", "theta0", "switch"}
    for column, span in enumerate(_spans(SMALL)):
        path = (weights - weights[0])[1:, span]
        right = torch.linalg.svd(path, full_matrices=False).Vh
        expected = {"backbone": right[0], "pc2": right[1], "theta0": weights[0, span]}
        expected["switch"] = weights[4, span] - weights[2, span]
        for name, v in expected.items():
            built = rows.combine(found[name][column].expand(2, -1)).values[span].double()
            assert abs(float(torch.cosine_similarity(built, v, dim=0))) == pytest.approx(1.0, abs=1e-6), name
    signed = rows.combine(found["switch"][2].expand(2, -1)).values.double()
    torch.testing.assert_close(signed, weights[4] - weights[2], rtol=1e-5, atol=1e-5)


def test_a_path_that_has_not_moved_has_no_direction() -> None:
    _, one = record(SMALL, bent_path(1, SMALL.dim))
    assert path_coefficients(one, {}) == {}
    _, still = record(SMALL, bent_path(1, SMALL.dim).expand(3, -1))
    assert path_coefficients(still, {}) == {}
    _, straight = record(SMALL, bent_path(2, SMALL.dim))
    assert set(path_coefficients(straight, {})) == {"backbone", "theta0"}


# ----------------------------------------------------------------------------------------- batch-size correction


@given(
    st.floats(-5, 5), st.floats(0, 50), st.floats(1, 100), st.floats(1.01, 10)
)  # fmt: skip
def test_two_batch_sizes_give_both_parts(mean: float, noise: float, small: float, factor: float) -> None:
    large = small * factor
    first, second = torch.tensor([mean + noise / size for size in (small, large)], dtype=torch.float64)
    parts = fisher.split_moments(first, second, small, large)
    assert float(parts.mean) == pytest.approx(mean, abs=1e-9)
    assert float(parts.noise) == pytest.approx(noise, abs=1e-7)
    assert float(parts.per_sample) == pytest.approx(mean + noise, abs=1e-7)


def test_the_correction_has_no_bias() -> None:
    """Samples of known mean and spread in batches of 4, and of 3 x 4: what a single sample would show comes back."""
    steps, dim = 4000, 5
    mu, spread = normal(dim, seed=1), normal(dim, seed=2).abs()
    samples = mu + spread * normal(steps, 3, 4, dim, seed=3)
    micro = samples.mean(2)
    small, large = micro.square().sum(-1).mean(1), micro.mean(1).square().sum(-1)
    parts = fisher.split_moments(small, large, 4, 12)
    for name, true in (("mean", mu @ mu), ("noise", spread @ spread), ("per_sample", mu @ mu + spread @ spread)):
        values = getattr(parts, name)
        assert abs(values.mean() - true) < 4 * values.std() / math.sqrt(steps), name


@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (0, 4)])
def test_one_batch_size_is_not_enough(sizes: tuple[int, int]) -> None:
    one = torch.ones((), dtype=torch.float64)
    with pytest.raises(ValueError, match="two batch sizes, the smaller one first"):
        fisher.split_moments(one, one, *sizes)


# -------------------------------------------------------------------------------------------------- other library


class Classifier:
    """A small softmax network in float64, 40 samples, and everything about it as dense matrices."""

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        for k, p in enumerate(self.net.parameters()):
            p.data.copy_(normal(*p.shape, seed=k))
        self.x, scores = normal(40, 4, seed=20), normal(40, 3, seed=21)
        self.y = scores.argmax(1)
        self.selection = ParameterSelection.of(self.net, r"(?P<group>[02])\.")
        self.v = normal(self.selection.dim, seed=22)
        self.axes = {"v": _axis(self.v, self.v, self.selection)}

    def gradient(self, loss: Tensor) -> Vector:
        parts = torch.autograd.grad(loss, self.selection.parameters(self.net))
        return self.selection.flatten(parts, dtype=torch.float64)

    def per_sample(self, index: int) -> Vector:
        return self.gradient(cross_entropy(self.net(self.x[index : index + 1]), self.y[index : index + 1]))

    def operator(self, kind: str) -> Tensor:
        """A matrix of curvlinops, dense."""
        curvlinops = pytest.importorskip("curvlinops")
        names = dict(self.net.named_parameters())
        params = {name: names[name] for name in self.selection.names}
        arguments = (self.net, nn.CrossEntropyLoss(), params, [(self.x, self.y)])
        try:
            built = getattr(curvlinops, kind)(*arguments)
        except (TypeError, AttributeError):  # before version 3 it took a list
            built = getattr(curvlinops, kind)(self.net, arguments[1], list(params.values()), arguments[3])
        matrix: Tensor = built @ torch.eye(self.selection.dim, dtype=torch.float64)
        return matrix


def _agrees(found: fisher.Survey, dense: Tensor, axis: Tensor, selection: ParameterSelection, rtol: float) -> None:
    for column, span in enumerate(_spans(selection)):
        block, v = dense[span, span], axis[span] / axis[span].norm()
        q, total = float(v @ block @ v), float(block.trace())
        along = found.projections["v"]
        ratio = fisher.anisotropy(along.square(), found.squares, (*selection.dims, selection.dim))
        assert float(fisher.rayleigh(along).value[column]) == pytest.approx(q, rel=rtol)
        assert float(fisher.trace(found).value[column]) == pytest.approx(total, rel=rtol)
        assert float(ratio.value[column]) == pytest.approx(q * (len(v) - 1) / (total - q), rel=rtol)
        if found.grams is not None:
            gram = found.grams.sum(0) if column == len(selection.groups) else found.grams[column]
            shown = fisher.spectrum(gram)
            energy, modes = torch.linalg.eigh(block)
            assert float(shown.eigenvalues[0]) == pytest.approx(float(energy[-1]), rel=rtol)
            overlap = float(shown.overlaps(along[:, column])[0])
            assert overlap == pytest.approx(abs(float(modes[:, -1] @ v)), rel=rtol * 10, abs=rtol)


def test_per_sample_fisher_equals_curvlinops() -> None:
    case = Classifier()
    found = fisher.survey(case.per_sample, 40, case.axes, block=16, gram=True)
    _agrees(found, case.operator("EFLinearOperator"), case.v, case.selection, rtol=1e-9)


def test_every_label_by_its_probability_gives_the_gauss_newton_matrix_of_curvlinops() -> None:
    """One label a gradient, n = 1, and an exact expectation in place of the draw."""
    case = Classifier()
    rows = []
    for index in range(40):
        logits = case.net(case.x[index : index + 1])
        share = logits.detach().softmax(-1)[0]
        for label in range(3):
            score = case.gradient(cross_entropy(case.net(case.x[index : index + 1]), torch.tensor([label])))
            rows.append(score.values * (share[label] * 3).sqrt())  # the mean over 120 rows is that over 40 samples
    found = fisher.survey(fisher.gradient_of_rows(torch.stack(rows), case.selection), 120, case.axes, gram=True)
    _agrees(found, case.operator("GGNLinearOperator"), case.v, case.selection, rtol=1e-9)


# ----------------------------------------------------------------------------------------- this project's losses


def _batch(trainer_batches: int = 1) -> Batch:
    data = tiny_stories()
    data.setup("fit")
    stream = iter(data.train_dataloader())
    for _ in range(trainer_batches):
        batch: Batch = next(stream)
    return batch


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_samples_average_to_the_batch(weight: float) -> None:
    """Also where only some sequences hold a probe, and with lambda = 0 where all positions count alike."""
    module, batch = tiny_gpt().double(), _batch()
    module.lambda_now = lambda: weight  # type: ignore[method-assign]
    assert 0 < int(batch.probe_mask.any(-1).sum()) < len(batch.tokens)
    together = module.batch_loss(batch)
    apart = torch.stack([module.sample_loss(batch, i) for i in range(len(batch.tokens))])
    torch.testing.assert_close(apart.mean(), together, rtol=1e-12, atol=0)
    lm, probe = part_losses(module.gpt, [batch])
    if weight:
        torch.testing.assert_close(together, lm + weight * probe, rtol=1e-12, atol=0)
        torch.testing.assert_close(training_loss(module, batch), together)


def _small_gpt() -> tuple[LightningModule, Batch, ParameterSelection]:
    """Two blocks over five tokens, sharp enough that labels matter, and a batch with one position not asked for."""
    size = GPTSize(n_layer=2, n_head=1, d_model=4, d_ff=8, context=4)
    module = tiny_gpt(size=size, vocab_size=5, context=4).double()
    for k, p in enumerate(module.parameters()):
        p.data.add_(0.7 * normal(*p.shape, seed=k))
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    targets = torch.tensor([[1, 2, 3], [4, -100, 1]])
    batch = Batch.of(tokens, targets, torch.zeros(2, 3, dtype=torch.bool))
    return module, batch, ParameterSelection.of(module, r"(?P<group>blocks\.\d)\.mlp.*weight")


def test_the_drawn_labels_give_the_true_fisher() -> None:
    """Hundreds of draws against J' (diag p - p p') J averaged over the five positions that are asked for."""
    module, batch, selection = _small_gpt()
    parameters = selection.parameters(module)
    logits = module(batch.tokens)
    dense = torch.zeros(selection.dim, selection.dim, dtype=torch.float64)
    for row, target in zip(logits.flatten(0, 1), batch.targets.flatten(), strict=True):
        if target == -100:
            continue
        parts = [torch.autograd.grad(out, parameters, retain_graph=True) for out in row]
        jacobian = torch.stack([torch.cat([g.flatten() for g in part]) for part in parts])
        p = row.detach().softmax(-1)
        dense += jacobian.T @ (p.diag() - p[:, None] * p) @ jacobian / 5
    v, draws = normal(selection.dim, seed=30), 700

    def score(index: int) -> Vector:
        generator = torch.Generator().manual_seed(index)
        loss, count = module.sampled_loss(batch, generator)  # type: ignore[operator]
        assert int(count) == 5
        parts = torch.autograd.grad(loss, parameters)
        return Vector(selection.flatten(parts, dtype=torch.float64).values * count.sqrt(), selection)

    found = fisher.survey(score, draws, {"v": _axis(v, v, selection)})
    for column, span in enumerate(_spans(selection)):
        u = v[span] / v[span].norm()
        q, total = fisher.rayleigh(found.projections["v"]), fisher.trace(found)
        assert abs(q.value[column] - u @ dense[span, span] @ u) < 4 * q.error[column]
        assert abs(total.value[column] - dense[span, span].trace()) < 4 * total.error[column]
        assert float(q.error[column] / q.value[column]) < 0.12
    assert torch.equal(score(3).values, score(3).values)
    assert not torch.equal(score(3).values, score(4).values)


# --------------------------------------------------------------------------------------------------- fixed probe


def _probe(**settings: Any) -> FisherProbe:
    return FisherProbe(**{"schedule": Schedule(every=2), "batches": 4, "block": 3, **settings})


class _Run:
    """Eight steps, two micro-batches each, a snapshot and a measurement at every second step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spy = folder, Spy()
        self.probe = _probe(
            kinds=["batch_mean", "per_sample", "monte_carlo"],
            samples_per_batch=2,
            random_directions=3,
            segments={"switch": (2, 4)},
        )
        self.probe.add_direction("path", self._rule)
        # The probe stands before the recorder and sees its snapshots all the same.
        callbacks = [self.spy, self.probe, recorder(2)]
        trainer = quiet_trainer(folder, callbacks, max_steps=8, accumulate_grad_batches=2, log_every_n_steps=3)
        trainer.fit(tiny_gpt(), datamodule=tiny_stories())
        self.rows = metrics(folder)

    @staticmethod
    def _rule(trajectory: Any) -> Tensor | None:
        """Last weights minus first ones, from the third snapshot on."""
        n = len(trajectory)
        return torch.tensor([0.0] + [1.0] * (n - 1), dtype=torch.float64).expand(3, n) if n > 2 else None

    @property
    def fixed(self) -> list[Batch]:
        return [*self.spy.batches[1], *self.spy.batches[2]]


@cache
def _run() -> _Run:
    return _Run(Path(cache_dir()) / "fisher")


def _gradients(run: _Run, step: int, kind: str) -> list[dict[str, Tensor]]:
    """What the probe must have had in its hands, from the definition of the losses."""
    module = tiny_gpt()
    module.load_state_dict(run.spy.weights[step])
    lam = WEIGHT(step + 1)
    names, weights = zip(*module.named_parameters(), strict=True)
    found = []
    for index, batch in enumerate(run.fixed):
        lm, probe = part_losses(module.gpt, [batch])
        losses = [lm + lam * probe]
        if kind == "per_sample":
            nll = cross_entropy(module(batch.tokens).flatten(0, 1), batch.targets.flatten(), reduction="none")
            nll, asked = nll.view_as(batch.targets), batch.probe_mask & (batch.targets != -100)
            plain = ~batch.probe_mask & (batch.targets != -100)
            share = nll * plain / plain.sum() + lam * nll * asked / asked.sum().clamp_min(1)
            losses = [share[i].sum() * len(share) for i in range(2)]
        if kind == "monte_carlo":
            loss, count = module.sampled_loss(batch, torch.Generator().manual_seed(index))
            losses = [loss * count.sqrt()]
        for loss in losses:
            parts = torch.autograd.grad(loss, weights, retain_graph=True)
            found.append(dict(zip(names, parts, strict=True)))
    return found


def _lines(run: _Run, step: int, group: str) -> dict[str, Array]:
    """Unit directions from the snapshot files up to a step."""
    steps, basis = read_path(run.folder, group, until=step)
    rows = drifts(basis)
    right = np.linalg.svd(rows, full_matrices=False)[2]
    found = {"backbone": right[0], "theta0": basis[0]}
    if len(rows) > 1:
        found |= {"pc2": right[1], "path": rows[-1]}
    if 4 in steps:
        found["switch"] = rows[steps.index(4) - 1] - rows[steps.index(2) - 1]
    return {name: v / np.linalg.norm(v) for name, v in found.items()}


@pytest.mark.parametrize("kind", ["batch_mean", "per_sample", "monte_carlo"])
@pytest.mark.parametrize("group", LABELS)
def test_the_probe_equals_brute_force(group: str, kind: str) -> None:
    run = _run()
    for step in (2, 4, 6, 8):
        matrix = np.stack([flat(g, group) for g in _gradients(run, step, kind)])
        count, dim = matrix.shape
        assert count == (8 if kind == "per_sample" else 4)
        lines = _lines(run, step, group)
        squares, along = (matrix**2).sum(1), {name: matrix @ v for name, v in lines.items()}
        q = {name: (p**2).mean() for name, p in along.items()}
        energy, left = np.linalg.eigh(matrix @ matrix.T / count)
        first = matrix.T @ left[:, -1]
        expected = {
            "q_backbone": q["backbone"],
            "trace": squares.mean(),
            "anisotropy": q["backbone"] * (dim - 1) / (squares.mean() - q["backbone"]),
            "lambda_1": energy[-1],
            "overlap": abs(first @ lines["backbone"]) / np.linalg.norm(first),
        }
        if group == "trunk":
            expected |= {f"q_{name}": value for name, value in q.items()}
            errors = {name: (p**2).std(ddof=1) / math.sqrt(count) for name, p in along.items()}
            expected |= {f"q_{name}_se": value for name, value in errors.items()}
            expected |= {"trace_se": squares.std(ddof=1) / math.sqrt(count)}
            expected |= {f"lambda_{k}": energy[-k] for k in range(2, min(count, 5) + 1)}
            expected["overlap_z"] = expected["overlap"] / math.sqrt(2 / (math.pi * dim))
        prefix = f"fisher/{group}/{kind}/"
        row = {k.removeprefix(prefix): value for k, value in run.rows[step].items() if k.startswith(prefix)}
        extra = {"anisotropy_se", "lambda_1_se", "overlap_se", "mean_share", "anisotropy_sampled"}
        assert set(row) == set(expected) | (extra if group == "trunk" else set()), step
        named, found = ({prefix + k: numbers[k] for k in expected} for numbers in (expected, row))
        assert_close(found, named, {group: dim}, rel=2e-3, absolute=1e-7, where=step)
    assert not any(k.startswith("fisher/") for s, r in run.rows.items() if s % 2 for k in r)


def test_the_fixed_batches_are_the_first_ones_and_hashed() -> None:
    run = _run()
    digest = hashlib.sha256()
    for batch in run.fixed:
        digest.update(f"Batch {list(range(len(batch)))!r} ".encode())
        for leaf in batch:
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)} ".encode() + leaf.numpy().tobytes())
    assert run.probe.sha256 == digest.hexdigest()
    kept = [saved["nest"] for saved in run.probe.state_dict()["batches"]]
    assert same(kept, [("Batch", list(range(len(batch))), list(batch)) for batch in run.fixed])


def test_an_optimizer_step_is_measured_once() -> None:
    """Not once for each of its two micro-batches."""
    assert _run().probe.answered == 4


class Foreign(LightningModule):
    """Not this project's model: a batch is a list, or a dict with a number and a text in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 4))

    def _loss(self, batch: Any) -> Tensor:
        x = batch["x"] if isinstance(batch, dict) else batch[0]
        return (self.layer(x) - x).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def configure_optimizers(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Overwriting(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss([batch[0].clone()])
        batch[0].zero_()
        return loss

    def batch_loss(self, batch: Any) -> Tensor:
        return self._loss(batch)


def test_the_fixed_batches_are_copies(tmp_path: Path) -> None:
    """A training step may reuse its batch's memory."""
    probe = _probe()
    loader = DataLoader(TensorDataset(normal(32, 4).float()), batch_size=4)
    quiet_trainer(tmp_path, [probe, TrajectoryRecorder("layer")], max_steps=5).fit(Overwriting(), loader)
    saved = torch.cat([leaf for batch in probe.state_dict()["batches"] for leaf in batch["nest"][2]])
    torch.testing.assert_close(saved, normal(32, 4).float()[:16])


def test_nothing_is_measured_before_the_batches_are_complete(tmp_path: Path) -> None:
    probe = _probe(schedule=Schedule(every=1), batches=3)
    quiet_trainer(tmp_path, [recorder(1), probe], max_steps=4).fit(tiny_gpt(), datamodule=tiny_stories())
    first = min(step for step, row in metrics(tmp_path).items() if any(k.startswith("fisher/") for k in row))
    assert first == 2  # the third micro-batch is about to be the third step
    assert probe.asked == probe.answered == 3


def test_without_spectrum_each_gradient_is_computed_once(tmp_path: Path) -> None:
    module, calls = tiny_gpt(), []
    original = module.batch_loss

    def count(batch: Batch) -> Tensor:
        calls.append(module.trainer.global_step)
        return original(batch)

    module.batch_loss = count  # type: ignore[method-assign]
    probe = _probe(schedule=Schedule(steps=[5]), spectrum=False)
    quiet_trainer(tmp_path, [recorder(1), probe], max_steps=6).fit(module, datamodule=tiny_stories())
    assert calls == [5] * 4
    names = {k for k in metrics(tmp_path)[5] if k.startswith("fisher/trunk/")}
    assert "fisher/trunk/batch_mean/trace" in names and not any("lambda" in k or "overlap" in k for k in names)
    assert probe.estimate(6, 10).passes == pytest.approx(4 / 6)
    assert _probe(schedule=Schedule(steps=[5])).estimate(6, 10).passes == pytest.approx((4 + 1) / 6)


def test_gradients_that_are_not_finite_are_not_reported(tmp_path: Path) -> None:
    module = tiny_gpt()
    original = module.batch_loss
    module.batch_loss = lambda batch: original(batch) * (math.inf if module.trainer.global_step == 6 else 1.0)  # type: ignore[method-assign]
    quiet_trainer(tmp_path, [recorder(2), _probe()], max_steps=8).fit(module, datamodule=tiny_stories())
    rows = metrics(tmp_path)
    assert [s for s in rows if any(k.startswith("fisher/") for k in rows[s])] == [4, 8]


# ----------------------------------------------------------------------------------------------- streaming probe


@cache
def _streamed(accumulate: int) -> tuple[Path, Spy]:
    """Snapshots at 0, 3, 6 and 7; every step is looked at."""
    folder, spy = Path(cache_dir()) / f"streamed-{accumulate}", Spy()
    callbacks = [spy, StreamingFisher(Schedule(every=1)), recorder(3)]
    trainer = quiet_trainer(folder, callbacks, max_steps=7, accumulate_grad_batches=accumulate, log_every_n_steps=2)
    trainer.fit(tiny_gpt(), datamodule=tiny_stories())
    return folder, spy


def _micro_gradients(spy: Spy, step: int) -> list[dict[str, Tensor]]:
    """Each micro-batch's part of the optimizer batch's gradient, times their number."""
    gpt, batches = spy.before[step], spy.batches[step]
    tokens, targets, mask = (torch.cat([getattr(b, k) for b in batches]) for k in ("tokens", "targets", "probe_mask"))
    nll = cross_entropy(gpt(tokens).flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    asked, plain = mask & (targets != -100), ~mask & (targets != -100)
    share = nll * plain / plain.sum() + WEIGHT(step) * nll * asked / asked.sum().clamp_min(1)
    names, weights = zip(*[(f"gpt.{name}", p) for name, p in gpt.named_parameters()], strict=True)
    found = []
    for part in share.split([len(b.tokens) for b in batches]):
        grads = torch.autograd.grad(part.sum() * len(batches), weights, retain_graph=True)
        found.append(dict(zip(names, grads, strict=True)))
    return found


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("group", LABELS)
def test_streaming_equals_brute_force(group: str, accumulate: int) -> None:
    folder, spy = _streamed(accumulate)
    rows = metrics(folder)
    kinds = ("streaming", "streaming_per_sample") if accumulate > 1 else ("streaming",)
    for last, steps in ((6, (4, 5, 6)), (7, (7,))):
        basis = read_path(folder, group, until=steps[0] - 1)[1]
        v = np.linalg.svd(drifts(basis), full_matrices=False)[2][0]
        whole = np.stack([flat(spy.gradients[t], group) for t in steps])
        moments = {"streaming": ((whole**2).sum(1), (whole @ v) ** 2)}
        micro = np.stack([[flat(g, group) for g in _micro_gradients(spy, t)] for t in steps])
        np.testing.assert_allclose(micro.mean(1), whole, rtol=1e-3, atol=1e-5)
        b, large = 4, 4 * accumulate
        if accumulate > 1:  # unbiased within each step: mean and variance of the micro-batches' numbers
            spread = micro - whole[:, None]
            noise_n = b * (spread**2).sum((1, 2)) / (accumulate - 1)
            noise_q = b * ((spread @ v) ** 2).sum(1) / (accumulate - 1)
            clean = [m - n / large for m, n in zip(moments["streaming"], (noise_n, noise_q), strict=True)]
            moments["streaming_per_sample"] = (clean[0] + noise_n, clean[1] + noise_q)
            if group == "trunk" and clean[0].mean() > 0:
                found = rows[last]["fisher/trunk/streaming_per_sample/noise_scale"]
                assert found == pytest.approx(noise_n.mean() / clean[0].mean(), rel=5e-3)
        for kind in kinds:
            n, q = moments[kind]
            expected = {"trace": n.mean(), "q_backbone": q.mean()}
            expected["anisotropy"] = q.mean() * (len(v) - 1) / (n.mean() - q.mean())
            if group == "trunk" and len(steps) > 1:
                expected["trace_se"] = n.std(ddof=1) / math.sqrt(3)
                expected["q_backbone_se"] = q.std(ddof=1) / math.sqrt(3)
            prefix = f"fisher/{group}/{kind}/"
            row = {k.removeprefix(prefix): x for k, x in rows[last].items() if k.startswith(prefix)}
            assert set(expected) <= set(row)
            named, logged = ({prefix + k: numbers[k] for k in expected} for numbers in (expected, row))
            assert_close(logged, named, {group: len(v)}, rel=5e-3, where=(last, kind))
    told = {step for step, row in rows.items() if any(k.startswith("fisher/") for k in row)}
    assert told == {6, 7}  # up to step 3 there is no direction
    assert any("per_sample" in k for k in rows[6]) == (accumulate > 1)


def test_a_step_cut_short_by_the_end_of_an_epoch_is_left_out(tmp_path: Path) -> None:
    """Three micro-batches a step, eight an epoch: the third step of each has only two."""
    probe = StreamingFisher(Schedule(every=1))
    kept: list[int] = []
    finish = probe._look

    def spy(trainer: Any, module: LightningModule) -> None:
        finish(trainer, module)
        kept.append(probe._measured)

    probe._look = spy  # type: ignore[method-assign]
    loader = DataLoader(TensorDataset(normal(32, 4).float()), batch_size=4)
    callbacks = [probe, TrajectoryRecorder(r"layer", Schedule(every=1))]
    quiet_trainer(tmp_path, callbacks, max_steps=6, accumulate_grad_batches=3).fit(Foreign(), loader)
    assert sorted(set(kept)) == [-1, 2, 4, 5]  # step 1 has no direction


# --------------------------------------------------------------------------------------------- living with training


class WithLoss(Foreign):
    def batch_loss(self, batch: Any) -> Tensor:
        return self._loss(batch)


class WithParts(Foreign):
    def named_losses(self, batch: Any) -> dict[str, Tensor]:
        return {"a": 0.25 * self._loss(batch), "b": 0.75 * self._loss(batch)}


def _dicts() -> DataLoader[Any]:
    items = [{"x": x, "y": {"k": x[:1]}, "name": "row", "i": k} for k, x in enumerate(normal(32, 4).float())]
    return DataLoader(items, batch_size=4, shuffle=True)  # type: ignore[arg-type]


def test_any_module_and_any_batch(tmp_path: Path) -> None:
    """With `batch_loss`, and the same through the sum of `named_losses`; samples are cut out of nested dicts."""
    logs = []
    for kind in (WithLoss, WithParts):
        torch.manual_seed(1)
        probe = _probe(kinds=["batch_mean", "per_sample"], samples_per_batch=4)
        callbacks = [probe, TrajectoryRecorder(r"layer\.(?P<group>\d)\.weight", Schedule(every=1), name="layers")]
        folder = tmp_path / kind.__name__
        quiet_trainer(folder, callbacks, max_steps=6).fit(kind(), _dicts())
        logs.append({k: value for k, value in metrics(folder)[6].items() if k.startswith("fisher/layers")})
    assert logs[0] == pytest.approx(logs[1], rel=1e-4, abs=1e-8)
    assert {k.split("/")[2] for k in logs[0]} == {"batch_mean", "per_sample"}


def test_a_sample_is_cut_from_every_tensor_that_has_one() -> None:
    batch = {"x": torch.arange(6).view(3, 2), "n": torch.tensor(3), "w": torch.ones(5), "s": ["a", (torch.arange(3),)]}
    one = take_sample(batch, 1)
    assert one["x"].tolist() == [[2, 3]] and one["s"][1][0].tolist() == [1] and one["s"][0] == "a"
    assert one["n"].tolist() == 3 and len(one["w"]) == 5


def _everything() -> list[Callback]:
    kinds = ["batch_mean", "per_sample", "monte_carlo"]
    return [_probe(kinds=kinds, random_directions=2), StreamingFisher(Schedule(every=1)), recorder(2)]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_does_not_notice(tmp_path: Path, accumulate: int, precision: Any) -> None:
    """Weights, optimizer and random state, with clipping at work."""
    ends = []
    for callbacks in ([], _everything()):
        trainer = quiet_trainer(
            tmp_path / str(len(callbacks)),
            callbacks,
            max_steps=6,
            accumulate_grad_batches=accumulate,
            precision=precision,
            gradient_clip_val=0.5,
        )
        module = tiny_gpt()
        trainer.fit(module, datamodule=tiny_stories())
        moments = trainer.optimizers[0].state_dict()["state"]
        ends.append(({**module.state_dict()}, moments, torch.get_rng_state()))
    assert same(*ends)
    assert "fisher/trunk/monte_carlo/q_backbone" in metrics(tmp_path / "3")[4]


def test_a_foreign_model_does_not_notice(tmp_path: Path) -> None:
    """Dropout stays on in training and off in measuring, shuffling draws what it would have drawn."""
    ends = []
    for watched in (False, True):
        torch.manual_seed(1)
        watch = [_probe(), StreamingFisher(Schedule(every=1)), TrajectoryRecorder("layer", Schedule(every=1))]
        module = WithLoss()
        trainer = quiet_trainer(tmp_path / str(watched), watch if watched else [], max_steps=8)
        trainer.fit(module, _dicts())
        ends.append(({**module.state_dict()}, torch.get_rng_state(), module.training))
    assert same(*ends)


def test_modes_are_set_once_for_all_gradients(tmp_path: Path) -> None:
    """To set them takes the host as long as several layers do."""

    class Counting(WithLoss):
        evaluations = 0

        def eval(self) -> Counting:
            self.evaluations += 1
            return super().eval()

    module, probe = Counting(), _probe(spectrum=False)
    quiet_trainer(tmp_path, [probe, TrajectoryRecorder("layer")], max_steps=8).fit(module, _dicts())
    assert probe.answered > 1 and module.evaluations == probe.answered


def _measured(folder: Path, accumulate: int, stop: int = 0, resume: bool = False) -> tuple[Any, str]:
    """Metrics and batch hash of eight steps, or of the part before or after a checkpoint at step `stop`."""
    path = folder / f"checkpoints/{stop:06d}.ckpt" if resume else None
    table = MetricsCSV(folder / "metrics.csv")
    if resume:
        table.resume(stop)
    until = stop + 1 if stop and not resume else 8  # one step too far: nothing is said for the end of training
    probe = _probe(kinds=["batch_mean", "monte_carlo"])
    trainer = quiet_trainer(
        folder,
        [probe, StreamingFisher(Schedule(every=1)), recorder(2), checkpoints(folder)],
        logger=table,
        max_steps=until,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=3,
    )
    trainer.fit(tiny_gpt(seed=2 if resume else 1), datamodule=tiny_stories(), ckpt_path=path)
    return metrics(folder), probe.sha256


@cache
def _unbroken(accumulate: int) -> tuple[Any, str]:
    return _measured(Path(cache_dir()) / f"unbroken-fisher-{accumulate}", accumulate)


@pytest.mark.parametrize(("accumulate", "stop"), [(1, 3), (1, 6), (2, 1), (2, 5)])
def test_a_resumed_run_measures_the_same(tmp_path: Path, accumulate: int, stop: int) -> None:
    """Stopped while batches are being collected, on a measurement, and inside a window of the streaming one."""
    _measured(tmp_path, accumulate, stop)
    rows, sha256 = _measured(tmp_path, accumulate, stop, resume=True)
    assert (rows, sha256) == _unbroken(accumulate)
    assert any("streaming" in key for row in rows.values() for key in row)
    assert "fisher/trunk/monte_carlo/q_backbone" in rows[8 if accumulate == 1 else 4]


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"batches": 1}, "batches 1 "),
        ({"block": 0}, "block 0"),
        ({"samples_per_batch": 0}, "samples_per_batch 0"),
        ({"eigenvalues": 0}, "eigenvalues 0"),
        ({"random_directions": -1}, "random_directions -1"),
        ({"kinds": ["empirical"]}, "choose from batch_mean, per_sample, monte_carlo"),
        ({"kinds": []}, "choose from batch_mean"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], match: str) -> None:
    with one_line_error(match):
        FisherProbe(**settings)


@pytest.mark.parametrize("probe", [FisherProbe, StreamingFisher])
def test_no_recorder(tmp_path: Path, probe: type[Callback]) -> None:
    with one_line_error(f"{probe.__name__} needs a TrajectoryRecorder"):
        quiet_trainer(tmp_path, [probe()], max_steps=1).fit(tiny_gpt(), datamodule=tiny_stories())


def test_a_segment_between_snapshots_that_are_never_taken(tmp_path: Path) -> None:
    probe = _probe(segments={"switch": (0, 5)})
    with one_line_error("segment switch ends at step 5, where no snapshot is taken"):
        quiet_trainer(tmp_path, [probe, recorder(2)], max_steps=1).fit(tiny_gpt(), datamodule=tiny_stories())


@pytest.mark.parametrize(
    ("kinds", "module", "match"),
    [
        (["batch_mean"], Foreign, r"Foreign has no batch_loss\(batch\)"),
        (["monte_carlo"], WithLoss, r"WithLoss has no sampled_loss\(batch, generator\)"),
    ],
)
def test_a_module_without_the_loss(tmp_path: Path, kinds: list[Any], module: type[Foreign], match: str) -> None:
    callbacks = [_probe(kinds=kinds), TrajectoryRecorder("layer")]
    with one_line_error(match):
        quiet_trainer(tmp_path, callbacks, max_steps=1).fit(module(), _dicts())
    if module is Foreign:
        with one_line_error(match):
            training_loss(module(), None)


def test_more_samples_than_a_batch_has(tmp_path: Path) -> None:
    callbacks = [_probe(kinds=["per_sample"], samples_per_batch=5), recorder(2)]
    with one_line_error("samples_per_batch 5 of a batch of 4: give 4 or less"):
        quiet_trainer(tmp_path, callbacks, max_steps=1).fit(tiny_gpt(), datamodule=tiny_stories())
