"""Figures and the closing table, against singular value decompositions of the weights themselves."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, bent_path, record
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from rich.console import Console
from torch import Tensor

from mini_gpt_pl.geometry.path import nulls
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report import figures
from mini_gpt_pl.report.calibration import groups_table, growth_table, table
from mini_gpt_pl.report.probe_tables import live_probes
from mini_gpt_pl.report.published import NOTHING
from mini_gpt_pl.report.sheet import markdown
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.report.summary import lines, print_summary
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study import learning

SNAPSHOTS = 7
WEIGHTS = bent_path(SNAPSHOTS, SMALL.dim).numpy()
DRIFTS = (WEIGHTS - WEIGHTS[0])[1:]
INCREMENTS = np.diff(WEIGHTS, axis=0)
STEPS = [100 * k for k in range(SNAPSHOTS)]
SURVIVAL = np.array([0.9**k for k in range(SNAPSHOTS)])
# What a walk with the same step lengths in orthogonal directions does, in coordinates of its own.
WALK = np.tril(np.ones((SNAPSHOTS - 1, SNAPSHOTS - 1))) * np.linalg.norm(INCREMENTS, axis=1)

METRICS = """step,alignment/net/gradient,alignment/net/lm,probe/p_in,probe/p_ood,train/lm_loss,val/loss
10,0.1,0.30,,,5.0,
60,0.3,,,,4.0,
100,0.5,,0.25,0.125,3.0,3.5
150,0.9,0.40,,,2.0,
600,,,0.75,0.5,1.0,2.25
"""
CONFIG = """
task: stories
trainer: {callbacks: [{class_path: mini_gpt_pl.callbacks.TrajectoryRecorder, init_args: {name: net}}]}
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    record(SMALL, bent_path(SNAPSHOTS, SMALL.dim))[1].save(tmp_path / "trajectory.safetensors")
    (tmp_path / "metrics.csv").write_text(METRICS)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return Run(tmp_path)


def backbone_of(rows: np.ndarray) -> np.ndarray:
    """Leading right singular vector, turned so that the last row has a positive coordinate."""
    v = np.linalg.svd(rows)[2][0]
    return v if rows[-1] @ v > 0 else -v


def ratios_of(rows: np.ndarray, *, unit: bool) -> np.ndarray:
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) if unit else rows
    energy = np.linalg.svd(rows, compute_uv=False) ** 2
    return energy / energy.sum()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def line(axes: Axes, label: str) -> Line2D:
    """The one line whose label holds these words and that has data."""
    found = [part for part in axes.lines if label in str(part.get_label()) and len(np.asarray(part.get_xdata()))]
    assert len(found) == 1, [part.get_label() for part in axes.lines]
    return found[0]


def y(part: Line2D) -> np.ndarray:
    return np.asarray(part.get_ydata(), dtype=float)


# ------------------------------------------------------------------------------------------------- figures


def test_every_figure_is_drawn_as_a_png(run: Run) -> None:
    written = figures.draw_all(run)
    assert [file.stem for file in written] == ["learning", "spectrum", "backbone", "alignment", "growth"]
    for file in written:
        assert file.parent == run.path / "figures"
        assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_learning_shows_the_logged_values_at_their_steps(run: Run) -> None:
    left, right = learning.figure(run).axes
    for axes, label, expected in (
        (left, "training, LM", {10: 5.0, 60: 4.0, 100: 3.0, 150: 2.0, 600: 1.0}),
        (left, "validation, LM", {100: 3.5, 600: 2.25}),
        (right, "short gap", {100: 0.25, 600: 0.75}),
        (right, "long gap", {100: 0.125, 600: 0.5}),
    ):
        drawn = line(axes, label)
        assert dict(zip(np.asarray(drawn.get_xdata()), y(drawn), strict=True)) == expected
    assert left.get_ylim()[0] == 0
    legend = right.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "$p_{in}$, short gap",
        "$p_{ood}$, long gap",
    ]


