"""Peaks, troughs and switch directions: the definition by brute force, explicit vectors, walks, and a real trainer."""

from __future__ import annotations

import doctest
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, bent_path, flat_selection, gram_of, normal, record, walk_gram
from helpers import Array, checkpoints, metrics, quiet_trainer, same
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mini_gpt_pl.callbacks import FisherProbe, Schedule, TrajectoryRecorder
from mini_gpt_pl.callbacks.switching import SWITCHING_FILE, SwitchingProbe
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import switching
from mini_gpt_pl.geometry.path.switching import Axes, Interval, Stretch
from mini_gpt_pl.geometry.path.trajectory import Trajectory

# Thousandths, so that with a prominence of 30.5 thousandths nothing hangs on rounding.
SERIES = st.lists(st.integers(0, 150), max_size=24).map(lambda values: [value / 1000 for value in values])
PROMINENCE = 0.0305


def steps_of(values: list[float]) -> list[int]:
    return [200 * k for k in range(len(values))]


def peaks_by_definition(values: list[float], prominence: float, reach: int) -> list[int]:
    v, found = np.array(values), []
    for i in range(1, len(v) - 1):
        before, after = v[max(i - reach, 0) : i], v[i + 1 : i + 1 + reach]
        if v[i] > v[i - 1] and v[i] > v[i + 1] and v[i] - max(before.min(), after.min()) >= prominence:
            found.append(i)
    return found


# ------------------------------------------------------------------------------------------ peaks and troughs


@given(SERIES, st.integers(1, 5))
def test_events_are_those_of_the_definition(values: list[float], reach: int) -> None:
    found = switching.events(steps_of(values), values, PROMINENCE, reach)
    peaks, troughs = ([e.index for e in found if e.kind == kind] for kind in ("peak", "trough"))
    assert peaks == peaks_by_definition(values, PROMINENCE, reach)
    assert troughs == peaks_by_definition([-value for value in values], PROMINENCE, reach)
    assert all((e.step, e.value) == (200 * e.index, values[e.index]) for e in found)
    assert [e.index for e in found] == sorted(e.index for e in found)


@given(SERIES, st.integers(1, 5))
def test_what_is_declared_stays_declared(values: list[float], reach: int) -> None:
    """With the values seen so far, exactly those events hold that the whole series calls declared by then."""
    whole = switching.events(steps_of(values), values, PROMINENCE, reach)
    for seen in range(len(values) + 1):
        so_far = switching.events(steps_of(values)[:seen], values[:seen], PROMINENCE, reach)
        assert so_far == [event for event in whole if event.declared < seen]


@given(SERIES, st.integers(1, 7))
def test_a_certain_switch_is_never_taken_back(values: list[float], reach: int) -> None:
    whole = switching.switches(switching.events(steps_of(values), values, PROMINENCE, reach), reach)
    for seen in range(len(values) + 1):
        events = switching.events(steps_of(values)[:seen], values[:seen], PROMINENCE, reach)
        certain = [switch for switch in switching.switches(events, reach) if switch.declared < seen]
        assert certain == [switch for switch in whole if switch.declared < seen]


def test_a_shallow_trough_may_be_recognised_late_with_a_long_reach() -> None:
    """The case that a pair's waiting is for: the trough at 2 becomes one only after the deeper one at 4."""
    values = [0.5, 0.6, 0.50, 0.51, 0.40, 0.45, 0.46, 0.60]
    at = switching.events(steps_of(values)[:7], values[:7], 0.05, 5)
    assert [e.index for e in at if e.kind == "trough"] == [4]
    assert [s.declared < 7 for s in switching.switches(at, 5)] == [False]  # peak and deeper trough are not yet a pair
    whole = switching.events(steps_of(values), values, 0.05, 5)
    assert [e.index for e in whole if e.kind == "trough"] == [2, 4]
    (pair,) = switching.switches(whole, 5)
    assert (pair.peak.index, pair.trough.index, pair.declared) == (1, 2, 7)


def test_each_peak_has_the_first_later_trough() -> None:
    values = [0.0, 0.5, 0.2, 0.6, 0.59, 0.58, 0.57, 0.65, 0.1, 0.3, 0.9, 0.8]
    found = switching.events(steps_of(values), values)
    assert [(e.kind[0], e.index) for e in found] == [
        ("p", 1),
        ("t", 2),
        ("p", 3),
        ("t", 6),
        ("p", 7),
        ("t", 8),
        ("p", 10),
    ]
    pairs = [(s.peak.index, s.trough.index, s.declared) for s in switching.switches(found)]
    assert pairs == [(1, 2, 3), (3, 6, 7), (7, 8, 9)]  # the last peak has no trough yet


