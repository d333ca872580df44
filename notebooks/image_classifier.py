"""The backbone of your own LightningModule, here a small image classifier: name its weights with a pattern.

python -m notebooks.image_classifier
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mini_gpt_pl.callbacks import GradientAlignment, Schedule, TrajectoryRecorder
from mini_gpt_pl.runs.logs import MetricsCSV


class Classifier(LightningModule):
    """Two convolutions, batch norm, dropout and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        stem = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
        body = [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16 * 49, 10)]
        self.layers = nn.Sequential(*stem, *body)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with decay."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.1)


def main(steps: int = 200, folder: str = "runs/image_classifier") -> None:
    """Train on synthetic images whose class is the brightest of ten patches."""
    seed_everything(0)
    images = torch.rand(2000, 1, 14, 14)
    labels = nn.functional.avg_pool2d(images, (3, 7)).flatten(1)[:, :10].argmax(1).clamp_max(9)
    probes = [
        TrajectoryRecorder(r"(?P<group>layers\.\d+)\.weight", Schedule(every=20)),
        GradientAlignment(Schedule(every=5)),
    ]
    logger = MetricsCSV(f"{folder}/metrics.csv")
    trainer = Trainer(max_steps=steps, callbacks=probes, logger=logger, default_root_dir=folder, accelerator="cpu")
    trainer.fit(Classifier(), DataLoader(TensorDataset(images, labels), 64, shuffle=True))


if __name__ == "__main__":
    main()
