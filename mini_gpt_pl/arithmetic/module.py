"""ResidueClassifier: the encoder, cross-entropy, the optimizer and the evaluation, as one LightningModule."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from mini_gpt_pl.arithmetic.encoder import Encoder, EncoderSize
from mini_gpt_pl.arithmetic.operations import Examples
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.concentration import Change
from mini_gpt_pl.runs.logs import log_now, logging_due

# The paper's optimizer, an AdamW.
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 1.0}


class ResidueClassifier(LightningModule):
    """A small encoder trained with cross-entropy, its optimizer on all parameters alike, at a constant learning rate.

    Embeddings, LayerNorms and biases are decayed too: one parameter group, as in arXiv 2602.16746.

    Args:
        size: Shape of the blocks.
        vocab_size: Number of tokens; on the command line it comes from the data, as do the next three.
        classes: Number of classes.
        length: Tokens in a sequence.
        causal: Mask later positions and read the last one; else no mask, and position 0 is read.
        identical_blocks: Start all blocks from the same values, as the original does.
        optimizer: Any optimizer, by class path and arguments.
        seed: Of the initial weights. On the command line it is `seed_everything`.

    Example:
        >>> module = ResidueClassifier(EncoderSize(n_layer=1, d_model=64, d_ff=128), vocab_size=59, classes=59)
        >>> sum(p.numel() for p in module.parameters())
        41339
    """

    def __init__(
        self,
        size: EncoderSize = EncoderSize(),  # noqa: B008 (frozen)
        vocab_size: int = 97,
        classes: int = 97,
        length: int = 2,
        causal: bool = False,
        identical_blocks: bool = True,
        optimizer: OptimizerCallable = lambda params: AdamW(params, **ADAMW),
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(size, vocab_size, classes, length, causal, identical_blocks, seed)
        self.make_optimizer = optimizer
        self._loss: Tensor | None = None
        self._grad_norm: Tensor | None = None
        self._lr_used = 0.0
        self._evaluated: dict[str, Tensor] = {}
        self._configured: list[dict[str, Any]] = []

    @override
    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B C"]:
        logits: Tensor = self.encoder(tokens)
        return logits

    def batch_loss(self, batch: Examples) -> Tensor:
        """Mean cross-entropy of one batch, in nats."""
        return F.cross_entropy(self(batch.tokens), batch.labels)

    def named_losses(self, batch: Examples) -> dict[str, Tensor]:
        """The one loss that there is, by its name."""
        return {"cross_entropy": self.batch_loss(batch)}

    @override
    def training_step(self, batch: Examples, batch_idx: int) -> Tensor:
        loss = self.batch_loss(batch)
        self._loss = loss.detach()
        return loss

    @override
    def on_train_start(self) -> None:
        # A checkpoint restores its own settings over the configured ones.
        if self.trainer.global_step > 0:
            for group, configured in zip(self.trainer.optimizers[0].param_groups, self._configured, strict=True):
                group.update(configured)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        if self._grad_norm is None or not (step == 1 or logging_due(self.trainer, step)):
            return
        assert self._loss is not None
        metrics: dict[str, Tensor | float] = {"train/loss": self._loss, "train/grad_norm": self._grad_norm}
        metrics["train/lr"] = self._lr_used
        self._grad_norm = None  # with accumulation, later micro-batches have the same step
        self.show("loss", log_now(self.trainer, metrics, step)["train/loss"])

    def show(self, name: str, value: float) -> None:
        """Tell the progress bar; on the host, since Lightning asks for the value after every batch."""
        self.log(name, torch.tensor(value), prog_bar=True, logger=False)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning's own way refuses fused optimizers under mixed precision, and hides the norm.
        if gradient_clip_algorithm == "value":
            raise UserError("--trainer.gradient_clip_algorithm value: this task clips the norm; leave it out")
        self._lr_used = float(optimizer.param_groups[0]["lr"])
        limit = float("inf") if gradient_clip_val is None else float(gradient_clip_val)
        # The optimizer's own list: to walk through the module takes longer than to clip.
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)

    @override
    def configure_optimizers(self) -> Optimizer:
        try:
            optimizer = self.make_optimizer(self.parameters())
        except ValueError as error:
            raise UserError(f"the optimizer refuses its settings: {error}; correct --model.optimizer") from None
        self._configured = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        return optimizer

    @torch.no_grad()
    def score(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nats and share of right answers (argmax) on a whole set, on the device."""
        logits = self(examples.tokens)
        right = logits.argmax(-1) == examples.labels
        return F.cross_entropy(logits, examples.labels), right.float().mean()

    @property
    def query_position(self) -> int:
        """The position that the answer is read at."""
        return -1 if self.encoder.causal else 0

    def attention(self, batch: Examples) -> list[Float[Tensor, "B nh T T"]]:
        """Attention weights of every block for one batch."""
        return self.encoder.attention(batch.tokens)

    def accuracy_through(self, batch: Examples, change: Change) -> Float[Tensor, ""]:
        """Share of right answers with every block's attention weights replaced by a function of them."""
        with self.encoder.attending(change):
            return self.score(batch)[1]

    def evaluate(self, sets: dict[str, Examples]) -> dict[str, Tensor]:
        """Loss and accuracy on each whole set, and ||theta|| of all parameters, under the names that are logged."""
        metrics: dict[str, Tensor] = {}
        for name, examples in sets.items():
            metrics[f"eval/{name}_loss"], metrics[f"eval/{name}_accuracy"] = self.score(examples)
        return metrics | {"eval/weight_norm": self.weight_norm()}

    def weight_norm(self) -> Tensor:
        """||theta||, Euclidean, over all parameters."""
        return torch.nn.utils.get_total_norm([parameter.detach() for parameter in self.parameters()])

    @override
    def validation_step(self, batch: Examples, batch_idx: int, dataloader_idx: int = 0) -> None:
        name = list(self.trainer.datamodule.sets)[dataloader_idx]  # type: ignore[attr-defined]
        self._evaluated |= self.evaluate({name: batch})

    @override
    def test_step(self, batch: Examples, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    @override
    def on_validation_epoch_end(self) -> None:
        metrics, self._evaluated = self._evaluated, {}
        if not self.trainer.sanity_checking:
            log_now(self.trainer, metrics, self.trainer.global_step)

    @override
    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another shape in one line, before torch lists every tensor that does not fit.

        Raises:
            UserError: Naming the first weight that differs.
        """
        stored = checkpoint["state_dict"]
        for name, own in self.state_dict().items():
            shape = tuple(stored[name].shape) if name in stored else None
            if shape != tuple(own.shape):
                raise UserError(
                    f"the checkpoint's {name} is {'missing' if shape is None else shape}, the configured model's "
                    f"{tuple(own.shape)}: use the model size and the data that the checkpoint was trained with"
                )