def test_spectrum_shows_the_shares_of_groups_whole_and_walk(run: Run) -> None:
    groups = [DRIFTS[:, part] for part in SMALL.slices]
    decayed = decaying_walk()
    decayed = (decayed - decayed[0])[1:]
    for axes, unit in zip(figures.spectrum(run).axes, (False, True), strict=True):
        drawn = [y(part) for part in axes.lines if len(y(part))]
        expected = [ratios_of(rows, unit=unit) for rows in (*groups, DRIFTS, WALK, decayed)]
        assert len(drawn) == len(expected)
        for found, wanted in zip(drawn, expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-12)
        assert f"PC1 {100 * expected[2][0]:.1f} %" in axes.get_title()


def test_backbone_shows_coordinate_residual_and_decay(run: Run) -> None:
    top, bottom, *_ = figures.backbone(run).axes
    v = backbone_of(DRIFTS)
    drift = WEIGHTS - WEIGHTS[0]
    a = drift @ v
    for axes, label, expected in (
        (top, "a(t)", a),
        (top, "||x(t)||", np.linalg.norm(drift, axis=1)),
        (top, "weight decay", (1 - SURVIVAL) * np.linalg.norm(WEIGHTS[0])),
        (bottom, "||r(t)||", np.linalg.norm(drift - np.outer(a, v), axis=1)),
    ):
        assert list(np.asarray(line(axes, label).get_xdata())) == STEPS
        np.testing.assert_allclose(y(line(axes, label)), expected, atol=1e-7)
    assert f"{cosine(v, WEIGHTS[0]):+.2f}" in top.get_title()


def test_the_probe_is_drawn_behind_both_backbone_panels(run: Run) -> None:
    twins = figures.backbone(run).axes[2:]
    assert len(twins) == 2
    for twin in twins:
        assert list(y(line(twin, "p_{ood}"))) == [0.125, 0.5]


def test_alignment_shows_updates_with_whole_past_and_chance(run: Run) -> None:
    (axes,) = figures.alignment(run).axes
    v = backbone_of(DRIFTS)
    np.testing.assert_allclose(y(line(axes, "contains it")), [cosine(d, v) for d in INCREMENTS], atol=1e-12)
    past = [cosine(INCREMENTS[k], backbone_of(DRIFTS[:k])) for k in range(1, SNAPSHOTS - 1)]
    drawn = y(line(axes, "of its past"))
    assert np.isnan(drawn[0])
    np.testing.assert_allclose(drawn[1:], past, atol=1e-12)
    walk = [cosine(d, backbone_of(WALK)) for d in np.diff(np.vstack([np.zeros_like(WALK[0]), WALK]), axis=0)]
    np.testing.assert_allclose(y(line(axes, "random directions")), walk, atol=1e-12)
    assert list(np.asarray(line(axes, "LM gradient").get_xdata())) == [10, 150]


def test_gradients_are_averaged_between_snapshots(run: Run) -> None:
    (axes,) = figures.alignment(run).axes
    (bars,) = axes.containers
    assert isinstance(bars, ErrorbarContainer)
    data, _, (spreads,) = bars.lines
    assert data is not None
    assert [float(x) for x in np.asarray(data.get_xdata())] == [50, 150]  # (0, 100] and (100, 200]
    np.testing.assert_allclose(y(data), [0.3, 0.9])
    low, high = spreads.get_segments()[0][:, 1]
    np.testing.assert_allclose(high - low, 2 * np.std([0.1, 0.3, 0.5], ddof=1))


def test_the_noise_band_is_the_mean_cosine_of_chance(run: Run) -> None:
    (axes,) = figures.alignment(run).axes
    assert f"{np.sqrt(2 / np.pi / SMALL.dim):.1e}" in axes.get_title()


def test_growth_shows_coordinate_and_residual_with_their_exponents(run: Run) -> None:
    left, _ = figures.growth(run).axes
    unit = DRIFTS / np.linalg.norm(DRIFTS, axis=1, keepdims=True)
    v = np.linalg.svd(unit)[2][0]
    a = np.abs(DRIFTS @ v)
    r = np.linalg.norm(DRIFTS - (DRIFTS @ v)[:, None] * v, axis=1)
    for label, values in (("|a|", a), ("||r||", r)):
        measured = next(part for part in left.lines if str(part.get_label()).startswith(label))
        np.testing.assert_allclose(y(measured), values)
    assert sum("decaying walk" in str(part.get_label()) for part in left.lines) == 2


