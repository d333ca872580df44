"""Tables of single runs, pooled over seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from report_runs import ADAMW, config, learning_curve, numbers, path_of, write_run

from mini_gpt_pl.report.sheet import Row, Table, number, tabulate, word
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.contents import comparison_tables, run_tables
from mini_gpt_pl.stories.study.pooled import LEAST, mean_row, over_seeds, pool

STEPS = [0, 200, 400, *range(600, 2001, 100), 3000, 4000]


def table(*rows: Row, notes: tuple[str, ...] = ("shared",)) -> Table:
    return tabulate("shares", "Shares", rows, notes)


def row(group: str, share: float, count: float, more: float | None = None) -> Row:
    cells = {"group": word(group), "share": number(share, "{:.1%}"), "k": number(count, "{:.0f}")}
    return cells | {"gain": number(more, "{:+.2f}"), "paper": word("80 %")}


def texts(made: Table, column: str) -> list[str]:
    return [row[column].text for row in made.rows]


def runs_of(folder: Path, count: int) -> list[Run]:
    return [
        write_run(
            folder / f"s{seed}",
            STEPS,
            path_of(STEPS, seed=seed),
            config(settings={**ADAMW, "betas": [0.9, 0.95]}, seed=seed),
            learning_curve({1000: (3.0, 0.2), 4000: (1.0 + seed, 0.5)}),
        )
        for seed in range(count)
    ]


def test_a_cell_is_the_mean_with_students_interval_and_as_many_digits_as_that_has() -> None:
    shares = (0.79, 0.80, 0.83)
    pooled = pool([table(row("trunk", share, 4, share - 0.8)) for share in shares])
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(shares), scipy.stats.sem(shares))
    found = numbers(pooled, "group").loc["trunk"]
    assert found["share"] == pytest.approx(np.mean(shares))
    assert found["share 95 %"] == pytest.approx((high - low) / 2, rel=1e-4)
    assert texts(pooled, "share") == ["80.7 ± 5.2%"]
    assert texts(pooled, "gain") == ["+0.007 ± 0.052"]
    assert texts(pooled, "k") == ["4"]  # the same for all
    assert "paper" not in pooled.columns
    assert (pooled.name, pooled.title) == ("seeds_shares", "Shares, over seeds")


def test_rows_are_matched_by_their_words() -> None:
    first = table(row("a", 0.1, 1), row("b", 0.5, 1))
    second = table(row("b", 0.7, 1), row("a", 0.3, 1), row("c", 0.9, 1), notes=("shared", "its own"))
    third = table(row("a", 0.2, 1, 0.5), notes=("shared",))
    pooled = pool([first, second, third])
    assert texts(pooled, "group") == ["a", "b"]  # c is of one run alone
    assert numbers(pooled, "group")["share"].to_list() == pytest.approx([0.2, 0.6])
    assert [text.endswith("(2)") for text in texts(pooled, "share")] == [False, True]
    assert pooled.notes == ("shared",)


def test_a_table_of_events_becomes_the_mean_over_them() -> None:
    reduced = mean_row(table(row("x", 0.2, 100), row("y", 0.6, 300)), "switches", ("k",))
    assert reduced.columns == ("switches", "share")
    assert reduced.lines == [["2", "40.0%"]]


def test_a_report_on_three_seeds_has_the_means_of_their_own_tables(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, LEAST)
    found = {made.name: made for made in comparison_tables(runs, bootstrap=0)}
    own = [{made.name: made for made in run_tables(Subject.of(run, bootstrap=0))} for run in runs]
    for name in ("learning", "growth", "backbone_fraction"):
        assert f"seeds_{name}" in found
    each = [numbers(tables["backbone_fraction"], "quantity") for tables in own]
    pooled = numbers(found["seeds_backbone_fraction"], "quantity")
    assert len(pooled) == len(each[0])  # of which two say "the same, mean over snapshots"
    for column in ("measured", "decaying walk", "excess"):
        mean = np.mean([frame[column] for frame in each], axis=0)
        np.testing.assert_allclose(pooled[column], mean, rtol=1e-9, atol=1e-12)
    assert "Seeds 0, 1, 2" in found["seeds_growth"].notes[0]


def test_fewer_seeds_are_not_pooled(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, LEAST - 1)
    assert over_seeds([Subject.of(run) for run in runs], run_tables) == []
    assert not any(made.name.startswith("seeds_") for made in comparison_tables(runs, bootstrap=0))
