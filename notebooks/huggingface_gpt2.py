"""The backbone of a Hugging Face GPT-2, whose matrices transformers keeps as Conv1D.

python -m notebooks.huggingface_gpt2
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from mini_gpt_pl.callbacks import GradientAlignment, Schedule, TrajectoryRecorder
from mini_gpt_pl.runs.logs import MetricsCSV


class HuggingFaceGPT(LightningModule):
    """transformers' own loss; its trunk is `transformer.h.N`."""

    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=2, n_head=2)
        self.net = GPT2LMHeadModel(config)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Next-token cross entropy."""
        loss: Tensor = self.net(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 200, folder: str = "runs/huggingface_gpt2") -> None:
    """Train on counting sequences: each token is the one before it plus a step that the sequence keeps."""
    seed_everything(0)
    start, step = torch.randint(0, 128, (2000, 1)), torch.randint(1, 6, (2000, 1))
    tokens = (start + step * torch.arange(32)) % 128
    pattern = r"(?P<group>transformer\.h\.\d+)\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))\.weight"
    probes = [TrajectoryRecorder(pattern, Schedule(every=20)), GradientAlignment(Schedule(every=5))]
    logger = MetricsCSV(f"{folder}/metrics.csv")
    trainer = Trainer(max_steps=steps, callbacks=probes, logger=logger, default_root_dir=folder, accelerator="cpu")
    trainer.fit(HuggingFaceGPT(), DataLoader(tokens, 32, shuffle=True))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