def test_probes_are_told_beside_their_nulls(run: Run) -> None:
    (made,) = live_probes(Subject.of(run), NOTHING)
    found = made.frame.set_index("quantity")
    gradient = found.loc["gradient and past v_b, |cos|"]  # 0.1, 0.3, 0.5, 0.9 were logged
    assert (gradient["mean"], gradient["first"], gradient["last"]) == ("0.45", "0.1", "0.9")
    floor = np.sqrt(2 / np.pi / SMALL.dim)
    assert gradient["null"] == f"{floor:.3g}" and gradient["mean / null"] == f"{0.45 / floor:.2f}"
    assert "switch and past v_b, |cos|" not in found.index  # never measured


def test_growth_table_holds_the_fits(run: Run) -> None:
    found = growth_table(run).set_index("quantity")
    assert "early_late" in found.index
    assert set(found.columns) == {"measured", "walk", "decaying walk"}
    assert found.loc["early_late", "walk"] == "+0.00"


def test_a_run_without_recorder_still_shows_its_learning(run: Run) -> None:
    (run.path / "trajectory.safetensors").unlink()
    assert [file.stem for file in figures.draw_all(run)] == ["learning"]


@pytest.mark.parametrize("snapshots", [1, 4])
def test_a_run_that_never_moved_shows_its_learning(tmp_path: Path, run: Run, snapshots: int) -> None:
    still = bent_path(1, SMALL.dim).expand(snapshots, -1)
    record(SMALL, still)[1].save(run.path / "trajectory.safetensors")
    assert [file.stem for file in figures.draw_all(run)] == ["learning"]
    assert len(lines(run)) == 3


def test_a_frozen_group_has_no_spectrum(run: Run) -> None:
    weights = bent_path(SNAPSHOTS, SMALL.dim)
    weights[:, SMALL.slices[0]] = weights[0, SMALL.slices[0]]
    record(SMALL, weights)[1].save(run.path / "trajectory.safetensors")
    raw = figures.spectrum(run).axes[0]
    assert len([part for part in raw.lines if len(y(part))]) == 4  # the other group, the whole, both walks


# ------------------------------------------------------------------------------------------- closing table


def decaying_walk() -> np.ndarray:
    """Drifts of the walk under decay, in coordinates of its own: theta_0 is the first, each innovation has another."""
    lengths = np.linalg.norm(INCREMENTS, axis=1)
    path = [np.r_[np.linalg.norm(WEIGHTS[0]), np.zeros(SNAPSHOTS - 1)]]
    for k, length in enumerate(lengths, 1):
        decay = (SURVIVAL[k] / SURVIVAL[k - 1] - 1) * path[-1]
        fresh = np.zeros(SNAPSHOTS)
        fresh[k] = np.sqrt(max(0.0, length**2 - decay @ decay))
        path.append(path[-1] + decay + fresh)
    return np.array(path)


def past_alignment(drifts: np.ndarray) -> float:
    steps = np.diff(np.vstack([np.zeros(drifts.shape[1]), drifts]), axis=0)
    return float(np.mean([cosine(steps[k], backbone_of(drifts[:k])) for k in range(1, len(drifts))]))


def test_a_path_is_calibrated_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    calibrate = nulls.calibrate

    def counted(gram: Tensor, *args: Any, **options: Any) -> dict[str, nulls.Calibrated]:
        asked.append(len(gram))
        return calibrate(gram, *args, **options)

    monkeypatch.setattr(nulls, "calibrate", counted)
    subject = Subject.of(run, bootstrap=3)
    first = subject.calibrate()
    first["pc1"] = nulls.Calibrated(0.0, 0.0, 0.0)  # a caller's copy is its own
    again = Subject.of(subject).calibrate()
    assert len(asked) == 1 and again["pc1"].value > 0
    assert Subject.of(subject, "named").trajectory is subject.trajectory  # what was read is not read again
    record(SMALL, 2 * bent_path(SNAPSHOTS, SMALL.dim, seed=1))[1].save(run.path / "trajectory.safetensors")
    other = Subject.of(Run(run.path), bootstrap=3).calibrate()
    assert len(asked) == 2 and other["drift"].value != again["drift"].value


