"""Pictures of the trajectory: what they show is what was logged, and training does not notice them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from conftest import SMALL, bent_path, one_line_error, record, walk_gram
from helpers import probes, quiet_trainer, recorder, same, tiny_gpt, tiny_stories
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from test_wandb_run import history

from mini_gpt_pl.callbacks import GeometryPictures, Schedule
from mini_gpt_pl.callbacks.pictures import COMPONENTS, Artist, spectrum_rows
from mini_gpt_pl.figures import trajectory_figures
from mini_gpt_pl.figures.trajectory_figures import (
    TRAJECTORY_FIGURES,
    draw,
    moved_groups,
    pc1_excess,
    shown_columns,
    update_excess,
)
from mini_gpt_pl.geometry.path import nulls, pca
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.runs.logs import MetricsCSV

KEYS = [f"pictures/{name}" for name in TRAJECTORY_FIGURES]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, list[dict[str, Any]]]]:
    """Eight steps with a snapshot each, drawn every third: the run, and the rows that W&B got."""
    folder = tmp_path_factory.mktemp("drawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DATA_DIR", str(folder / "staging"))
        loggers = [MetricsCSV(folder / "metrics.csv"), WandbLogger(offline=True, save_dir=str(folder))]
        pictures = GeometryPictures(Schedule(every=3), background=False)
        callbacks = [pictures, *probes(every=1)]  # before the recorder: an awkward order
        quiet_trainer(folder, callbacks, max_steps=8, logger=loggers).fit(tiny_gpt(), datamodule=tiny_stories())
        wandb.finish()
        yield Run(folder), history(folder)


def test_pictures_come_on_schedule_and_at_the_end(drawn: tuple[Run, list[dict[str, Any]]]) -> None:
    run, rows = drawn
    shown = {row["trainer/global_step"]: row for row in rows if f"{KEYS[0]}/path" in row}
    assert list(shown) == [3, 6, 8]
    (media,) = run.path.glob("wandb/offline-run-*/files")
    for key in KEYS:
        assert shown[8][f"{key}/caption"] == "snapshots up to step 8"  # the recorder's last one included
        with Image.open(media / shown[8][f"{key}/path"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape[1] > 600 and pixels.std() > 10


def test_the_table_is_the_spectrum(drawn: tuple[Run, list[dict[str, Any]]]) -> None:
    run, rows = drawn
    gram = run.trajectory.gram()
    found = np.array(spectrum_rows(run.trajectory))
    assert any("pictures/spectrum_table/path" in row for row in rows)
    assert found[:, 0].tolist() == list(range(1, 9))
    for column, path in ((1, gram), (2, nulls.walk(gram)), (3, nulls.decaying_walk(gram, run.trajectory.survival))):
        values = np.linalg.eigvalsh((pca.drifts(9)[1:] @ path @ pca.drifts(9)[1:].T).numpy())[::-1]
        assert found[:, column] == pytest.approx(values / values.sum(), abs=1e-12)


def test_a_long_spectrum_is_cut() -> None:
    trajectory = Trajectory("x", ("all",), (6,), list(range(61)), walk_gram(60)[None], [1.0] * 61)
    assert len(spectrum_rows(trajectory)) == COMPONENTS


def test_the_maps_are_what_was_logged(drawn: tuple[Run, list[dict[str, Any]]]) -> None:
    """Every column is the number that the recorder logged at its step, from the snapshots up to then."""
    run, _ = drawn
    names, columns = [*run.trajectory.groups, None], shown_columns(len(run.trajectory))
    assert columns == list(range(1, 9))
    pc1, update = (f(run.trajectory, names, columns) for f in (pc1_excess, update_excess))
    for row, name in enumerate(names):
        logged = run.series(f"backbone/{name or 'trunk'}/pc1_excess")
        assert pc1[row].numpy() == pytest.approx(logged.to_numpy(), abs=1e-9)
        logged = run.series(f"alignment/{name or 'trunk'}/update_excess")
        assert update[row, 1:].numpy() == pytest.approx(logged.to_numpy(), abs=1e-9)
        assert torch.isnan(update[row, 0])


def test_a_column_knows_no_later_snapshot(drawn: tuple[Run, list[dict[str, Any]]]) -> None:
    trajectory = drawn[0].trajectory
    whole = pc1_excess(trajectory, [None], [5])
    assert torch.equal(whole, pc1_excess(trajectory.until(5), [None], [5]))
    assert not torch.equal(whole, pc1_excess(trajectory, [None], [8]))


def test_long_runs_are_thinned() -> None:
    columns = shown_columns(500)
    assert (columns[0], columns[-1]) == (1, 499)
    assert len(columns) == trajectory_figures._MOST_COLUMNS


def test_the_path_is_drawn_beside_its_null() -> None:
    _, trajectory = record(SMALL, bent_path(6, SMALL.dim))
    left = draw("path", trajectory, "trunk").axes[0]
    null, measured = left.lines[:2]
    x, y = (np.asarray(values, dtype=float) for values in measured.get_data())
    rows = (bent_path(6, SMALL.dim) - bent_path(6, SMALL.dim)[0]).numpy()
    _, values, _ = np.linalg.svd(rows, full_matrices=False)
    assert np.sqrt((x**2).sum()) == pytest.approx(values[0])
    assert np.sqrt((y**2).sum()) == pytest.approx(values[1])
    assert (x[-1] > 0, y[-1] > 0) == (True, True)
    assert not np.allclose(null.get_xdata(), x)
    assert left.get_legend_handles_labels()[1] == ["decaying walk", "trunk"]


def test_frozen_groups_have_no_row() -> None:
    weights = bent_path(5, SMALL.dim)
    weights[:, : SMALL.dims[0]] = weights[0, : SMALL.dims[0]]
    _, trajectory = record(SMALL, weights)
    assert moved_groups(trajectory) == ["b"]
    labels = [text.get_text() for text in draw("blocks", trajectory, "trunk").axes[0].get_yticklabels()]
    assert labels == ["b", "trunk"]


def test_what_cannot_be_drawn_is_said_in_one_line() -> None:
    _, short = record(SMALL, bent_path(2, SMALL.dim))
    _, still = record(SMALL, bent_path(1, SMALL.dim).repeat(4, 1))
    for name, trajectory in (("path", short), ("blocks", short), *((name, still) for name in TRAJECTORY_FIGURES)):
        with one_line_error("three snapshots|have not moved"):
            draw(name, trajectory, "trunk")


# -------------------------------------------------------------------------------------------------- the callback


def test_without_wandb_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_gpt_pl.callbacks.pictures.draw_files", lambda *_: pytest.fail("drawn for nobody"))
    monkeypatch.setattr("mini_gpt_pl.callbacks.pictures.Artist", lambda *_: pytest.fail("drawn for nobody"))
    pictures = GeometryPictures(Schedule(every=1))
    quiet_trainer(tmp_path, [recorder(every=1), pictures], max_steps=3).fit(tiny_gpt(), datamodule=tiny_stories())
    assert pictures.asked == 0 and pictures.watch.seconds == 0


def test_only_rank_zero_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pictures, logger = GeometryPictures(), WandbLogger(offline=True, save_dir=str(tmp_path))
    _, trajectory = record(SMALL, bent_path(4, SMALL.dim))
    pictures._recorder = SimpleNamespace(trajectory=trajectory, name="trunk")  # type: ignore[assignment]
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(logger, "log_metrics", lambda values, step: sent.append({**values, "step": step}))
    for first in (False, True, True):  # the third time nothing is new
        trainer: Any = SimpleNamespace(is_global_zero=first, loggers=[logger], global_step=7)
        pictures.on_fit_end(trainer, LightningModule())
    (row,) = sent
    assert row["step"] == 7 and row.keys() == {*KEYS, "pictures/spectrum_table", "step"}


def test_it_needs_a_recorder(tmp_path: Path) -> None:
    with one_line_error("GeometryPictures needs a TrajectoryRecorder"):
        quiet_trainer(tmp_path, [GeometryPictures()], max_steps=1).fit(tiny_gpt(), datamodule=tiny_stories())


def test_weights_that_never_move_draw_nothing_and_break_nothing() -> None:
    pictures, logger = GeometryPictures(), WandbLogger(offline=True, save_dir="nowhere")
    _, trajectory = record(SMALL, bent_path(1, SMALL.dim).repeat(4, 1))
    pictures._recorder = SimpleNamespace(trajectory=trajectory, name="trunk")  # type: ignore[assignment]
    trainer: Any = SimpleNamespace(is_global_zero=True, loggers=[logger], global_step=7)
    pictures.on_fit_end(trainer, LightningModule())
    assert not Path("nowhere").exists()


def test_pictures_drawn_in_the_background_are_those_drawn_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: tuple[Run, list[dict[str, Any]]]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(offline=True, save_dir=str(tmp_path))
    callbacks = [GeometryPictures(Schedule(steps=[3])), *probes(every=1)]
    quiet_trainer(tmp_path, callbacks, max_steps=8, logger=logger).fit(tiny_gpt(), datamodule=tiny_stories())
    wandb.finish()
    files = {}
    for run, rows in ((Run(tmp_path), history(tmp_path)), drawn):
        shown = {row["trainer/global_step"]: row for row in rows if f"{KEYS[0]}/path" in row}
        (media,) = run.path.glob("wandb/offline-run-*/files")
        files[run.path] = [(media / shown[3][f"{key}/path"]).read_bytes() for key in KEYS]
    ours, theirs = files.values()
    assert ours == theirs


def test_an_artist_that_fails_says_so_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, trajectory = record(SMALL, bent_path(4, SMALL.dim))
    told: list[str] = []  # whether a log record arrives depends on who has configured logging before
    monkeypatch.setattr("mini_gpt_pl.callbacks.pictures.rank_zero_info", told.append)
    monkeypatch.setattr("sys.executable", "/bin/false")
    artist = Artist(trajectory, "trunk", 7)
    artist.process.wait()
    assert artist.pictures() == {}
    assert len(told) == 1 and told[0].startswith("step 7: no pictures")
    artist.close()
    assert not artist.folder.exists()


def test_an_interrupted_run_ends_its_artist(tmp_path: Path) -> None:
    _, trajectory = record(SMALL, bent_path(4, SMALL.dim))
    pictures = GeometryPictures()
    pictures._artist = artist = Artist(trajectory, "trunk", 7)
    pictures.on_exception(quiet_trainer(tmp_path), LightningModule(), KeyboardInterrupt())
    assert artist.process.poll() is not None and not artist.folder.exists()


def test_training_is_bit_for_bit_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    states = []
    for watched in (False, True):
        folder, module = tmp_path / str(watched), tiny_gpt()
        callbacks = [recorder(every=1), *([GeometryPictures(Schedule(every=2))] if watched else [])]
        logger = WandbLogger(offline=True, save_dir=str(folder)) if watched else None
        trainer = quiet_trainer(folder, callbacks, max_steps=5, **({"logger": logger} if logger else {}))
        trainer.fit(module, datamodule=tiny_stories())
        states.append((module.state_dict(), torch.get_rng_state()))
        wandb.finish()
    assert same(*states)
