"""Several operations at once: one trunk, a head for each, and the sum of their losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.arithmetic.data import ModularArithmetic
from mini_gpt_pl.arithmetic.milestones import MILESTONES, Milestone
from mini_gpt_pl.arithmetic.module import ADAMW, ResidueClassifier
from mini_gpt_pl.arithmetic.operations import OPERATIONS, Examples, OperationName, pairs_from
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.folder import Run

# Also what the command line takes for this module's optimizer.
__all__ = ["ADAMW", "MultiTaskArithmetic", "MultiTaskClassifier", "milestones_of"]


class MultiTaskArithmetic(ModularArithmetic):
    """Several operations modulo p on the same pairs, split once: every pair has a class for each operation.

    With an operation that leaves out residue 0 among them, all do: pairs over 1 .. p - 1.

    Args:
        operations: Which; their order is that of the heads.
        split: The other arguments of `ModularArithmetic`, from `modulus` on.

    Raises:
        UserError: There is no operation, one is named twice, or a number is out of range.

    Example:
        >>> data = MultiTaskArithmetic(["add", "mul"])
        >>> data.setup()
        >>> data.sets["train"].labels.shape
        torch.Size([4608, 2])
    """

    def __init__(self, operations: Sequence[OperationName] = ("add", "mul"), **split: Any) -> None:
        if not operations or len(set(operations)) < len(operations):
            raise UserError(f"--data.operations {list(operations)}: give one or more, each once")
        super().__init__(operations[0], **split)
        self.tasks: tuple[str, ...] = tuple(operations)
        self._operations = tuple(operations)

    @override
    def build_sets(self) -> dict[str, Examples]:
        first = max(OPERATIONS[operation].first for operation in self._operations)
        pairs = [pairs_from(operation, self.classes, first) for operation in self._operations]
        return self._split(Examples(pairs[0].tokens, torch.stack([part.labels for part in pairs], 1)))


class MultiTaskClassifier(ResidueClassifier):
    """One encoder with a head for each task; the loss is the sum of the tasks' cross-entropies.

    The heads are one linear layer with p rows for each task, which starts as separate layers would. Accuracy on a set
    is that of the task that is worst on it, so that milestones are reached by all tasks.

    Args:
        classes: Number of classes of each task; on the command line it comes from the data, as do the tasks.
        tasks: Their names, in the order of the labels' columns.
        single: The other arguments of `ResidueClassifier`.

    Example:
        >>> sum(p.numel() for p in MultiTaskClassifier(tasks=("add", "mul")).parameters())
        302914
    """

    def __init__(self, classes: int = 97, tasks: Sequence[str] = ("add", "mul"), **single: Any) -> None:
        super().__init__(classes=classes * len(tasks), **single)
        self.tasks = tuple(tasks)

    @override
    def batch_loss(self, batch: Examples) -> Tensor:
        """Sum of the tasks' mean cross-entropies of one batch, in nats."""
        return self._losses(self(batch.tokens), batch.labels).sum()

    @override
    def named_losses(self, batch: Examples) -> dict[str, Tensor]:
        """Mean cross-entropy of each task, by its name."""
        losses = self._losses(self(batch.tokens), batch.labels)
        return dict(zip(self.tasks, losses.unbind(), strict=True))

    @override
    @torch.no_grad()
    def score(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Sum of the tasks' losses in nats, and the accuracy of the task that is worst, on a whole set."""
        losses, accuracies = self._score(examples)
        return losses.sum(), accuracies.min()

    @override
    @torch.no_grad()
    def evaluate(self, sets: dict[str, Examples]) -> dict[str, Tensor]:
        """Loss and accuracy of each task on each whole set beside those of all together."""
        metrics = super().evaluate({})
        for name, examples in sets.items():
            losses, accuracies = self._score(examples)
            metrics |= {f"eval/{name}_loss": losses.sum(), f"eval/{name}_accuracy": accuracies.min()}
            for task, loss, accuracy in zip(self.tasks, losses, accuracies, strict=True):
                metrics |= {f"eval/{name}_{task}_loss": loss, f"eval/{name}_{task}_accuracy": accuracy}
        return metrics

    def _score(self, examples: Examples) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        logits = self(examples.tokens)
        right = self._by_task(logits).argmax(-1) == examples.labels
        return self._losses(logits, examples.labels), right.float().mean(0)

    def _losses(self, logits: Float[Tensor, "B KC"], labels: Int[Tensor, "B K"]) -> Float[Tensor, " K"]:
        losses = F.cross_entropy(self._by_task(logits).transpose(1, 2), labels, reduction="none")  # classes are axis 1
        return losses.mean(0)

    def _by_task(self, logits: Float[Tensor, "B KC"]) -> Float[Tensor, "B K C"]:
        return logits.unflatten(-1, (len(self.tasks), -1))


def milestones_of(run: Run, task: str) -> dict[str, int | None]:
    """Step of every milestone of one task of a finished run, None for one that it did not reach.

    Raises:
        UserError: The run has no such task.

    Example:
        >>> from pathlib import Path
        >>> milestones_of(Run(Path("runs/grokking/multitask")), "mul")["test_90"]  # doctest: +SKIP
    """

    def of(milestone: Milestone) -> int | None:
        series = run.series(f"eval/{milestone.of}_{task}_accuracy")
        if series.empty:
            raise UserError(f"{run.path} recorded no accuracy of a task {task!r}: give one of its data.operations")
        return milestone.in_series(series)

    return {milestone.name: of(milestone) for milestone in MILESTONES}
