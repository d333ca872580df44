"""The wheel in an empty environment, with no checkout near: what it installs, and that it runs.

    python -m benchmarks.empty_environment [--python python3.12] [--torch torch==2.13.0]

Builds the wheel, installs it into a new virtual environment first without extras, where the README's example of a model
of one's own and the guide's script run, and then with the extras of the quick start, where
`mini_gpt_pl fit -c quickstart` runs for 40 steps. Prints one line for each stage with its time and the environment's
size; ends with status 1 and the output of the first stage that fails. It takes minutes and a package index.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = "cli,data,wandb"

# What the README's example calls yours.
YOURS = """
from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Yours(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 1)])

    def training_step(self, batch, batch_idx):
        return self.layers[1](self.layers[0](batch[0]).relu()).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


Trainer = partial(Trainer, max_steps=400)
your_module, your_data = Yours(), DataLoader(TensorDataset(torch.randn(1600, 8)), 4)
"""


def example(page: str, containing: str) -> str:
    """Return the first Python block of a page that holds a text."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return next(block for block in blocks if containing in block)


def megabytes(folder: Path) -> float:
    """Size of all files below a folder, links not followed."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()) / 1e6


def main(args: Sequence[str] | None = None) -> None:
    """Run every stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the environment")
    parser.add_argument("--torch", default="torch", help="what to install first, such as torch==2.13.0")
    parser.add_argument("--steps", type=int, default=40, help="of the quick start")
    given = parser.parse_args(args)
    with tempfile.TemporaryDirectory(prefix="empty-") as folder:
        place = Path(folder).resolve()
        home, nowhere = place / "environment", place / "nowhere"
        nowhere.mkdir()
        (nowhere / "readme.py").write_text(YOURS + example("README.md", "TrajectoryRecorder"))
        (nowhere / "guide.py").write_text(example("docs/how-to/own-model.md", "__main__"))
        # Nothing of the caller's: neither the checkout's path nor its W&B settings.
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("WANDB_")}
        python, command = str(home / "bin" / "python"), str(home / "bin" / "mini_gpt_pl")

        def stage(name: str, *words: str, cwd: Path = nowhere) -> None:
            begun = time.monotonic()
            done = subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True)
            size = f"{megabytes(home):8.0f} MB" if home.exists() else ""
            print(f"{name:<36} {time.monotonic() - begun:7.1f} s {size}", flush=True)
            if done.returncode != 0:
                print(f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
                raise SystemExit(1)

        stage("wheel", given.python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(place), str(ROOT), cwd=place)
        wheel = str(next(place.glob("*.whl")))
        stage("environment", given.python, "-m", "venv", str(home))
        stage(f"install {given.torch}", python, "-m", "pip", "install", "-q", given.torch)
        stage("install the wheel", python, "-m", "pip", "install", "-q", wheel)
        stage("the README's example", python, "readme.py")
        stage("the guide's script", python, "guide.py")
        stage(f"install [{QUICKSTART}]", python, "-m", "pip", "install", "-q", f"{wheel}[{QUICKSTART}]")
        stage("mini_gpt_pl --help", command, "--help")
        stage("fit -c quickstart", command, "fit", "-c", "quickstart", "--trainer.max_steps", str(given.steps))
        stage("report", command, "report", "runs/quickstart")
        for file in ("mine/metrics.csv", "mine/trajectory.safetensors", "quickstart/report/report.html"):
            if not (nowhere / "runs" / file).is_file():
                raise SystemExit(f"runs/{file} was not written")


if __name__ == "__main__":
    main()
