"""Figures of runs beside their nulls, of what probes and replays measured, and of several runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import one_line_error
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from report_runs import (
    ADAMW,
    BLOCKS,
    DECAY,
    Array,
    config,
    decaying_path,
    learning_curve,
    path_of,
    ratios,
    walk_path,
    write_replay,
    write_run,
)

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures import plotting
from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.trajectory import Rates
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report import families, figures
from mini_gpt_pl.report.calibration import calibrate_run
from mini_gpt_pl.report.findings import findings
from mini_gpt_pl.report.path_tables import path_tables
from mini_gpt_pl.report.probe_tables import fisher_survey
from mini_gpt_pl.report.published import NOTHING
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.report.summary import headline, lines, verdicts
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study import beta2, learning, optimizers, overlays, reheats, switching
from mini_gpt_pl.stories.study import replayed as of_replays
from mini_gpt_pl.stories.study import runs as kinds
from mini_gpt_pl.stories.study.contents import COMPARISON_FIGURES, RUN_FIGURES
from mini_gpt_pl.stories.study.runs import lambda_change

STEPS = [0, 100, 250, 400, 600, 700, 900]
WEIGHTS: Array = path_of(STEPS).numpy()
SURVIVAL = np.array([DECAY**step for step in STEPS])
PATHS = {"walk": walk_path(WEIGHTS), "decaying walk": decaying_path(WEIGHTS, SURVIVAL), "measured": WEIGHTS}
CURVE = {100: (3.0, 0.1), 400: (2.0, 0.6), 700: (1.5, 0.3), 900: (1.75, 0.2)}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path / "run", STEPS, metrics=learning_curve(CURVE))


def drifts(path: Array) -> Array:
    found: Array = (path - path[0])[1:]
    return found


def first(rows: Array) -> Array:
    """Leading right singular vector, turned so that the last row has a positive coordinate."""
    v: Array = np.linalg.svd(rows)[2][0]
    return v if rows[-1] @ v > 0 else -v


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def line(axes: Axes, label: str) -> Line2D:
    """The one line of this label that has data."""
    found = [part for part in axes.lines if part.get_label() == label and len(np.asarray(part.get_xdata()))]
    assert len(found) == 1, [part.get_label() for part in axes.lines]
    return found[0]


def x(part: Line2D) -> Array:
    return np.asarray(part.get_xdata(), dtype=float)


def y(part: Line2D) -> Array:
    return np.asarray(part.get_ydata(), dtype=float)


def bars(axes: Axes, label: str) -> tuple[Array, Array, Array]:
    """Positions, values and upper half lengths of the error bars of one label."""
    (found,) = [c for c in axes.containers if isinstance(c, ErrorbarContainer) and c.get_label() == label]
    data, _, (spreads,) = found.lines
    assert data is not None
    ends = np.array([segment[:, 1] for segment in spreads.get_segments()])
    return x(data), y(data), ends[:, 1] - y(data)


# -------------------------------------------------------------------------------------------- beside the nulls


def test_blocks_show_the_first_share_of_each_group_and_of_both_walks(run: Run) -> None:
    for axes, unit in zip(figures.blocks(run).axes, (False, True), strict=True):
        for label in PATHS:
            expected = []
            for part in (*BLOCKS.slices, slice(None)):
                own = WEIGHTS[:, part]
                path = {"walk": walk_path(own), "decaying walk": decaying_path(own, SURVIVAL), "measured": own}[label]
                expected.append(100 * ratios(drifts(path), unit=unit)[0])
            np.testing.assert_allclose(y(line(axes, label)), expected, rtol=1e-9)


def test_every_calibrated_number_stands_beside_its_nulls_with_its_excess_and_interval(run: Run) -> None:
    found = calibrate_run(run)
    shares, excesses, counts, count_excesses = figures.against_nulls(run).axes
    counted = ("k95", "k99", "k95_unit", "k99_unit", "participation", "participation_updates")
    lengths = ("drift", "drift_corrected", "coordinate", "residual")  # they have no place on these axes
    of_registry = [name for name in statistics() if name in found and name not in lengths]
    shown = sorted(of_registry, key=lambda name: name in counted)
    assert set(shown) | set(lengths) == set(found)
    for label, pick in (("walk", "walk"), ("decaying walk", "decay"), ("measured", "value")):
        drawn = np.concatenate([y_of(shares, label), y_of(counts, label)])
        np.testing.assert_allclose(drawn, [getattr(found[name], pick) for name in shown])
    drawn = np.concatenate([y_of(excesses, "measured"), y_of(count_excesses, "measured")])
    np.testing.assert_allclose(drawn, [found[name].excess for name in shown])
    intervals = [tuple(x(part)) for part in (*excesses.lines, *count_excesses.lines) if part.get_linewidth() == 5]
    assert intervals == [(found[n].low, found[n].high) for n in shown if not math.isnan(found[n].low)]


def y_of(axes: Axes, label: str) -> Array:
    """The numbers of a dot plot lie along its x axis."""
    return x(line(axes, label))


def test_cosines_of_updates_are_those_of_the_increments(run: Run) -> None:
    images = [part for axes in figures.update_cosines(run).axes[:2] for part in axes.collections]
    for image, path in zip(images, (PATHS["measured"], PATHS["decaying walk"]), strict=True):
        assert isinstance(image, QuadMesh)
        steps = np.diff(path, axis=0)
        expected = [[cosine(a, b) for b in steps] for a in steps]
        np.testing.assert_allclose(np.asarray(image.get_array()), expected, atol=1e-9)


def test_initial_weights_show_the_pull_of_decay_and_what_is_left(run: Run) -> None:
    left, right = figures.initial_weights(run).axes
    for label in ("measured", "decaying walk"):
        rows = drifts(PATHS[label])
        expected = [cosine(first(rows[:k]), PATHS[label][0]) for k in range(1, len(rows) + 1)]
        np.testing.assert_allclose(y(line(left, label)), expected, atol=1e-9)
    kept = WEIGHTS @ WEIGHTS[0] / (WEIGHTS[0] @ WEIGHTS[0])
    np.testing.assert_allclose(y(right.lines[0]), kept, atol=1e-9)
    np.testing.assert_allclose(y(line(right, "weight decay alone")), SURVIVAL)


def test_too_short_a_path_has_no_pairs_of_updates(tmp_path: Path) -> None:
    with one_line_error("2 snapshots"):
        figures.update_cosines(write_run(tmp_path / "short", STEPS[:2]))


def test_where_decay_is_unknown_figures_say_so_and_numbers_have_no_excess(run: Run) -> None:
    unknown = replace(run.trajectory, survival=[1.0, *[math.nan] * (len(STEPS) - 1)])
    unknown.save(run.path / "trajectory.safetensors")
    subject = Subject.of(Run(run.path))
    drawn = {name: figures.drawn(draw, subject) for name, draw in figures.RUN_FIGURES.items()}
    said = {name: "decay took is not known" in figure.get_suptitle() for name, figure in drawn.items() if figure}
    beside_decay = {"spectrum", "backbone", "alignment", "growth", "against_nulls", "initial_weights", "blocks"}
    assert {name for name, says in said.items() if says} == beside_decay | {"update_cosines"}
    known_one = figures.drawn(figures.backbone, Subject.of(run))
    assert known_one is not None and known_one.get_suptitle() == ""
    numbers, known = subject.calibrate(), calibrate_run(run)
    assert all(math.isnan(one.decay) and math.isnan(one.low) for one in numbers.values())
    for name in ("pc1", "k95_unit", "drift", "update_alignment_past", "windows_self_anchored"):
        if name in numbers:
            assert (numbers[name].value, numbers[name].walk) == (known[name].value, known[name].walk)
    made = {table.name: table for table in path_tables(subject, NOTHING)}
    assert set(made) == {table.name for table in path_tables(Subject.of(run), NOTHING)}
    assert "excess" not in made["overview"].columns and "walk" in made["overview"].columns
    words = [*(row["value"] for row in lines(subject)), *verdicts(subject), *headline(subject).facts.values()]
    assert "not known" in words and not any("nan" in text for text in words)
    assert "is not known" in headline(subject).found
    assert not any("decaying walk" in finding.topic for finding in findings([subject, subject]))


def test_several_rates_of_decay_have_the_walk_of_their_parts(run: Run) -> None:
    lengths = run.trajectory.grams.diagonal(dim1=1, dim2=2)
    squares = torch.diag_embed(lengths.T).permute(1, 2, 0)  # each group has a rate of its own, and the first none
    rates = Rates(torch.stack([torch.ones(len(STEPS)).double(), torch.tensor(SURVIVAL)]), squares)
    replace(run.trajectory, rates=rates).save(run.path / "trajectory.safetensors")
    subject = Subject.of(Run(run.path), bootstrap=0)
    walk = subject.trajectory.decaying_walk()
    assert torch.equal(subject.paths().decaying, walk)
    numbers, expected = subject.calibrate(), pca.pca(walk, pca.drifts(len(STEPS))[1:]).pc1
    assert numbers["pc1"].decay == pytest.approx(expected) != pytest.approx(calibrate_run(run)["pc1"].decay)
    free = subject.calibrate("blocks.0")["pc1"]
    assert free.decay == pytest.approx(free.walk)


# ------------------------------------------------------------------------------------------------ common marks


def test_the_lowest_validation_loss_is_starred(run: Run) -> None:
    star = line(learning.figure(run).axes[0], "best validation: step 700")
    assert (x(star)[0], y(star)[0]) == (700, 1.5)


@pytest.mark.parametrize(("step", "marked"), [(400, True), (900, False), (4000, False)])
def test_the_change_of_lambda_is_marked_where_it_lies_within_the_run(run: Run, step: int, marked: bool) -> None:
    run.config["model"]["probe_weight"]["switch_step"] = step
    assert lambda_change(run) == (plotting.Change(step, "λ: 2 → 4") if marked else None)
    for axes in figures.backbone(run).axes[:2]:
        at = [x(part) for part in axes.lines if part.get_color() == plotting.CHANGE]
        assert [list(found) for found in at] == ([[step, step]] if marked else [])


def test_over_fitting_is_shaded_from_the_lowest_loss_on(run: Run, tmp_path: Path) -> None:
    left, right = learning.figure(run).axes
    for axes in (left, right):
        (shade,) = [part for part in axes.patches if isinstance(part, Rectangle)]
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == (700, 900)
    assert list(y(line(left, "best validation: step 700"))) == [1.5]
    assert "over-fitting: +0.25 since" in left.get_legend_handles_labels()[1]
    steady = write_run(
        tmp_path / "steady", STEPS, metrics=learning_curve({100: (3.0, 0.1), 400: (2.0, 0.6), 900: (2.01, 0.2)})
    )
    assert not learning.figure(steady).axes[0].patches  # half a per cent is noise


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_a_layout_made_once_is_that_of_every_file(run: Run, kind: str) -> None:
    once, anew = figures.backbone(run), figures.backbone(run)
    plotting.lay_out(once)
    places = [axes.get_position().bounds for axes in once.axes]
    plotting.render(once, kind)
    anew.draw_without_rendering()
    assert [axes.get_position().bounds for axes in once.axes] == places
    np.testing.assert_allclose(places, [axes.get_position().bounds for axes in anew.axes], atol=2e-3)


def test_a_weight_that_stays_is_no_change(run: Run) -> None:
    run.config["model"]["probe_weight"] = {"first": 2.0, "second": 2.0, "switch_step": 400}
    assert lambda_change(run) == plotting.Change(400, "")


def test_a_bar_never_reaches_zero_on_a_logarithmic_axis() -> None:
    axes = Figure().subplots()
    axes.set_yscale("log")
    plotting.dots(axes, [1.0], [2.0], [5.0], label="a")
    (container,) = axes.containers
    assert isinstance(container, ErrorbarContainer)
    low, high = container.lines[2][0].get_segments()[0][:, 1]
    assert 0 < low < 2 and high == 7


@pytest.mark.parametrize(("tops", "scale"), [((1, 2, 3), "linear"), ((1, 2, 1000), "log"), ((-1, 2, 1000), "symlog")])
def test_one_dwarfing_curve_makes_the_axis_logarithmic(tops: Sequence[float], scale: str) -> None:
    axes = Figure().subplots()
    for top in tops:
        axes.plot([0, 1], [top, top])
    assert plotting.log_if_dwarfed(axes) == (scale != "linear")
    assert axes.get_yscale() == scale


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_the_same_run_draws_the_same_bytes(run: Run, kind: str) -> None:
    first_time, second_time = (plotting.render(learning.figure(run), kind) for _ in range(2))
    assert first_time == second_time


# ------------------------------------------------------------------------------------------ probes and replays


def replay_record(scale: float = 1.0, event: str | None = None) -> dict[str, Any]:
    """What a replay writes, with numbers that tell labels and quantities apart."""
    names = (*BLOCKS.groups, "trunk")
    pair = {name: [scale * (k + 1), 0.5 * (k + 1)] for k, name in enumerate(names)}
    gradient = {
        part: {name: {"abs_cos": [factor * scale * 1e-2, factor * 1e-3]} for name in names}
        for part, factor in (("combined", 1), ("lm", 2), ("probe", 3))
    }
    directions = {"backbone": [4.0 * scale, 0.4], "pc2": [8.0, 0.8], "switch": [2.0, 0.2], "theta0": [1.0, 0.1]}
    curvature = {"q": directions, "trace": [30.0, 3.0], "random": 2.0, "anisotropy": [2.0 * scale, 0.2]}
    return {
        "event": event,
        "gradient": gradient,
        "bias": pair,
        "interference": pair,
        "fisher": dict.fromkeys(names, curvature),
        "logit_lens": {"in": [0.0, 0.25, 0.5 * scale], "ood": [0.0, 0.125, 0.25]},
    }


@pytest.fixture
def replayed(run: Run) -> Run:
    write_replay(run, 400, replay_record(event="peak"))
    write_replay(run, 900, replay_record(2.0, event="trough"))
    return run


def test_replayed_gradients_stand_above_the_noise_floor(replayed: Run) -> None:
    (axes,) = figures.gradients(replayed).axes
    for label, factor in (("combined", 1), ("LM", 2), ("probe", 3)):
        steps, mean, spread = bars(axes, f"{label}, mean and sd of batches")
        np.testing.assert_allclose((steps, mean), ([400, 900], [factor * 1e-2, factor * 2e-2]))
        np.testing.assert_allclose(spread, factor * 1e-3)
    floor = math.sqrt(2 / math.pi / BLOCKS.dim)
    np.testing.assert_allclose(y(line(axes, f"isotropic noise, {floor:.1e}")), floor)


def test_without_a_replay_live_gradients_are_shown(run: Run) -> None:
    (run.path / "metrics.csv").write_text("step,alignment/trunk/gradient,probe/p_ood\n100,-0.5,0.1\n400,0.25,0.2\n")
    (axes,) = figures.gradients(run).axes
    assert list(y(line(axes, "combined, single batches"))) == [0.5, 0.25]
    assert "of the past, live" in axes.get_title()


def test_replayed_gradients_join_the_updates_in_the_second_figure(replayed: Run) -> None:
    (axes,) = figures.alignment(replayed).axes
    steps, mean, _ = bars(axes, "replayed gradient, |cos| with whole-run $v_b$")
    np.testing.assert_allclose((steps, mean), ([400, 900], [1e-2, 2e-2]))


def test_the_band_of_updates_spans_both_walks(run: Run) -> None:
    (axes,) = figures.alignment(run).axes
    for label, name in (("random directions, whole-run $v_b$", "walk"), ("the same, decaying", "decaying walk")):
        steps, v = np.diff(PATHS[name], axis=0), first(drifts(PATHS[name]))
        np.testing.assert_allclose(y(line(axes, label)), [cosine(step, v) for step in steps], atol=1e-9)


def test_curvature_is_in_units_of_its_mean_over_all_directions(replayed: Run) -> None:
    top, bottom = figures.fisher(replayed).axes
    scale = 30.0 / BLOCKS.dim
    for label, values, error in (
        ("$v_b$", [4.0, 8.0], 0.4),
        ("PC2", [8.0, 8.0], 0.8),
        ("$v_{sw}$", [2.0, 2.0], 0.2),
        ("$\\theta_0$", [1.0, 1.0], 0.1),
    ):
        steps, drawn, spread = bars(top, label)
        np.testing.assert_allclose(steps, [400, 900])
        np.testing.assert_allclose(drawn, np.array(values) / scale)
        np.testing.assert_allclose(spread, error / scale)
    assert list(y(line(top, "random directions"))) == [1, 1]
    np.testing.assert_allclose(bars(bottom, "$\\alpha=q(v_b)$ over its mean across $v_b$")[1], [2.0, 4.0])
    assert list(y(line(bottom, "isotropic"))) == [1, 1]
    assert bottom.get_yscale() == "linear"


def test_live_curvature_serves_where_nothing_was_replayed(run: Run) -> None:
    names = [f"fisher/trunk/batch_mean/{name}" for name in ("q_backbone", "q_backbone_se", "trace", "anisotropy")]
    (run.path / "metrics.csv").write_text(f"step,{','.join(names)}\n400,4.0,0.4,30.0,40.0\n")
    assert fisher_survey(Subject.of(run))[400]["q_backbone"] == (4.0, 0.4)
    top, bottom = figures.fisher(run).axes
    np.testing.assert_allclose(bars(top, "$v_b$")[1], 4.0 * BLOCKS.dim / 30.0)
    assert bottom.get_yscale() == "log"  # 40 and 1 on one axis


def test_signed_bias_and_its_sum_over_checkpoints(replayed: Run) -> None:
    left, right = of_replays.signed_bias_figure(replayed).axes
    for k, name in enumerate(BLOCKS.groups, 1):
        assert list(y(line(left, name))) == [k, 2 * k]
        assert list(y(right.lines[k - 1])) == [k, 3 * k]


def test_the_logit_lens_shows_every_layer_and_chance(replayed: Run) -> None:
    inside, outside = of_replays.logit_lens_figure(replayed).axes
    assert list(y(line(inside, "900, trough"))) == [0.0, 0.25, 1.0]
    assert list(y(line(outside, "400, peak"))) == [0.0, 0.125, 0.25]
    np.testing.assert_allclose(y(line(inside, "chance, 1/512")), 1 / 512)


def test_switches_stand_beside_their_controls(run: Run) -> None:
    side = {"trunk": {"cosine": -0.5, "control_cosine": 0.25}}
    switch = {"peak": 400, "trough": 900, "run": side, "past": {"trunk": {"cosine": 0.125, "control_cosine": None}}}
    other = {"peak": 900, "trough": 950}  # declared too late to be measured
    events = [{"kind": "peak", "step": 400, "value": 0.6}, {"kind": "trough", "step": 900, "value": 0.2}]
    record = {"metric": "p", "steps": [100, 400], "values": [0.1, 0.6], "events": events, "switches": [switch, other]}
    (run.path / "switching.json").write_text(json.dumps(record))
    top, bottom = switching.figure(run).axes
    assert (x(line(top, "peak"))[0], y(line(top, "trough"))[0]) == (400, 0.2)
    whole = line(bottom, "whole-run $v_b$ (contains it)")
    assert (x(whole)[0], y(whole)[0]) == (650, 0.5)
    assert next(y(part)[0] for part in bottom.lines if part.get_label() == "its controls, mean") == 0.25


@pytest.mark.parametrize(
    "draw",
    [RUN_FIGURES[name] for name in ("gradients", "fisher", "signed_bias", "switching", "logit_lens", "reheating")],
)
def test_what_was_not_measured_is_one_line(run: Run, draw: Callable[[Run], Figure]) -> None:
    with one_line_error("run"):
        draw(run)


def reheat(folder: Path, curve: str, **record: Any) -> Run:
    run = write_run(folder, STEPS, metrics=curve)
    (run.path / "reheat.json").write_text(json.dumps(record))
    return run


def test_reheats_go_on_from_their_parent(run: Run, tmp_path: Path) -> None:
    known = {"parent": str(run.path), "parent_step": 900, "steps": 1000}
    warm = reheat(
        tmp_path / "warm", learning_curve({0: (2, 0.2), 50: (2, 0.7), 90: (2, 0.5)}), lr=6e-4, gain=0.5, **known
    )
    control = reheat(tmp_path / "control", learning_curve({0: (2, 0.2), 90: (2, 0.1)}), factor=1.0, **known)
    (axes,) = reheats.figure([run, warm, control]).axes
    assert list(y(line(axes, "parent, run: best 0.600 at 400"))) == [0.1, 0.6, 0.3, 0.2]
    assert list(x(line(axes, "lr 6e-4: G = +0.500, ended at 900"))) == [900, 950, 990]
    assert line(axes, "control, ended at 900").get_linestyle() == "--"
    assert axes.get_xlim() == pytest.approx((900 - 90 - 2.7, 990 + 2.7))
    stars = [(x(part)[0], y(part)[0]) for part in axes.lines if part.get_marker() == "*"]
    assert stars == [(950, 0.7), (900, 0.2)]
    assert [list(x(p)) for p in axes.lines if p.get_color() == plotting.CHANGE] == [[900, 900]]


def test_a_reheat_whose_parent_is_gone_is_shown_alone(run: Run, tmp_path: Path) -> None:
    lone = reheat(tmp_path / "lone", learning_curve({0: (2, 0.2)}), parent=str(tmp_path / "gone"), factor=3.0)
    (axes,) = reheats.figure([lone]).axes
    assert list(x(line(axes, "the parent's rate × 3"))) == [0]
    assert not [part for part in axes.lines if "parent," in str(part.get_label())]


# -------------------------------------------------------------------------------------------------- several


def member(folder: Path, name: str, seed: int = 42, optimizer: str = "torch.optim.AdamW", **settings: Any) -> Run:
    made = config(optimizer, {**ADAMW, **settings} if optimizer.endswith("AdamW") else settings, seed)
    return write_run(folder / name, STEPS, path_of(STEPS, seed=sum(map(ord, name))), made, learning_curve(CURVE))


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    sgd: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    return [
        member(tmp_path, "low", betas=[0.9, 0.8]),
        member(tmp_path, "base"),
        member(tmp_path, "other", seed=271),
        member(tmp_path, "free", weight_decay=0.0),
        member(tmp_path, "sgd", optimizer="torch.optim.SGD", **sgd),
    ]


def names_of(chosen: Sequence[Run]) -> list[str]:
    return [run.path.name for run in chosen]


def test_runs_are_grouped_by_what_differs(runs: list[Run]) -> None:
    assert names_of(families.seeds_of(runs)) == ["base", "other"]
    base = runs[names_of(runs).index("base")]
    assert names_of(families.seeds_of([*runs, base])) == ["base", "other"]  # a seed that ran twice is drawn once
    assert names_of(kinds.beta2_of(runs)) == ["base", "other", "low"]
    # Of the three with AdamW and decay, the one with the beta2 and the seed of most.
    assert sorted(names_of(kinds.optimizers_of(runs))) == ["base", "free", "sgd"]
    assert families.seeds_of(runs[:2]) == kinds.optimizers_of(runs[:3]) == kinds.beta2_of(runs[1:3]) == []


def test_optimizers_of_other_lengths_belong_together(runs: list[Run], tmp_path: Path) -> None:
    short = config("torch.optim.SGD", {"lr": 1e-3, "weight_decay": 0.5}, 42)
    short["trainer"]["max_steps"] = 2000
    added = write_run(tmp_path / "short", STEPS[:4], path_of(STEPS[:4]), short, learning_curve({100: (3.0, 0.1)}))
    assert names_of(kinds.optimizers_of([*runs[:2], added])) == ["base", "short"]
    loss = optimizers.figure([*runs[:2], added]).axes[1]
    assert [list(x(part)) for part in loss.lines] == [list(CURVE), [100]]


def test_optimizers_are_told_with_beta2_where_it_differs(runs: list[Run]) -> None:
    assert kinds.optimizer_labels([runs[1], runs[3], runs[4]]) == [
        "AdamW, lr 1e-3, decay 0.5",
        "AdamW, lr 1e-3, decay 0",
        "SGD, lr 0.1, momentum 0.9, decay 0.05",
    ]
    assert kinds.optimizer_labels(runs[:2]) == [
        "AdamW, lr 1e-3, decay 0.5, β₂ 0.8",
        "AdamW, lr 1e-3, decay 0.5, β₂ 0.95",
    ]


def diverged(folder: Path, **settings: Any) -> Run:
    run = member(folder, "wild", betas=[0.9, 0.0], **settings)
    write_run(run.path, STEPS[:4], 1e4 * path_of(STEPS[:4], seed=5), run.config, learning_curve({100: (1e4, 0.0)}))
    (run.path / "outcome.json").write_text('{"state": "diverged", "step": 300}')
    return Run(run.path)


@pytest.mark.parametrize("draw", [overlays.overview, beta2.curves])
def test_a_run_that_diverged_is_clipped_and_said_to_be(
    runs: list[Run], tmp_path: Path, draw: Callable[[Sequence[Run]], Figure]
) -> None:
    chosen = [runs[0], runs[1]]
    alone, together = draw(chosen), draw([*chosen, diverged(tmp_path)])
    for before, after in zip(alone.axes, together.axes, strict=True):
        assert after.get_ylim() == before.get_ylim() and after.get_xlim() == before.get_xlim()
        assert after.get_yscale() == "linear"
        assert len(after.lines) > len(before.lines)
    said = [text.get_text() for text in together.legends[0].get_texts()]
    assert sum("(diverged at step 300: clipped)" in text for text in said) == 1


def test_shares_of_a_run_that_diverged_are_not_drawn(runs: list[Run], tmp_path: Path) -> None:
    left, right = beta2.pc1([runs[0], runs[1], diverged(tmp_path)]).axes
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["0.95", "0.8", "0"]
    assert max(x(part)[0] for part in left.lines) < 1.5
    assert [note.get_text() for note in (*left.texts, *right.texts)] == ["diverged", "diverged"]
    assert len(optimizers.matched_loss([runs[0], runs[1], diverged(tmp_path)]).axes[0].lines) == 2


def test_many_runs_have_colours_and_lines_of_their_own(tmp_path: Path) -> None:
    many = [member(tmp_path, f"r{k}", seed=k) for k in range(len(plotting.DISTINCT) + 1)]
    figure = overlays.overview(many)
    drawn = [(part.get_color(), part.get_linestyle()) for part in figure.axes[0].lines]
    assert len(set(drawn)) == len(many) and len({colour for colour, _ in drawn}) == len(plotting.DISTINCT)
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == [*(run.path.name for run in many), "decaying walk of each"]


def test_beta2_has_its_excess_beside_its_null(runs: list[Run]) -> None:
    left, right = beta2.pc1(runs).axes
    chosen = kinds.beta2_of(runs)
    for name, label in (("pc1", "raw"), ("pc1_unit", "unit rows")):
        found = [calibrate_run(run)[name] for run in chosen]
        drawn = [y(part)[0] for part in left.lines if part.get_label() == f"PC1, {label}"]
        np.testing.assert_allclose(drawn, [100 * one.value for one in found])
        excesses = [y(part)[0] for part in right.lines if len(x(part)) == 1]
        assert set(np.round([100 * one.excess for one in found], 9)) <= set(np.round(excesses, 9))
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["0.95", "0.8"]


def test_seeds_show_the_path_and_its_null(runs: list[Run]) -> None:
    a, r, fraction, p_ood = overlays.seeds(runs).axes
    for k, run in enumerate((runs[1], runs[2])):
        weights = path_of(STEPS, seed=sum(map(ord, run.path.name))).numpy()
        for path, offset in ((weights, 0), (decaying_path(weights, SURVIVAL), 1)):
            rows = drifts(path)
            along = rows @ first(rows)
            across = np.linalg.norm(rows - np.outer(along, first(rows)), axis=1)
            np.testing.assert_allclose(y(a.lines[2 * k + offset]), along, rtol=1e-7)
            np.testing.assert_allclose(y(r.lines[2 * k + offset]), across, atol=1e-6)
            whole = (rows**2).sum(1)
            np.testing.assert_allclose(y(fraction.lines[2 * k + offset]), along**2 / whole, rtol=1e-7)
        assert list(y(p_ood.lines[k])) == [0.1, 0.6, 0.3, 0.2]


def test_optimizers_show_the_share_beside_both_walks(runs: list[Run]) -> None:
    bars_of, *_ = optimizers.figure(runs).axes
    found = [calibrate_run(run, bootstrap=0)[name] for run in kinds.optimizers_of(runs) for name in ("pc1", "pc1_unit")]
    heights = np.array([part.get_height() for part in bars_of.patches if isinstance(part, Rectangle)])
    np.testing.assert_allclose(heights, np.array([100 * one.value for one in found]))
    for marker, pick in (("x", "walk"), ("d", "decay")):
        drawn = [y(part)[0] for part in bars_of.lines if part.get_marker() == marker]
        np.testing.assert_allclose(drawn, [100 * getattr(one, pick) for one in found])


def test_matched_loss_pairs_values_of_one_step(runs: list[Run], tmp_path: Path) -> None:
    astray = member(tmp_path, "astray", seed=3)
    (astray.path / "metrics.csv").write_text(learning_curve({100: (9000.0, 0.0), 400: (2.5, 0.0)}))
    left, right = optimizers.matched_loss([runs[1], astray]).axes
    assert list(zip(x(left.lines[0]), y(left.lines[0]), strict=True)) == [
        (3.0, 0.1),
        (2.0, 0.6),
        (1.5, 0.3),
    ]  # not at 1.75, to which it rose again
    assert list(x(left.lines[1])) == [2.5]
    assert left.get_xlim()[0] > left.get_xlim()[1]
    rows = drifts(path_of(STEPS, seed=sum(map(ord, "base"))).numpy())
    shares = [100 * ratios(rows[:k], unit=False)[0] for k in (1, 3, 5)]  # snapshots at 100, 400 and 700
    np.testing.assert_allclose(y(right.lines[0]), shares)


def test_a_run_that_never_moved_does_not_stop_the_others(runs: list[Run], tmp_path: Path) -> None:
    still = write_run(tmp_path / "still", STEPS, path_of(STEPS)[:1].expand(len(STEPS), -1), config(seed=5))
    for draw in COMPARISON_FIGURES.values():
        try:
            draw([*runs, still])
        except UserError as error:
            assert "reheated" in str(error)


@pytest.mark.parametrize("name", [*COMPARISON_FIGURES])
def test_one_run_has_no_comparison(run: Run, name: str) -> None:
    with one_line_error("run"):
        COMPARISON_FIGURES[name]([run])
