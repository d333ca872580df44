"""ProbedGPT: the model, the composite objective, the optimizer and the evaluation, as one LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.logs import log_now, logging_due
from mini_gpt_pl.stories.data.datamodule import Batch
from mini_gpt_pl.stories.evaluation import EVALUATIONS, StoryEvaluation
from mini_gpt_pl.stories.gpt import GPT, PRESETS, GPTSize
from mini_gpt_pl.stories.objective import (
    IGNORE,
    LossTerms,
    ProbeWeight,
    TargetCounts,
    combine,
    count_targets,
    loss_terms,
)
from mini_gpt_pl.stories.packing import pack
from mini_gpt_pl.stories.scoring import Scores
from mini_gpt_pl.training.optimizers import ClippedCosine, decay_groups, lambda_lr
from mini_gpt_pl.training.sums import Sums

# The paper's optimizer, an AdamW.
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.5}
# Summed over the micro-batches of one optimizer step, and over the ranks.
WINDOW = ("train/loss", "train/lm_loss", "train/probe_loss", "train/probe_accuracy")


class ProbedGPT(LightningModule):
    """A small GPT trained on L = L_LM + lambda(t) L_probe.

    Args:
        size: A preset (`quickstart`, `16m`, `51m`) or the sizes themselves.
        vocab_size: Number of tokens; on the command line it comes from the data.
        context: Longest sequence in tokens; on the command line it comes from the data.
        vocab_multiple: Pads the token table to a multiple (64 suits tensor cores).
        optimizer: Any optimizer, by class path and arguments. It receives two parameter groups: matrices and embedding
            tables, and the LayerNorms, which are never decayed.
        schedule: Factor on the learning rate, a linear warm-up and a cosine clipped at a floor.
        probe_weight: lambda(t), in two phases.
        compile: Compile the model with `torch.compile`, in place: parameter names stay as they are.
    """

    def __init__(
        self,
        size: Literal["quickstart", "16m", "51m"] | GPTSize = "51m",
        vocab_size: int = 50257,
        context: int = 256,
        vocab_multiple: int = 1,
        optimizer: OptimizerCallable = lambda params: AdamW(params, **ADAMW),
        schedule: ClippedCosine = ClippedCosine(),  # noqa: B008 (frozen)
        probe_weight: ProbeWeight = ProbeWeight(),  # noqa: B008 (frozen)
        compile: bool = False,
    ) -> None:
        super().__init__()
        sizes = PRESETS[size] if isinstance(size, str) else size
        self.gpt = GPT(replace(sizes, context=context), vocab_size, vocab_multiple)
        self.make_optimizer = optimizer
        self.schedule: Callable[[int], float] = schedule
        self.probe_weight = probe_weight
        self.peak_lr: float | None = None
        self._compile = compile
        self.evaluation = StoryEvaluation()
        self._window = Sums(WINDOW)
        self._window_begun = 0  # optimizer steps that were done when the present one began
        self._grad_norm: Tensor | None = None
        self._lr_used = 0.0
        self._configured: list[dict[str, Any]] = []

    # ------------------------------------------------------------------------------------------------ model

    @override
    def configure_model(self) -> None:
        if self._compile:
            self.gpt.compile()  # in place: `gpt.blocks...` keeps its name, and a checkpoint loads without it
            self._compile = False

    @override
    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        logits: Tensor = self.gpt(tokens)
        return logits

    # --------------------------------------------------------------------------------------------- training

    def lambda_now(self) -> float:
        """Weight of the probe loss at the optimizer step being prepared."""
        return self.probe_weight(self.trainer.global_step + 1)

    def _scores(self, batch: Batch) -> Scores:
        # Their number is another in every batch: without this, a compiler would first build for one of them.
        torch._dynamo.maybe_mark_dynamic(batch.rows, 0)
        scores: Scores = self.gpt(batch.tokens, batch.targets, batch.packing)
        return scores

    def named_losses(self, batch: Batch) -> Mapping[str, Tensor]:
        """Losses of one batch taken alone, by name, for probes that need their gradients apart.

        Each is computed when it is asked for. With several ranks their mean over the ranks is the loss of all the
        ranks' batches together.
        """
        return _OnDemand({"lm": lambda: self._named_terms(batch).lm, "probe": lambda: self._probe_loss(batch)})

    def _probe_loss(self, batch: Batch) -> Tensor:
        """L_probe from the sequences that hold a probe: one in ten, at a tenth of a forward and backward pass."""
        probed = batch.probe_mask.any(-1, keepdim=True)
        few = batch._replace(**pack(batch.targets.masked_fill(~probed, IGNORE))._asdict())
        # A graph of its own, for so few rows, would take long to compile.
        with torch.compiler.set_stance("force_eager"):
            return self._named_terms(few).probe

    def _named_terms(self, batch: Batch) -> LossTerms:
        scores = self._scores(batch)
        counts = torch.stack(count_targets(batch.targets, batch.probe_mask))
        of_all = TargetCounts(*self._sum_over_ranks(counts)().unbind())
        terms = loss_terms(scores.nll, batch.targets, batch.probe_mask, of_all)
        return LossTerms(*(term * self._ranks() for term in terms))

    def batch_terms(self, batch: Batch) -> tuple[LossTerms, TargetCounts]:
        """L_LM and L_probe of one batch taken alone, on this rank alone, and what each is a mean over."""
        scores = self._scores(batch)
        counts = count_targets(batch.targets, batch.probe_mask)
        return loss_terms(scores.nll, batch.targets, batch.probe_mask, counts), counts

    def batch_loss(self, batch: Batch) -> Tensor:
        """Training loss of one batch taken alone, on this rank alone: L_LM + lambda(t) L_probe with its own means."""
        return combine(*self.batch_terms(batch), self.lambda_now())

    def sample_loss(self, batch: Batch, index: int) -> Tensor:
        """Share of one sequence in `batch_loss`, times the number of sequences: their mean is `batch_loss`.

        Normalised by the counts of the batch, since few sequences hold a probe: alone, one would weigh by its own.
        """
        one = slice(index, index + 1)
        scores = self.gpt(batch.tokens[one], batch.targets[one])
        counts = count_targets(batch.targets, batch.probe_mask)
        terms = loss_terms(scores.nll, batch.targets[one], batch.probe_mask[one], counts)
        return combine(terms, counts, self.lambda_now()) * len(batch.tokens)

    def sampled_loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood of labels drawn from the model, and their number, for the true Fisher.

        A label is drawn at every position that has a target; lambda plays no part, as it is no probability.
        """
        logits = self.gpt(batch.tokens)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, T, V)
        # Sequence by sequence: the probabilities of a whole batch would be a second set of logits.
        # p / E with E exponential is largest at a label drawn from p; torch.multinomial would wait for the device.
        drawn = [
            (row.softmax(-1) / torch.empty_like(row).exponential_(generator=generator)).argmax(-1)
            for row in logits.detach()
        ]
        labels = torch.stack(drawn).masked_fill(batch.targets == IGNORE, IGNORE)  # (B, T)
        count = (labels != IGNORE).sum()
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        return nll / count.clamp_min(1), count

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        on_their_way = self._sum_over_ranks(torch.stack([batch.lm_count, batch.probe_count]))
        scores = self._scores(batch)
        counts = TargetCounts(*on_their_way().unbind())
        terms = loss_terms(scores.nll, batch.targets, batch.probe_mask, counts)
        answered = (scores.hit & batch.probe_mask).sum() / counts.probe.clamp_min(1)
        loss = combine(terms, counts, self.lambda_now())
        self._window.update(torch.stack([loss, terms.lm, terms.probe, answered]))
        # The terms are shares of the whole optimizer batch already; Lightning is about to divide by the number of
        # micro-batches, and DDP by the number of ranks, as if each had brought a mean of its own.
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def _ranks(self) -> int:
        return 1 if self._trainer is None else self.trainer.world_size

    def _sum_over_ranks(self, values: Float[Tensor, " n"] | Int[Tensor, " n"]) -> Callable[[], Tensor]:
        """Send values; the result gives their sum over the ranks.

        Not by the strategy's own reduction: it begins with a barrier, for which the host waits until the device has
        nothing left to do.
        """
        if self._ranks() == 1:
            return lambda: values
        work = dist.all_reduce(values, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return values

        return finish

    @override
    def on_train_start(self) -> None:
        self._begin_window(self.trainer.global_step)
        if self.trainer.global_step > 0:
            self._reapply_settings()

    def _reapply_settings(self) -> None:
        """Give a resumed optimizer the configured settings: a checkpoint restores its own over them."""
        optimizer = self.trainer.optimizers[0]
        for group, configured in zip(optimizer.param_groups, self._configured, strict=True):
            group.update(configured)
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            scheduler.base_lrs = [configured["initial_lr"] for configured in self._configured]
            rates = [rate * self.schedule(scheduler.last_epoch + 1) for rate in scheduler.base_lrs]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        if step == self._window_begun:
            return  # still accumulating
        if step == 1 or logging_due(self.trainer, step):
            norm = {} if self._grad_norm is None else {"train/grad_norm": self._grad_norm}
            rates = {"train/lr": self._lr_used, "train/probe_weight": self.probe_weight(step)}
            numbers = log_now(self.trainer, {**self._window.compute(), **norm, **rates}, step)
            self._show("loss", numbers["train/loss"], prog_bar=True)
        self._begin_window(step)

    def _begin_window(self, step: int) -> None:
        self._window.reset()
        self._window_begun = step

    def _show(self, name: str, value: float, *, prog_bar: bool) -> None:
        """Tell the progress bar and checkpoint monitors.

        On the host: Lightning asks for the value of what it shows after every batch, and of a number on the device
        that would be a wait for the device at every step.
        """
        self.log(name, torch.tensor(value), prog_bar=prog_bar, logger=False)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning's own way refuses fused optimizers under mixed precision, and hides the norm.
        self._lr_used = float(optimizer.param_groups[0]["lr"])
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradient_clip_val is not None and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
            return
        limit = float("inf") if gradient_clip_val is None else float(gradient_clip_val)
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        self._grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2 gives each rank its share

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        # An iterable of groups is what every torch optimizer takes; the callable's type only knows parameters.
        try:
            optimizer = self.make_optimizer(decay_groups(self))
        except ValueError as error:
            raise UserError(f"the optimizer refuses its settings: {error}; correct --model.optimizer") from None
        if self.peak_lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.peak_lr
        schedule = lambda_lr(optimizer, self.schedule)  # sets initial_lr in each group
        self._configured = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------------------------------- evaluation

    @override
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        # Nothing here waits for the device: it computes one batch while the host prepares the next.
        for column in (batch.tokens, batch.targets, batch.probe_mask, batch.offsets):
            torch._dynamo.maybe_mark_dynamic(column, 0)  # the sets have batches of several sizes: one graph for all
        self.evaluation.update(batch, self._scores(batch), EVALUATIONS[dataloader_idx])

    @override
    def on_validation_epoch_start(self) -> None:
        self.evaluation.reset()

    @override
    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        metrics = self.evaluation.compute()
        for name, value in metrics.items():
            self._show(name, value, prog_bar=name in ("val/loss", "probe/p_in", "probe/p_ood"))
        log_now(self.trainer, metrics, self.trainer.global_step)

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    # ------------------------------------------------------------------------------------------ generation

    @override
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> Int[Tensor, "B S"]:
        """Continue a prompt; the batch holds the prompt's tokens and the settings of `GPT.generate`."""
        settings = dict(batch)
        tokens = settings.pop("tokens")
        generator = torch.Generator(tokens.device).manual_seed(settings.pop("seed"))
        return self.gpt.generate(tokens, generator=generator, **settings)

    # ------------------------------------------------------------------------------------------ checkpoints

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["gpt"] = self._identity()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_identity(checkpoint, self)

    def _identity(self) -> dict[str, int]:
        return {"vocab_size": self.gpt.vocab_size, **asdict(self.gpt.size)}


class _OnDemand(Mapping[str, Tensor]):
    """Losses that are computed when they are asked for, each time anew."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def check_identity(checkpoint: Mapping[str, Any], module: ProbedGPT) -> None:
    """Refuse a checkpoint of another architecture or vocabulary before torch lists every tensor that does not fit.

    Raises:
        UserError: Naming the first number that differs.
    """
    sizes = checkpoint.get("gpt")
    if sizes is None:
        raise UserError("the checkpoint was not written by this project's model: it names no GPT sizes")
    for name, value in module._identity().items():
        if sizes.get(name) != value:
            raise UserError(
                f"the checkpoint's model has {name} {sizes.get(name)}, the configured one {value}: "
                "use the tokenizer and the model size that the checkpoint was trained with"
            )
