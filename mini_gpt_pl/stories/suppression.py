"""Take the direction in which the two objectives differ out of every gradient, as training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from mini_gpt_pl.callbacks.bases import BasisSource
from mini_gpt_pl.callbacks.intervention import SubspaceIntervention
from mini_gpt_pl.callbacks.measuring import gradient_of, measuring
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.directions.subspace import Basis
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.vectors.products import inner_products
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.stories.data.batch import Batch
from mini_gpt_pl.stories.data.datamodule import EVALUATION_SETS, ProbedStories
from mini_gpt_pl.stories.data.probe import Stream, sample_rng
from mini_gpt_pl.stories.module import ProbedGPT

FOLDER = "suppression"


class ObjectiveSuppression(SubspaceIntervention):
    r"""Suppress g <- g - s B B^T g, B a basis of the latest directions in which the two objectives' gradients differ.

    Every `every` optimizer steps, v = unit(g_probe - g_lm): g_lm the gradient of the language model's loss on one
    training batch, g_probe that of the probe's loss on as many questions at the gaps of training. B has the leading
    `rank` right singular vectors, uncentred, of the last `history` of them. The gradient is changed behind clipping.

    The arm `random` is the control of equal strength: each direction of B becomes one drawn at random that has the same
    length in every weight. Its strength in the gradient is what chance holds, `parallel_null` in what is logged; see
    `SubspaceIntervention`.

    The directions lie in `suppression/<name>` of the run's folder, 4 D bytes each. A checkpoint names those that count,
    and a resume reads them, so that none is deleted while the run lasts; batches are a function of the data's seed and
    the step.

    Args:
        strength: s, from 0 (nothing) to 1 (all of it).
        rank: Directions of the basis.
        every: Steps between two of them.
        history: Most of them that count.
        batch_size: Stories, and questions, of a gradient.
        arm: Whose directions are suppressed.
        pattern: Of the weights; all of them by default.
        seed: Of the random arm.
        name: In metric names and of the folder.

    Raises:
        UserError: A setting is out of range, or the data are no probed stories.

    Example:
        >>> ObjectiveSuppression(strength=0.3).parallel
        0.7
    """

    def __init__(
        self,
        strength: float = 1.0,
        rank: int = 3,
        every: int = 200,
        history: int = 50,
        batch_size: int = 64,
        arm: Literal["objectives", "random"] = "objectives",
        pattern: str = "",
        seed: int = 0,
        name: str = "objectives",
    ) -> None:
        if not 0 <= strength <= 1 or min(rank, every, batch_size) < 1 or history < rank:
            raise UserError(
                f"ObjectiveSuppression: strength {strength} (0 to 1), rank {rank}, every {every}, batch_size "
                f"{batch_size} (1 or more), history {history} (rank or more)"
            )
        super().__init__(parallel=1.0 - strength, orthogonal=1.0, basis=cast(BasisSource, _Latest(self)), name=name)
        self.strength = strength
        self.rank = rank
        self.interval = every
        self.history = history
        self.batch_size = batch_size
        self.arm = arm
        self.pattern = pattern
        self.seed = seed
        self._directions: dict[int, Vector] = {}
        self._gram = torch.zeros(0, 0, dtype=torch.float64)  # their inner products
        self._past: list[int] = []  # steps of those that a checkpoint counts on
        self._files: SnapshotFolder | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._past = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(trainer.datamodule, ProbedStories):  # type: ignore[attr-defined]
            raise UserError("ObjectiveSuppression: it needs questions to ask, and the data are no probed stories")
        selection = ParameterSelection.of(pl_module, self.pattern)
        self._files = SnapshotFolder(Path(trainer.default_root_dir) / FOLDER / self.name, selection, limit=2)
        self._directions, self._gram = {}, torch.zeros(0, 0, dtype=torch.float64)
        for step in self._past:
            self._take(step, self._files.read(step))
        if not self._past:
            self._add_direction(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        step = trainer.global_step
        if step % self.interval == 0 and step not in self._directions:
            self._add_direction(trainer, pl_module)
            assert self._steering is not None and self.basis is not None
            self._steering = type(self._steering)(self.basis.build(pl_module), self.parallel, self.orthogonal)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._files is not None:
            self._files.close()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._files is not None:
            self._files.flush()  # a resume from this checkpoint reads them

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "directions": list(self._directions)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._past = list(state_dict["directions"])

    def _add_direction(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._files is not None
        data, step = cast(ProbedStories, trainer.datamodule), trainer.global_step  # type: ignore[attr-defined]
        rng = sample_rng(data.seed, Stream.SUPPRESSION, 0, step)
        batches = {"lm": data.draw_batch(rng, self.batch_size), "probe": _questions(data, rng, self.batch_size)}
        gradients = {}
        with measuring(trainer, module):
            for name, batch in batches.items():
                there = trainer.strategy.batch_to_device(batch, module.device)
                gradients[name] = gradient_of(
                    lambda name=name, there=there: cast(ProbedGPT, module).named_losses(there)[name],  # type: ignore[misc]
                    self._files.selection,
                    module,
                    name,
                )
        difference = gradients["probe"].values - gradients["lm"].values
        unit = Vector((difference / difference.norm().clamp_min(1e-30)).cpu(), self._files.selection)
        if trainer.is_global_zero:
            self._files.write(step, unit)
        self._take(step, unit)

    def _take(self, step: int, unit: Vector) -> None:
        """Let a direction count, and the oldest no longer where there are more than `history`."""
        directions = [*self._directions.values(), unit]
        row = [inner_products(unit.values[None], one.values[None], unit.selection).sum() for one in directions]
        self._gram = torch.nn.functional.pad(self._gram, (0, 1, 0, 1))
        self._gram[-1] = self._gram[:, -1] = torch.stack(row)
        self._directions[step] = unit
        if len(self._directions) > self.history:
            del self._directions[next(iter(self._directions))]
            self._gram = self._gram[1:, 1:]

    def latest_basis(self, device: torch.device) -> Basis:
        """The basis of the directions so far, on a device: fewer than `rank` of them at the beginning."""
        directions = list(self._directions.values())
        rows = leading(directions, self._gram, self.rank)
        selection = directions[0].selection
        if self.arm == "random":
            generator = torch.Generator().manual_seed(self.seed * (1 << 32) + max(self._directions))
            rows = alike_in_every_weight(rows, selection, generator)
        return Basis.of(selection, [("all", slice(0, selection.dim), rows)]).to(device, torch.float32)


class _Latest:
    """Stands for a `BasisSource` whose basis is another one after every new direction."""

    def __init__(self, owner: ObjectiveSuppression) -> None:
        self._owner = owner

    def build(self, module: nn.Module) -> Basis:
        return self._owner.latest_basis(next(module.parameters()).device)


def leading(directions: Sequence[Vector], gram: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "k D"]:
    """Leading right singular vectors of n vectors as rows, uncentred; at most as many as are independent.

    Args:
        directions: The vectors.
        gram: Their inner products.
        rank: Most rows.
    """
    energy, vectors = torch.linalg.eigh(gram)
    chosen = [k for k in range(len(gram) - 1, -1, -1) if energy[k] > 1e-10 * energy[-1]][:rank]
    rows = torch.zeros(len(chosen), directions[0].selection.dim)
    for direction, coefficients in zip(directions, vectors[:, chosen] / energy[chosen].sqrt(), strict=True):
        rows.addr_(coefficients.float(), direction.values)  # not stacked: fifty vectors of a model are large
    return rows


def alike_in_every_weight(
    rows: Float[Tensor, "k D"], selection: ParameterSelection, generator: torch.Generator
) -> Float[Tensor, "k D"]:
    """Random rows, each of which is as long in every weight as the one that it stands for."""
    drawn = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
    parts = zip(drawn.split(selection.sizes, -1), rows.split(selection.sizes, -1), strict=True)
    return torch.cat([new * (old.norm(dim=-1) / new.norm(dim=-1))[:, None] for new, old in parts], -1)


def _questions(data: ProbedStories, rng: Any, count: int) -> Batch:
    """Draw questions at the gaps of training, with replacement."""
    questions: Any = data.val_dataloader()[EVALUATION_SETS.index("probe_in")].dataset
    return cast(Batch, questions.__getitems__(rng.integers(len(questions), size=count).tolist()))
