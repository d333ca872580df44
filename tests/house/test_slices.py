"""The core knows no task: without a study's slice, or both, all else imports, trains with every probe, and reports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLICES = ("stories", "arithmetic")

# The first lines of each script: the copy is the only place that the package can come from.
ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
copy = sys.argv[1]
sys.path.insert(0, copy)
"""

EVERY_MODULE = (
    ALONE
    + """
import importlib, pkgutil
import mini_gpt_pl
names = [found.name for found in pkgutil.walk_packages(mini_gpt_pl.__path__, "mini_gpt_pl.")]
for name in names:
    if name.endswith("__main__"):
        continue
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name == "triton", error  # the kernels', which builds of torch for CPUs do not have
    else:
        assert (module.__file__ or copy).startswith(copy), module.__file__
from mini_gpt_pl.tasks import tasks
print(len(names), *sorted(tasks()))
"""
)

TRAINS = (
    ALONE
    + """
import runpy
from pathlib import Path
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import mini_gpt_pl.callbacks as house
from mini_gpt_pl.callbacks import *

class Plain(LightningModule):
    "Attention over eight positions, then a regression: what any reader's module might be."
    def __init__(self):
        super().__init__()
        self.qk, self.head = nn.Linear(4, 8), nn.Linear(4, 1)

    def attention(self, batch):
        q, k = self.qk(batch[0]).chunk(2, -1)
        return [((q @ k.mT) / 2).softmax(-1).unsqueeze(1)]

    def batch_loss(self, batch):
        mixed = self.attention(batch)[0][:, 0] @ batch[0]
        return (self.head(mixed)[:, -1, 0] - batch[1]).square().mean()

    def draw_batch(self, generator, size=None):
        x = torch.from_numpy(generator.standard_normal((size or 8, 8, 4))).float()
        return [x, x[:, -1].sum(-1)]

    def training_step(self, batch, batch_idx):
        return self.batch_loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/score", -self.batch_loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)

class Own(CalibratedProbe):
    needs = ("gradient",)
    def measure(self, seen):
        return {"norm": seen.gradient.dots(seen.gradient).sum()}

seed_everything(0, verbose=False)
often = Schedule(every=2)
probes = [
    TrajectoryRecorder(r"(?P<group>qk|head)[.]weight", often),
    GradientAlignment(Schedule(every=1)),
    StreamingFisher(Schedule(every=1)),
    FisherProbe(Schedule(every=8), batches=2),
    CommutatorProbe(Schedule(every=8), samples=2),
    OptimizerAnatomy(often, counterfactual_beta2=[0.5], split=True),
    SwitchingProbe("val/score", prominence=0.0),
    AttentionProbe(Schedule(every=8), ks=[1, 2], size=4),
    Own(often),
    CostControl(), DataWait(), GeometryPictures(often), LiveNumbers(),
    StopOnDivergence(), SettledObjects(), AgreedTermination(), WandbSegments(),
]
# Every callback that a reader finds there is among them; two more change training, which is what they are for.
classes = {name: getattr(house, name) for name in house.__all__}
offered = {name for name, found in classes.items() if isinstance(found, type) and issubclass(found, Callback)}
used = {base.__name__ for probe in probes for base in type(probe).__mro__}
assert offered - used == {"Kick", "SubspaceIntervention"}, offered - used

def loader(n):
    x = torch.randn(n, 8, 4)
    return DataLoader(TensorDataset(x, x[:, -1].sum(-1)), 8)

trainer = Trainer(
    max_steps=32, accelerator="cpu", default_root_dir="mine", logger=MetricsCSV("mine/metrics.csv"), callbacks=probes,
    val_check_interval=4, log_every_n_steps=2, enable_model_summary=False, num_sanity_val_steps=0,
)
trainer.fit(Plain(), loader(256), loader(16))
header = Path("mine/metrics.csv").read_text().splitlines()[0].split(",")
families = {name.split("/")[0] for name in header}
wanted = {"backbone", "alignment", "fisher", "commutator", "anatomy", "attention", "own"}
assert wanted <= families, wanted - families

def command(*words):
    sys.argv = ["mini_gpt_pl", *words]
    try:
        runpy.run_module("mini_gpt_pl.main", run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code

command("report", "mine")
command("explain", "backbone/trunk/pc1")
command("explain", "anatomy/trunk/update_size")
assert "PC1" in Path("mine/report/report.html").read_text()
print("reported")
"""
)


@pytest.fixture(scope="module", params=[("stories",), ("arithmetic",), SLICES], ids="+".join)
def copy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """The package as it is installed, without slices."""
    gone: tuple[str, ...] = request.param
    folder = tmp_path_factory.mktemp("copy")
    skipped = shutil.ignore_patterns("__pycache__")
    package = shutil.copytree(ROOT / "mini_gpt_pl", folder / "mini_gpt_pl", ignore=skipped)
    for room in ("callbacks", "configs"):
        shutil.copytree(ROOT / room, package / room, ignore=skipped)
    for name in gone:
        shutil.rmtree(package / name)
    return folder, gone


def run(script: str, folder: Path, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], cwd=cwd, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_every_other_module_imports(copy: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    folder, gone = copy
    count, *tasks = run(EVERY_MODULE, folder, tmp_path).split()
    assert int(count) > 100
    left = {"stories": {"stories"}, "arithmetic": {"operations", "multitask", "markers"}}
    assert set(tasks) == set().union(*(names for name, names in left.items() if name not in gone))


def test_a_plain_module_trains_with_every_probe_and_has_a_report(
    copy: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    assert run(TRAINS, copy[0], tmp_path).rstrip().endswith("reported")
