"""The probes on models that are not this project's GPT."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pandas as pd
import pytest

from mini_gpt_pl.geometry import pca
from mini_gpt_pl.geometry.trajectory import Trajectory

EXAMPLES = {
    "image_classifier": {"layers.0", "layers.1", "layers.4", "layers.8"},
    "huggingface_gpt2": {"transformer.h.0", "transformer.h.1"},
    "recurrent_network": {"rnn", "head"},
}
FOLDER = Path(__file__).parent.parent / "notebooks"


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_records_its_own_groups(name: str, tmp_path: Path) -> None:
    if name == "huggingface_gpt2":
        pytest.importorskip("transformers")
    importlib.import_module(f"notebooks.{name}").main(steps=60, folder=str(tmp_path))
    trajectory = Trajectory.load(tmp_path / "trajectory.safetensors")
    assert set(trajectory.groups) == EXAMPLES[name]
    assert trajectory.steps == [0, 20, 40, 60]
    metrics = pd.read_csv(tmp_path / "metrics.csv", index_col="step")
    whole = pca.pca(trajectory.gram(), pca.drifts(4)[1:])
    assert metrics.loc[60, "backbone/trunk/pc1"] == pytest.approx(whole.pc1, rel=1e-12)
    assert metrics["alignment/trunk/gradient"].notna().sum() == 8  # every 5 steps once step 20 has made a backbone
    if name == "recurrent_network":
        assert metrics["alignment/trunk/following_vs_energy"].notna().sum() == 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_attaching_the_probes_takes_under_forty_lines(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    lines = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert sum((node.end_lineno or 0) - node.lineno + 1 for node in lines) < 40
