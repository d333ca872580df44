"""What is on the screen while training runs, and what the closing table says in words."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cache_dir, metrics, probes, quiet_trainer, tiny_gpt, tiny_stories
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from rich.console import Console

from mini_gpt_pl.callbacks.progress import LiveNumbers, columns
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.report import summary
from mini_gpt_pl.report.sheet import conclusion
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.training.cli import run_cli

STORIES = Path(__file__).parents[1] / "tiny.yaml"
KEPT = Path(__file__).parents[2] / "docs" / "replication" / "runs" / "seeds" / "seed42"


def screen(folder: Path, *, terminal: bool, record: bool = True) -> list[str]:
    """Lines of a run of six steps with an evaluation every three, without colours and cursor moves."""
    text = io.StringIO()
    bar = LiveNumbers(Console(file=text, force_terminal=terminal, width=160))
    trainer = quiet_trainer(
        folder,
        [*(probes() if record else []), bar],
        max_steps=6,
        enable_progress_bar=True,
        limit_val_batches=1.0,
        val_check_interval=3,
    )
    trainer.fit(tiny_gpt(), tiny_stories())
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue())
    return [line.strip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def test_a_log_file_gets_a_line_an_evaluation_with_what_was_measured(tmp_path: Path) -> None:
    lines = screen(tmp_path, terminal=False)
    lines = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["3/6", "6/6"]
    for line, step in zip(lines, (3, 6), strict=True):
        row = metrics(tmp_path)[step]
        for label, name in (("loss", "train/loss"), ("val/loss", "val/loss"), ("p_ood", "probe/p_ood")):
            shown = re.search(rf"(?<!/)\b{label} ([\d.]+)", line)
            assert shown is not None, label
            assert float(shown[1]) == pytest.approx(row[name], abs=6e-4), label


def test_the_geometry_is_shown_beside_its_null(tmp_path: Path) -> None:
    last = screen(tmp_path, terminal=True)[-1]
    row = metrics(tmp_path)[6]
    pc1, excess = 100 * row["backbone/trunk/pc1"], 100 * row["backbone/trunk/pc1_excess"]
    assert f"PC1 {pc1:.1f}% ({excess:+.1f} over its null)" in last
    gradient = f"{row['alignment/trunk/gradient']:+.4f} ({row['alignment/trunk/gradient_z']:.1f} x chance)"
    assert f"cos(g,v_b) {gradient}" in last
    assert f"cos(d,v_b) {row['alignment/trunk/update']:+.3f} (null {row['alignment/trunk/update_null']:+.3f})" in last


@pytest.mark.parametrize("terminal", [False, True])
def test_a_legend_at_the_start_says_once_what_the_columns_are(tmp_path: Path, terminal: bool) -> None:
    lines = screen(tmp_path, terminal=terminal)
    heads = ["PC1: How nearly the path so far is a straight line", "cos(d,v_b): Whether the latest increment follows"]
    heads += ["cos(g,v_b): Whether the gradient of the optimizer batch", "v_b: backbone, the unit first direction"]
    assert [line[: len(head)] for line, head in zip(lines, heads, strict=False)] == heads
    assert "In brackets, … x chance: The gradient's |cosine| in units of what chance gives." in lines[2]
    assert all(sum(line.startswith(head) for line in lines) == 1 for head in heads)


def test_the_bar_ends_at_the_last_step(tmp_path: Path) -> None:
    bars = [line for line in screen(tmp_path, terminal=True) if line.startswith("step")]
    assert bars[-1].startswith("step 6/6")


def test_without_a_recorder_only_the_modules_own_numbers_are_shown(tmp_path: Path) -> None:
    lines = screen(tmp_path, terminal=False, record=False)
    assert all(line.startswith("step ") for line in lines)  # nothing to explain
    last = lines[-1]
    assert "p_ood" in last and "PC1" not in last and "v_b" not in last


def test_columns_leave_out_what_is_not_a_number(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, probes(), max_steps=2)
    trainer.fit(tiny_gpt(), tiny_stories())
    assert "PC1" in columns(trainer)
    trainer.callback_metrics["backbone/trunk/pc1"] = torch.tensor(math.nan)
    assert "PC1" not in columns(trainer)


def test_a_checkpoint_callback_can_watch_a_geometric_number(tmp_path: Path) -> None:
    best = ModelCheckpoint(
        tmp_path, monitor="backbone/trunk/pc1_excess", mode="max", every_n_train_steps=2, filename="{step}"
    )
    trainer = quiet_trainer(tmp_path, [*probes(), best], max_steps=8)
    trainer.fit(tiny_gpt(), tiny_stories())
    excess = {step: row["backbone/trunk/pc1_excess"] for step, row in metrics(tmp_path).items() if step % 2 == 0}
    assert best.best_model_score is not None
    assert float(best.best_model_score) == pytest.approx(max(excess.values()), rel=1e-6)
    assert f"step={max(excess, key=lambda step: excess[step])}" in best.best_model_path


@pytest.mark.parametrize(
    ("options", "kind"), [([], LiveNumbers), (["--trainer.callbacks+=TQDMProgressBar"], TQDMProgressBar)]
)
def test_the_command_line_shows_it_unless_another_bar_is_asked_for(
    tmp_path: Path, options: list[str], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shared: list[Any] = ["--trainer.max_steps=1", "--trainer.fast_dev_run=true", f"--data.cache_dir={cache_dir()}"]
    cli = run_cli(
        ["fit", "-c", str(STORIES), "--run_dir", "run", *shared, "--trainer.enable_progress_bar=true", *options]
    )
    assert type(cli.trainer.progress_bar_callback) is kind


# ------------------------------------------------------------------------------------------- closing table


def test_the_closing_table_says_what_its_numbers_mean() -> None:
    text = " ".join(summary.verdicts(Run(KEPT)))
    assert "79.7%, where the decaying walk has 77.6%: more than chance and weight decay explain" in text
    assert "has taken 92% of the initial weights away" in text
    assert "is -0.59 where the decaying walk has -0.74" in text


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.01, 0.03), "more than chance"),
        ((-0.01, 0.03), "contains zero"),
        ((-0.05, -0.01), "less than chance"),
        ((math.nan, math.nan), "one path does not say how surely"),
    ],
)
def test_a_verdict_follows_the_interval(interval: tuple[float, float], verdict: str) -> None:
    assert verdict in conclusion(Calibrated(0.8, 0.9, 0.78, *interval))


def test_the_table_prints_its_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    summary.print_summary(Run(KEPT), Console(width=110))
    printed = " ".join(capsys.readouterr().out.split())
    for text in summary.verdicts(Run(KEPT)):
        assert text in printed


def test_a_run_without_a_path_has_a_table_and_no_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet_trainer(tmp_path, [], max_steps=1).fit(tiny_gpt(), tiny_stories())
    summary.print_summary(Run(tmp_path), Console(width=110))
    printed = capsys.readouterr().out
    assert "decaying walk" in printed and "v_b" not in printed