def test_peaks_without_a_trough_between_them_share_one() -> None:
    values = [0.30, 0.5, 0.49, 0.6, 0.2, 0.4]
    found = switching.events(steps_of(values), values, prominence=0.03)
    pairs = [(s.peak.index, s.trough.index) for s in switching.switches(found)]
    assert pairs == [(1, 4), (3, 4)]


def test_a_prominence_of_exactly_the_threshold_counts_in_float32() -> None:
    """80 and 20 right answers of 2000 are 0.03 apart; their float32 values are not quite."""
    high, low = (float(torch.tensor(count / 2000, dtype=torch.float32)) for count in (80, 20))
    assert high - low < 0.03
    assert [e.kind for e in switching.events([1, 2, 3], [low, high, low])] == ["peak"]
    assert not switching.events([1, 2, 3], [low, high - 5e-4, low])  # one answer fewer


def test_plateaus_and_ends_are_no_events() -> None:
    assert not switching.events([1, 2, 3, 4], [0.0, 1.0, 1.0, 0.0])
    assert not switching.events([1, 2], [0.0, 1.0]) and not switching.events([], [])


def test_a_series_must_be_finite_and_have_steps() -> None:
    with pytest.raises(ValueError, match="not finite"):
        switching.events([1, 2, 3], [0.0, math.nan, 0.0])
    with pytest.raises(ValueError, match="3 values for 2 steps"):
        switching.events([1, 2], [0.0, 1.0, 0.0])


# --------------------------------------------------------------------------------------------------- stretches

T = 12
PATH = bent_path(T + 1, SMALL.dim, seed=3)
SPANS = {"a": slice(0, 6), "b": slice(6, 15), None: slice(0, 15)}
TRAJECTORY = record(SMALL, PATH)[1]  # float64 rows, a snapshot every hundred steps


def test_a_switch_direction_is_a_difference_of_weights() -> None:
    basis = torch.cat([PATH[:1], PATH.diff(dim=0)])
    for first, last in itertools.product(range(T + 1), repeat=2):
        found = switching.switch_direction(T + 1, first, last) @ basis
        torch.testing.assert_close(found, PATH[last] - PATH[first], rtol=0, atol=1e-12)


def test_docstring_examples() -> None:
    assert doctest.testmod(switching).failed == 0


def a_switch(peak: int, trough: int) -> switching.Switch:
    """Between two evaluation steps."""
    events = (switching.Event("peak", 1, peak, 0.5, 2), switching.Event("trough", 2, trough, 0.1, 3))
    return switching.Switch(*events, declared=3)


@pytest.mark.parametrize(
    ("peak", "trough", "expected"), [(100, 300, (1, 3)), (150, 390, (1, 3)), (110, 190, None), (50, 200, None)]
)
def test_a_switch_lies_between_snapshots(peak: int, trough: int, expected: tuple[int, int] | None) -> None:
    assert switching.interval_of(a_switch(peak, trough), [90, 100, 200, 300]) == expected


INTERVAL = st.tuples(st.integers(0, 11), st.integers(1, 6)).map(lambda pair: Interval(pair[0], min(sum(pair), 12)))


@given(st.lists(st.integers(1, 3), min_size=12, max_size=12), INTERVAL, st.lists(INTERVAL, max_size=3))
def test_controls_are_all_stretches_of_that_length_without_a_switch(
    gaps: list[int], like: Interval, avoid: list[Interval]
) -> None:
    steps = [0, *itertools.accumulate(gaps)]
    taken = {k for first, last in [like, *avoid] for k in range(first, last)}
    expected = [
        (i, j)
        for i, j in itertools.combinations(range(13), 2)
        if steps[j] - steps[i] == steps[like.last] - steps[like.first] and not taken & set(range(i, j))
    ]
    assert switching.control_intervals(steps, like, avoid) == expected


def test_many_controls_are_thinned_evenly() -> None:
    steps = list(range(102))
    found = switching.control_intervals(steps, Interval(0, 1), [], limit=5)
    assert [first for first, _ in found] == [1, 26, 51, 75, 100]
    assert len(switching.control_intervals(steps, Interval(0, 1), [], limit=1)) == 1


