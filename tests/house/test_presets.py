"""Shipped configurations are found by name, from any folder; a reader's own file wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import one_line_error

from mini_gpt_pl.presets import preset, presets, with_presets
from mini_gpt_pl.sweep.grid import read_sweep


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_shipped_configuration_has_a_name_and_is_yaml() -> None:
    assert {"quickstart", "grokking/smoke", "probes/standard", "sweeps/beta2", "logger/none"} <= presets().keys()
    assert all(isinstance(yaml.safe_load(file.read_text()), dict) for file in presets().values())


@pytest.mark.parametrize("name", ["grokking/smoke", "configs/grokking/smoke.yaml", "grokking/smoke.yaml"])
def test_names_and_the_paths_of_a_checkout_are_the_same_file(name: str) -> None:
    assert preset(name) == presets()["grokking/smoke"]


def test_a_command_line_gets_files() -> None:
    smoke, quick = (str(presets()[name]) for name in ("grokking/smoke", "quickstart"))
    args = ["fit", "-c", "quickstart", "--config=grokking/smoke", "--run_dir", "quickstart"]
    assert with_presets(args) == ["fit", "-c", quick, f"--config={smoke}", "--run_dir", "quickstart"]


def test_a_file_of_ones_own_wins() -> None:
    Path("quickstart").write_text("{}")
    assert with_presets(["fit", "-c", "quickstart"]) == ["fit", "-c", "quickstart"]


@pytest.mark.parametrize("value", ["mine.yaml", "run_dir: x", "{}", "a:\n  b: 1\n"])
def test_paths_and_text_are_left_to_the_parser(value: str) -> None:
    assert with_presets(["fit", "-c", value]) == ["fit", "-c", value]


def test_a_name_that_is_none_says_which_is_near() -> None:
    with one_line_error(r"^-c quikstart: .*; did you mean quickstart\?"):
        with_presets(["fit", "-c", "quikstart"])


@pytest.mark.parametrize("file", [name for name in presets() if name.startswith("sweeps/")])
def test_a_shipped_sweep_is_read_from_anywhere_by_its_name(file: str) -> None:
    """The configurations that it names are found too: a missing one is refused."""
    sweep = read_sweep(Path(file.removeprefix("sweeps/")))
    assert sweep.path == presets()[file]
    assert sweep.points
