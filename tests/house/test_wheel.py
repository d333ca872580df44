"""What an installed package holds: one name at the top, inside it the callbacks, the configurations, the assets."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("mini_gpt_pl", "callbacks", "configs")
LIGHT = {"torch", "lightning", "numpy", "safetensors", "jaxtyping", "rich"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that nothing is left in the checkout, nor taken from its build folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_top_level_is_the_package_alone(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mini_gpt_pl"}


@pytest.mark.parametrize("room", ROOMS)
def test_every_file_of_the_package_is_in_it(wheel: zipfile.ZipFile, room: str) -> None:
    inside = Path("mini_gpt_pl") / (room if room != "mini_gpt_pl" else "")
    files = [file.relative_to(ROOT / room) for file in (ROOT / room).rglob("*") if file.is_file()]
    expected = {(inside / file).as_posix() for file in files if "__pycache__" not in file.parts}
    assert len(expected) > 10
    assert expected <= set(wheel.namelist())


def test_the_core_is_light_and_the_extras_name_the_rest(wheel: zipfile.ZipFile) -> None:
    metadata = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
    lines = email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist") or []
    needed = {match[0] for line in lines if "extra ==" not in line and (match := re.match(r"[\w.-]+", line))}
    assert needed == LIGHT
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"cli", "report", "data", "wandb", "dashboard", "slurm", "all"} <= declared.keys()
    named = re.search(r"\[(.*)\]", declared["all"][0])
    assert named is not None
    assert set(named[1].split(",")) == {"cli", "data", "wandb", "dashboard", "slurm"}  # `cli` has `report`


def test_the_command_is_installed(wheel: zipfile.ZipFile) -> None:
    entry = next(name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "mini_gpt_pl = mini_gpt_pl.main:main" in wheel.read(entry).decode()