def leading(rows: Array, count: int = 6) -> Array:
    """Right singular vectors with a singular value."""
    _, values, right = np.linalg.svd(rows, full_matrices=False)
    kept: Array = right[values > 1e-9 * values[0]][:count]
    return kept


def by_hand(path: Array, stretch: Interval, fitted: int) -> tuple[float, float, float]:
    """|cos|, energy in PCs 2-6 before and after v_b is projected out, from the vectors themselves."""
    axes = leading(path[1:fitted] - path[0])
    v = path[stretch.first] - path[stretch.last]
    v = v / np.linalg.norm(v)
    across = v - (v @ axes[0]) * axes[0]
    across = across / np.linalg.norm(across)
    return abs(v @ axes[0]), float(np.square(axes[1:] @ v).sum()), float(np.square(axes[1:] @ across).sum())


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("group", [None, "a", "b"])
@pytest.mark.parametrize("stretch", [Interval(1, 2), Interval(3, 8), Interval(9, 12), Interval(11, 12)])
def test_a_stretch_is_placed_as_its_vector_is(stretch: Interval, group: str | None, past: bool) -> None:
    path = PATH.numpy()[:, SPANS[group]]
    (found,) = switching.measure(TRAJECTORY, [stretch], Axes(), group=group, past=past)
    cosine, energy, across = by_hand(path, stretch, stretch.first + 1 if past else T + 1)
    assert abs(found.cosine) == pytest.approx(cosine, abs=1e-9)
    assert found.energy == pytest.approx(energy, abs=1e-9)
    assert found.energy_across == pytest.approx(across, abs=1e-8)
    assert found.transverse == pytest.approx(1 - cosine**2, abs=1e-9)
    whole = PATH.numpy()[stretch.first] - PATH.numpy()[stretch.last]
    share = np.square(whole[SPANS[group]]).sum() / np.square(whole).sum()
    assert found.share == pytest.approx(share, abs=1e-12)


def test_the_sign_is_that_of_peak_minus_trough() -> None:
    """A path that runs out along a line and back: outward the weights leave the peak along v_b, so v_sw is -v_b."""
    weights = torch.tensor([0.0, 1, 2, 3, 2.5]).double()[:, None] * normal(4, seed=5)
    trajectory = record(flat_selection(4), weights)[1]
    out, back = switching.measure(trajectory, [Interval(1, 3), Interval(3, 4)], Axes(), past=False)
    assert [out.cosine, back.cosine] == pytest.approx([-1.0, 1.0])
    assert (out.energy_across, back.energy_across) == (0.0, 0.0)  # nothing is left across


def orthogonal_walk(snapshots: int) -> Trajectory:
    steps = list(range(0, 100 * snapshots, 100))
    return Trajectory("walk", ("all",), (10**6,), steps, walk_gram(snapshots - 1)[None], [1.0] * snapshots)


def test_a_walk_knows_nothing_of_its_future() -> None:
    for stretch in (Interval(1, 4), Interval(7, 8)):
        (found,) = switching.measure(orthogonal_walk(20), [stretch], Axes(), past=True)
        assert found.cosine == pytest.approx(0.0, abs=1e-12) and found.energy == pytest.approx(0.0, abs=1e-12)
        (biased,) = switching.measure(orthogonal_walk(20), [stretch], Axes(), past=False)
        assert abs(biased.cosine) > 0.1  # the whole run's backbone contains the switch


def test_without_a_past_or_a_movement_there_is_no_number() -> None:
    (first,) = switching.measure(TRAJECTORY, [Interval(0, 1)], Axes(), past=True)
    assert math.isnan(first.cosine) and math.isnan(first.energy) and first.share == 1.0
    still = record(flat_selection(3), torch.ones(4, 3).double())[1]
    (none,) = switching.measure(still, [Interval(1, 2)], Axes(), past=False)
    assert all(math.isnan(value) for value in (none.cosine, none.energy, none.energy_across, none.share))


def test_axes_of_the_past_do_not_change_as_the_run_goes_on() -> None:
    kept = Axes()
    for snapshots in range(3, T + 2):
        so_far = TRAJECTORY.until(100 * (snapshots - 1))
        stretches = [Interval(k, k + 1) for k in range(1, snapshots - 1)]
        again = switching.measure(so_far, stretches, kept, past=True)
        fresh = switching.measure(so_far, stretches, Axes(), past=True)
        np.testing.assert_allclose(
            [[s.cosine, s.energy] for s in again], [[s.cosine, s.energy] for s in fresh], atol=1e-9
        )


# ---------------------------------------------------------------------------------------------------- controls


