"""Class paths of earlier versions open as the classes of today, and no class is loaded twice."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

import mini_gpt_pl.callbacks
from mini_gpt_pl.training import former_names

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def former() -> Iterator[None]:
    """Former names can be imported, until the test ends."""
    before = {name: sys.modules.get(name) for name in former_names.MODULES}
    former_names.install()
    yield
    for name, module in before.items():
        if module is None:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("name", mini_gpt_pl.callbacks.__all__)
def test_every_callback_is_the_same_class_under_its_former_path(former: None, name: str) -> None:
    assert getattr(import_module("callbacks"), name) is getattr(mini_gpt_pl.callbacks, name)


@pytest.mark.parametrize("name", former_names.MODULES)
def test_former_modules_hand_on_what_the_present_ones_have(former: None, name: str) -> None:
    present = import_module(former_names.MODULES[name])
    public = [attribute for attribute in vars(present) if not attribute.startswith("_")]
    assert public or name == "mini_gpt_pl.grokking"  # which is there for the modules below it
    assert all(getattr(import_module(name), attribute) is getattr(present, attribute) for attribute in public)


@pytest.mark.parametrize("path", former_names.CLASSES)
def test_former_classes_that_went_elsewhere(former: None, path: str) -> None:
    module, _, name = path.rpartition(".")
    now, _, same = former_names.CLASSES[path].rpartition(".")
    assert getattr(import_module(module), name) is getattr(import_module(now), same)


def test_a_kept_configuration_opens_as_the_same_class(former: None) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    path = "callbacks.TrajectoryRecorder"
    given = parser.parse_object({"callback": {"class_path": path, "init_args": {"pattern": "weight"}}})
    assert type(parser.instantiate_classes(given).callback) is mini_gpt_pl.callbacks.TrajectoryRecorder


def test_nothing_is_loaded_a_second_time_under_a_former_name(former: None) -> None:
    with pytest.raises(ModuleNotFoundError, match="not a package"):
        import_module("callbacks.trajectory")


def test_scripts_of_0_1_0_find_what_they_import_once() -> None:
    """In the checkout `import callbacks` finds the folder itself."""
    lines = (
        "import callbacks, callbacks.measuring, mini_gpt_pl.callbacks.trajectory as now",
        "from callbacks.trajectory import TrajectoryRecorder",
        "from mini_gpt_pl.logs import MetricsCSV",
        "from mini_gpt_pl.runs import Run",
        "assert TrajectoryRecorder is now.TrajectoryRecorder is callbacks.TrajectoryRecorder",
        "assert MetricsCSV is callbacks.MetricsCSV and Run.__module__ == 'mini_gpt_pl.runs.folder'",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_readers_own_module_of_a_former_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "callbacks.py").write_text("MINE = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "callbacks", raising=False)  # a stand-in that another test has let in
    before = {name: sys.modules.get(name) for name in former_names.MODULES}
    former_names.install()
    try:
        assert import_module("callbacks").MINE
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