def test_the_table_holds_the_numbers_of_a_plain_decomposition(run: Run) -> None:
    decayed = decaying_walk()
    paths = (DRIFTS, WALK, (decayed - decayed[0])[1:])

    def k95(rows: np.ndarray) -> str:
        return str(int(np.argmax(np.cumsum(ratios_of(rows, unit=False)) >= 0.95)) + 1)

    def free(rows: np.ndarray) -> float:
        steps = np.diff(np.vstack([np.zeros(rows.shape[1]), rows]), axis=0)
        return float(np.linalg.norm(rows[-1]) / np.linalg.norm(steps))

    expected = {
        "PC1 of the drift, raw": [f"{ratios_of(rows, unit=False)[0]:.1%}" for rows in paths],
        "PC1, unit rows": [f"{ratios_of(rows, unit=True)[0]:.1%}" for rows in paths],
        "k95, raw": [k95(rows) for rows in paths],
        "drift ||x(T)||": [f"{np.linalg.norm(rows[-1]):.1f}" for rows in paths],
        "update alignment, past-only v_b, mean cos": [
            f"{past_alignment(DRIFTS):+.3f}",
            "+0.000",
            f"{past_alignment(paths[2]):+.3f}",
        ],
        "cos(v_b, theta_0)": [
            f"{cosine(backbone_of(DRIFTS), WEIGHTS[0]):+.3f}",
            "+0.000",
            f"{cosine(backbone_of(paths[2]), decayed[0]):+.3f}",
        ],
        "persistence, ||x(T)|| over the walk's": [f"{free(rows):.3f}" for rows in paths],
    }
    found = {shown["quantity"]: shown for shown in lines(run)}
    for quantity, values in expected.items():
        shown = found[quantity]
        assert [shown["value"], shown["walk"].replace("-0.000", "+0.000"), shown["decay"]] == values, quantity
    excess = 100 * (ratios_of(paths[0], unit=False)[0] - ratios_of(paths[2], unit=False)[0])
    assert found["PC1 of the drift, raw"]["excess"] == f"{excess:+.1f} pt"
    assert found["validation loss"]["value"] == "2.250"
    assert found["p_in, exact match at short gaps"]["value"] == "0.750"
    assert found["p_ood, exact match at long gaps"]["value"] == "0.500"
    assert found["initial weights that weight decay left"]["value"] == f"{SURVIVAL[-1]:.0%}"


def test_calibration_tables_are_markdown_with_one_row_a_quantity_and_a_group(run: Run) -> None:
    whole = table(run, bootstrap=20)
    assert whole["quantity"].iloc[0] == statistics()["pc1"].title
    assert whole["95 %"].iloc[0].count("pt") == 2
    assert list(groups_table(run)["group"]) == list(SMALL.groups)
    text = markdown(whole).splitlines()
    assert len(text) == len(whole) + 2
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in text} == {len(whole.columns) + 1}


def test_what_was_never_measured_has_no_row(run: Run) -> None:
    assert {"validation loss", "p_in, exact match at short gaps"} < {shown["quantity"] for shown in lines(run)}
    (run.path / "metrics.csv").write_text("step,val/loss\n1,5.0\n")
    fresh = Run(run.path)
    assert [shown["quantity"] for shown in lines(fresh)[:2]] == ["validation loss", statistics()["pc1"].title]


def test_the_printed_table_names_the_run_and_what_its_null_is(run: Run) -> None:
    text = io.StringIO()
    print_summary(run, Console(file=text, width=200))
    for told in (str(run.path), "p_ood, exact match at long gaps", "mutually orthogonal directions"):
        assert told in text.getvalue()