@given(
    st.sampled_from([-0.7, 0.0, 0.25, 0.5, 0.6]),
    st.lists(st.sampled_from([-0.5, 0.0, 0.25, 0.5, math.nan]), max_size=9),
)
def test_percentile_counts(value: float, controls: list[float]) -> None:
    known = np.array([c for c in controls if not math.isnan(c)])
    found = switching.percentile(value, controls)
    if not len(known):
        assert math.isnan(found)
    else:
        assert found == pytest.approx(((known < value).mean() + (known <= value).mean()) / 2)
    assert math.isnan(switching.percentile(math.nan, controls))


@pytest.mark.parametrize("past", [False, True])
def test_on_a_walk_the_percentile_of_a_switch_is_uniform(past: bool) -> None:
    """A stretch anywhere on a walk is one of its controls: the ranks of 100 switches fill [0, 1] evenly."""
    ranks: dict[str, list[float]] = {"cosine": [], "energy": [], "energy_across": []}
    for seed in range(100):
        rng = np.random.Generator(np.random.Philox(key=seed))
        gram = gram_of(torch.from_numpy(rng.standard_normal((25, 60))).cumsum(0))
        trajectory = Trajectory("walk", ("all",), (60,), list(range(25)), gram[None], [1.0] * 25)
        switch = Interval(start := int(rng.integers(7, 24)), start + 1)
        # The past of a very early control has fewer components, so that its energy is another statistic.
        controls = switching.control_intervals(trajectory.steps, switch, [Interval(0, 7)])
        own, *others = switching.measure(trajectory, [switch, *controls], Axes(), past=past)
        assert len(others) == 16
        for name, values in ranks.items():
            values.append(switching.percentile(abs(getattr(own, name)), [abs(getattr(c, name)) for c in others]))
    for name, values in ranks.items():
        # Kolmogorov-Smirnov: 0.163 is the 1 % point at 100, and ranks come in steps of 1/16.
        assert np.abs(np.sort(values) - (np.arange(100) + 0.5) / 100).max() < 0.16, name


def test_a_switch_that_stands_out_has_an_extreme_percentile() -> None:
    """Between snapshots 19 and 20 the weights jump, across everything before or along what they have done before."""
    path = normal(30, 400, seed=8).cumsum(0) + torch.arange(30)[:, None] * normal(400, seed=9)
    for jump, expected in ((path[10] - path[0], 1.0), (normal(400, seed=10), 0.0)):
        jumped = path.clone()
        jumped[20:] += 400 * jump
        trajectory = record(flat_selection(400), jumped)[1]
        report = switching.report(trajectory, Interval(19, 20), [Interval(20, 29)], Axes(), past=True)[None]
        assert report.controls == 18  # the nineteen stretches before it, less the first, which has no past
        assert report.cosine_percentile == expected
        assert (abs(report.stretch.cosine) > report.control_cosine) == bool(expected)


def test_blocks_share_a_switch_as_their_vectors_do() -> None:
    stretch = Interval(4, 6)
    reports = switching.report(TRAJECTORY, stretch, [stretch], Axes(), past=False)
    d = PATH.numpy()[4] - PATH.numpy()[6]
    assert reports["a"].stretch.share == pytest.approx(np.square(d[:6]).sum() / np.square(d).sum())
    assert reports["a"].stretch.share + reports["b"].stretch.share == pytest.approx(1.0)
    assert math.isnan(reports[None].share_percentile)
    controls = [(i, i + 2) for i in range(11) if i + 2 <= 4 or i >= 6]
    shares = [
        np.square(PATH.numpy()[i, :6] - PATH.numpy()[j, :6]).sum() / np.square(PATH.numpy()[i] - PATH.numpy()[j]).sum()
        for i, j in controls
    ]
    assert reports["a"].control_share == pytest.approx(np.mean(shares))
    assert reports["a"].share_percentile == pytest.approx((np.array(shares) < reports["a"].stretch.share).mean())


def test_effective_groups() -> None:
    assert switching.effective_groups([0.25] * 4) == pytest.approx(4.0)
    assert switching.effective_groups([1.0, 0.0]) == 1.0
    assert math.isnan(switching.effective_groups([]))


def test_compare_without_controls_has_no_percentile() -> None:
    report = switching.compare(Stretch(0.3, 0.1, 0.2, 1.0), [])
    assert report.controls == 0 and math.isnan(report.cosine_percentile) and math.isnan(report.control_cosine)


