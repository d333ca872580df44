"""The backbone of a recurrent network, with a composite loss whose parts are compared.

python -m notebooks.recurrent_network
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mini_gpt_pl.callbacks import GradientAlignment, Schedule, TrajectoryRecorder
from mini_gpt_pl.runs.logs import MetricsCSV


class Recurrent(LightningModule):
    """An LSTM that predicts a signal's next value and its total energy."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(1, 32, 2, batch_first=True), nn.Linear(32, 2)

    def named_losses(self, batch: Tensor) -> dict[str, Tensor]:
        """The two parts, by name: their gradients are compared with the backbone and with each other."""
        out = self.head(self.rnn(batch)[0])
        following = nn.functional.mse_loss(out[:, :-1, 0], batch[:, 1:, 0])
        energy = nn.functional.mse_loss(out[:, -1, 1], batch.square().mean((1, 2)))
        return {"following": following, "energy": energy}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Sum of the parts."""
        return torch.stack(list(self.named_losses(batch).values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(steps: int = 200, folder: str = "runs/recurrent_network") -> None:
    """Train on sines of random phase and frequency."""
    seed_everything(0)
    phase, pace = torch.rand(1000, 1) * 6.28, torch.rand(1000, 1) * 0.5 + 0.1
    signal = torch.sin(phase + pace * torch.arange(24))[..., None]
    probes = [
        TrajectoryRecorder(r"(?P<group>rnn|head).*weight", Schedule(every=20)),
        GradientAlignment(Schedule(every=5), Schedule(every=20)),
    ]
    logger = MetricsCSV(f"{folder}/metrics.csv")
    trainer = Trainer(max_steps=steps, callbacks=probes, logger=logger, default_root_dir=folder, accelerator="cpu")
    trainer.fit(Recurrent(), DataLoader(signal, 32, shuffle=True))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