def unit_cosine(path: Array, a: tuple[int, int], b: tuple[int, int]) -> float:
    u, v = path[a[0]] - path[a[1]], path[b[0]] - path[b[1]]
    return float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))


def test_pairwise_cosines_and_their_control() -> None:
    path, stretches = PATH.numpy(), [Interval(1, 3), Interval(2, 3), Interval(5, 6), Interval(9, 11)]
    found = switching.pairwise_cosines(TRAJECTORY.gram(), stretches)
    expected = [[unit_cosine(path, a, b) for b in stretches] for a in stretches]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    disjoint = [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]  # the first two overlap
    mean = np.mean([abs(expected[i][j]) for i, j in disjoint])
    assert switching.mean_cosine(TRAJECTORY.gram(), stretches) == pytest.approx(mean)
    controls = []
    for i, stretch in enumerate(stretches):
        rest = [b for j, b in enumerate(stretches) if (min(i, j), max(i, j)) in disjoint]
        length = stretch.last - stretch.first
        for k in range(T + 1 - length):
            free = not any(k < last and first < k + length for first, last in stretches)
            if free:
                controls.append(np.mean([abs(unit_cosine(path, (k, k + length), b)) for b in rest]))
    assert switching.control_mean_cosine(TRAJECTORY, stretches) == pytest.approx(np.mean(controls))


def test_one_switch_has_no_pair() -> None:
    assert switching.pairwise_cosines(TRAJECTORY.gram(), []).shape == (0, 0)
    assert math.isnan(switching.mean_cosine(TRAJECTORY.gram(), [Interval(1, 2)]))
    assert math.isnan(switching.control_mean_cosine(TRAJECTORY, [Interval(1, 2)]))


def test_increments_of_a_walk_are_orthogonal() -> None:
    cosines = switching.pairwise_cosines(gram_of(torch.eye(5).double().cumsum(0)), [Interval(0, 1), Interval(2, 4)])
    torch.testing.assert_close(cosines, torch.eye(2).double())


# ---------------------------------------------------------------------------------------------------- callback

# Evaluations at steps 2, 4, ..., 24: peaks at 8, 12 and 18, troughs at 10, 14 and 20.
SCORES = [0.1, 0.2, 0.3, 0.7, 0.4, 0.6, 0.2, 0.5, 0.8, 0.3, 0.5, 0.55]
PAIRS = {12: (8, 10), 16: (12, 14), 22: (18, 20)}  # declared at -> peak, trough


class Net(LightningModule):
    """Two layers on random data, with a scripted score: nothing of stories or GPTs."""

    def __init__(self, scores: list[float] | None = None) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.scores = SCORES if scores is None else scores

    def loss(self, batch: list[Tensor]) -> Tensor:
        return (self.second(self.first(batch[0]).tanh()) - batch[1]).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def batch_loss(self, batch: list[Tensor]) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        index = self.trainer.global_step // 2 - 1
        if not self.trainer.sanity_checking and index < len(self.scores):
            self.log("score", self.scores[index], logger=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def train_dataloader(self) -> DataLoader[Any]:
        # One batch over and over: where a resumed run begins to read is not the question here.
        inputs, targets = (normal(2, width, seed=width).float().repeat(48, 1) for width in (5, 3))
        return DataLoader(TensorDataset(inputs, targets), batch_size=2)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(normal(2, 5).float(), normal(2, 3).float()), batch_size=2)


class Weights(Callback):
    """Copies the recorded matrices at every snapshot, in float64."""

    def __init__(self) -> None:
        self.at: dict[int, Array] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Net)
        parts = [layer.weight.detach().double().flatten() for layer in (pl_module.first, pl_module.second)]
        self.at[trainer.global_step] = torch.cat(parts).numpy().copy()


def fit(folder: Path, *extra: Callback, net: Net | None = None, every: int = 2, **settings: Any) -> Net:
    """24 optimizer steps of two micro-batches, evaluated every second one."""
    net = Net() if net is None else net
    ckpt_path = settings.pop("ckpt_path", None)
    recorder = TrajectoryRecorder(r"(?P<group>first|second)\.weight", Schedule(every=every), name="net")
    defaults = {
        "max_steps": 24,
        "accumulate_grad_batches": 2,
        "limit_val_batches": 1,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
    }
    trainer = quiet_trainer(folder, [*extra, recorder], **{**defaults, **settings})
    trainer.fit(net, ckpt_path=ckpt_path)
    return net


def probe(**settings: Any) -> SwitchingProbe:
    return SwitchingProbe(**{"metric": "score", "prominence": 0.15, **settings})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array, dict[int, dict[str, float]]]:
    folder, weights = tmp_path_factory.mktemp("switching"), Weights()
    fit(folder, probe(), weights)  # the probe stands before the recorder
    path = np.stack([weights.at[step] for step in range(0, 25, 2)])
    return folder, path, metrics(folder)


Run = tuple[Path, Array, dict[int, dict[str, float]]]
LAYERS = {"net": slice(0, 48), "first": slice(0, 30), "second": slice(30, 48)}


def test_events_are_logged_when_they_are_certain(run: Run) -> None:
    rows = run[2]
    peaks = {step: row["switching/peak_step"] for step, row in rows.items() if "switching/peak_step" in row}
    troughs = {step: row["switching/trough_step"] for step, row in rows.items() if "switching/trough_step" in row}
    assert peaks == {10: 8, 14: 12, 20: 18}
    assert troughs == {12: 10, 16: 14, 22: 20}
    assert [rows[step]["switching/peaks"] for step in (10, 14, 20)] == [1, 2, 3]
    assert rows[10]["switching/peak_value"] == pytest.approx(0.7)


@pytest.mark.parametrize("group", ["net", "first", "second"])
def test_live_numbers_are_those_of_the_past(run: Run, group: str) -> None:
    _, path, rows = run
    logged = {step for step, row in rows.items() if f"switching/{group}/cosine" in row}
    assert logged == set(PAIRS)
    for step in logged:
        stretch = Interval(PAIRS[step][0] // 2, PAIRS[step][1] // 2)
        cosine, energy, across = by_hand(path[:, LAYERS[group]], stretch, stretch.first + 1)
        row = {name.rsplit("/", 1)[1]: value for name, value in rows[step].items() if f"switching/{group}/" in name}
        assert row["cosine"] == pytest.approx(cosine, abs=1e-5)
        assert row["transverse"] == pytest.approx(1 - cosine**2, abs=1e-5)
        assert row["energy_2_6"] == pytest.approx(energy, abs=1e-5)
        assert row["energy_2_6_across"] == pytest.approx(across, abs=1e-5)
        avoid = {p // 2 for at, (p, _) in PAIRS.items() if at <= step}
        controls = [k for k in range(1, step // 2) if k not in avoid]
        cosines = [by_hand(path[:, LAYERS[group]], Interval(k, k + 1), k + 1)[0] for k in controls]
        assert row["cosine_percentile"] == pytest.approx((np.array(cosines) < cosine).mean())
        assert row["control_cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)


def test_live_pairs_and_blocks(run: Run) -> None:
    _, path, rows = run
    assert "switching/net/pair_cosine" not in rows[12]  # the first has nothing before it
    assert rows[16]["switching/net/pair_cosine"] == pytest.approx(abs(unit_cosine(path, (6, 7), (4, 5))), abs=1e-5)
    assert rows[16]["switching/net/steps"] == 2
    shares = [rows[16][f"switching/{group}/share"] for group in ("first", "second")]
    d = path[6] - path[7]
    assert shares == pytest.approx([np.square(d[:30]).sum() / (d @ d), np.square(d[30:]).sum() / (d @ d)], abs=1e-5)
    assert rows[16]["switching/net/groups"] == pytest.approx(1 / np.square(shares).sum(), abs=1e-5)


def test_the_file_and_the_summary_hold_the_whole_run(run: Run) -> None:
    folder, path, rows = run
    result = json.loads((folder / SWITCHING_FILE).read_text())
    assert result["steps"] == list(range(2, 25, 2)) and result["values"] == pytest.approx(SCORES)
    found = [(switch["peak"], switch["trough"]) for switch in result["switches"]]
    assert found == [(8, 10), (12, 14), (18, 20)]
    for switch, (peak, trough) in zip(result["switches"], found, strict=True):
        stretch = Interval(peak // 2, trough // 2)
        cosine, energy, across = by_hand(path, stretch, len(path))
        assert switch["run"]["net"]["cosine"] == pytest.approx(cosine, abs=1e-5)
        assert switch["run"]["net"]["energy_2_6"] == pytest.approx(energy, abs=1e-5)
        assert switch["run"]["net"]["energy_2_6_across"] == pytest.approx(across, abs=1e-5)
        assert switch["past"]["first"]["cosine"] == pytest.approx(
            by_hand(path[:, :30], stretch, stretch.first + 1)[0], abs=1e-5
        )
    mean = np.mean([switch["run"]["net"]["cosine"] for switch in result["switches"]])
    assert rows[24]["switching/net/run_cosine"] == pytest.approx(mean)
    assert rows[24]["switching/switches"] == 3
    pair = result["pairwise"]["cosines"][0][2]
    assert pair == pytest.approx(unit_cosine(path, (4, 5), (9, 10)), abs=1e-5)
    assert rows[24]["switching/net/run_pair_cosine"] == pytest.approx(result["pairwise"]["mean"])
    assert rows[24]["switching/net/run_pair_control"] == pytest.approx(result["pairwise"]["control_mean"])
    assert result["switches"][0]["run"]["net"]["share_percentile"] is None  # NaN is no JSON


def test_the_whole_run_ends_with_its_last_snapshot(tmp_path: Path) -> None:
    """Which the recorder takes when training ends, after this callback's turn."""
    fit(tmp_path, probe(), weights := Weights(), max_steps=23)
    path = np.stack([weights.at[step] for step in (*range(0, 23, 2), 23)])
    switch = json.loads((tmp_path / SWITCHING_FILE).read_text())["switches"][2]
    expected = by_hand(path, Interval(9, 10), len(path))[0]
    assert switch["run"]["net"]["cosine"] == pytest.approx(expected, abs=1e-6)
    assert abs(expected - by_hand(path[:-1], Interval(9, 10), len(path) - 1)[0]) > 1e-4  # it makes a difference


def test_the_fisher_is_measured_along_the_latest_switch(tmp_path: Path) -> None:
    """The quotient along theta(trough) - theta(peak), by brute force on the one batch that there is."""
    weights, net = Weights(), Net()
    copies: dict[int, Any] = {}

    class Copies(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            copies[trainer.global_step] = {k: v.detach().clone() for k, v in pl_module.state_dict().items()}

    fisher = FisherProbe(Schedule(every=2), batches=2, spectrum=False)
    fit(tmp_path, fisher, probe(), weights, Copies(), net=net)
    logged = metrics(tmp_path)
    found = json.loads((tmp_path / SWITCHING_FILE).read_text())["switches"]
    step, value = max(
        (step, row["fisher/net/batch_mean/q_switch"])
        for step, row in logged.items()
        if "fisher/net/batch_mean/q_switch" in row
    )
    twin = Net()
    twin.load_state_dict(copies[step])
    batch = next(iter(twin.train_dataloader()))
    grads = torch.autograd.grad(twin.loss(batch), [twin.first.weight, twin.second.weight])
    g = torch.cat([grad.double().flatten() for grad in grads]).numpy()
    quotients = []
    for switch in found:
        line = weights.at[switch["trough"]] - weights.at[switch["peak"]]
        quotients.append(float((g @ line) ** 2 / (line @ line)))
    assert sum(value == pytest.approx(q, rel=1e-3) for q in quotients) == 1, (value, quotients)


def test_measuring_does_not_change_training(tmp_path: Path) -> None:
    with_probe = fit(tmp_path / "with", probe())
    without = fit(tmp_path / "without")
    assert same(with_probe.state_dict(), without.state_dict())


@pytest.mark.parametrize("at", [9, 12, 13, 16, 19, 20])
def test_a_resumed_run_says_the_same(run: Run, tmp_path: Path, at: int) -> None:
    fit(tmp_path, probe(), checkpoints(tmp_path), max_steps=at)
    fit(tmp_path, probe(), ckpt_path=tmp_path / "checkpoints" / f"{at:06d}.ckpt")
    assert (tmp_path / SWITCHING_FILE).read_text() == (run[0] / SWITCHING_FILE).read_text()
    resumed = metrics(tmp_path)
    for step, row in run[2].items():
        if step > at:
            assert {k: v for k, v in row.items() if "switching" in k} == {
                k: v for k, v in resumed[step].items() if "switching" in k
            }


def test_only_the_past_is_taken_up_from_the_file(run: Run, tmp_path: Path) -> None:
    fit(tmp_path, probe(), checkpoints(tmp_path))  # to the end: the file knows everything
    (tmp_path / "metrics.csv").unlink()
    fit(tmp_path, probe(), ckpt_path=tmp_path / "checkpoints" / "000012.ckpt")
    found = {step for step, row in metrics(tmp_path).items() if "switching/peak_step" in row}
    assert found == {14, 20}


@pytest.mark.parametrize("content", ["", "{}", '{"metric": "other", "steps": [2, 4, 6], "values": [0, 0, 0]}', "[1]"])
def test_a_foreign_file_is_not_taken_up(tmp_path: Path, content: str) -> None:
    fit(tmp_path, probe(), checkpoints(tmp_path), max_steps=6)
    (tmp_path / SWITCHING_FILE).write_text(content)
    fit(tmp_path, watcher := probe(), ckpt_path=tmp_path / "checkpoints" / "000006.ckpt", max_steps=8)
    assert watcher.state_dict()["steps"] == [2, 4, 8]  # the evaluation at the checkpoint's step is lost


def test_the_file_of_another_past_is_not_taken_up(tmp_path: Path) -> None:
    fit(tmp_path, probe(), checkpoints(tmp_path), max_steps=6)
    file = tmp_path / SWITCHING_FILE
    file.write_text(file.read_text().replace("0.2", "0.25", 1))
    fit(tmp_path, watcher := probe(), ckpt_path=tmp_path / "checkpoints" / "000006.ckpt", max_steps=8)
    assert watcher.state_dict()["steps"] == [2, 4, 8]


def test_a_crash_leaves_the_events_so_far(tmp_path: Path) -> None:
    class Crash(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 13:
                raise KeyError("crash")

    with pytest.raises(KeyError, match="crash"):
        fit(tmp_path, probe(), Crash())
    result = json.loads((tmp_path / SWITCHING_FILE).read_text())
    assert [(event["kind"], event["step"], event["declared"]) for event in result["events"]] == [
        ("peak", 8, 10),
        ("trough", 10, 12),
    ]


def test_evaluations_between_snapshots_count_for_the_one_before(tmp_path: Path) -> None:
    fit(tmp_path, probe(), every=4)
    switches = json.loads((tmp_path / SWITCHING_FILE).read_text())["switches"]
    # 8 -> 10 lies within one interval of snapshots, and so has no direction
    assert [(s["peak"], s["trough"], s["snapshots"]) for s in switches] == [(18, 20, [16, 20])]


def test_a_run_without_events_writes_an_empty_list(tmp_path: Path) -> None:
    fit(tmp_path, probe(), net=Net([0.1] * 12))
    result = json.loads((tmp_path / SWITCHING_FILE).read_text())
    assert result["events"] == [] and result["switches"] == [] and result["pairwise"]["mean"] is None
    assert metrics(tmp_path)[24]["switching/switches"] == 0


def test_values_that_are_not_finite_are_passed_over(tmp_path: Path) -> None:
    scores = [0.1, 0.2, math.nan, 0.7, 0.4, 0.6]
    fit(tmp_path, watcher := probe(), net=Net(scores), max_steps=12)
    assert [event.step for event in watcher.events] == [8, 10]
    assert json.loads((tmp_path / SWITCHING_FILE).read_text())["steps"] == [2, 4, 8, 10, 12]


def test_two_evaluations_at_one_step_count_once(tmp_path: Path) -> None:
    fit(tmp_path, watcher := probe(), val_check_interval=1, max_steps=3)  # after every micro-batch
    assert watcher.state_dict()["steps"] == [0, 1, 2, 3]


def test_sanity_checks_and_validate_are_no_evaluations(tmp_path: Path) -> None:
    watcher = probe()
    fit(tmp_path, watcher, num_sanity_val_steps=1, max_steps=4)
    assert watcher.state_dict() == {"steps": [2, 4], "values": pytest.approx(SCORES[:2])}
    quiet_trainer(tmp_path, [alone := probe()], limit_val_batches=1).validate(Net(), verbose=False)
    assert alone.state_dict() == {"steps": [], "values": []}


def test_an_unknown_metric_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"watches 'scores'.*such as score\b") as caught:
        fit(tmp_path, SwitchingProbe("scores"), max_steps=2)
    assert "\n" not in str(caught.value)


def test_a_recorder_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SwitchingProbe needs a TrajectoryRecorder"):
        quiet_trainer(tmp_path, [probe()], max_steps=1).fit(Net())


@pytest.mark.parametrize("wrong", [{"prominence": -0.1}, {"prominence": math.nan}, {"reach": 0}, {"controls": 0}])
def test_options_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="SwitchingProbe needs prominence >= 0"):
        probe(**wrong)


def test_the_estimate_says_that_it_is_cheap() -> None:
    estimate = probe().estimate(steps=10_000, dim=25_000_000)
    assert estimate.passes == 0 and estimate.bytes < 1e6
