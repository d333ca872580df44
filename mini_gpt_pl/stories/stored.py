"""A finished run at its stored checkpoints: module, data, fixed batches, and the directions of its whole path.

A replay measures here, and so does whatever else asks something of weights that were kept.
"""

from __future__ import annotations

import hashlib
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from itertools import count, islice
from typing import Any

import torch

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.directions.axes import Axis, path_coefficients
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder, combine
from mini_gpt_pl.runs.checkpoints import read_checkpoint
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.data.batch import Batch, collate
from mini_gpt_pl.stories.data.corpus import load_texts, require_rows, tokenize
from mini_gpt_pl.stories.data.datamodule import ProbedStories
from mini_gpt_pl.stories.data.probe import Stream, sample_rng
from mini_gpt_pl.stories.module import ProbedGPT, check_identity
from mini_gpt_pl.stories.objective import ProbeWeight
from mini_gpt_pl.stories.reheating import Reheating
from mini_gpt_pl.stories.switches import events_of, switch_of
from mini_gpt_pl.training.restore import restore, selection_of

CPU = torch.device("cpu")


class StoredRun:
    """A run whose module can be put to any checkpoint that was kept.

    Args:
        run: A run folder with checkpoints.
        device: Where to compute.
        overrides: `data.<option>=<value>` that win over the configuration, for data that has moved.

    Attributes:
        module: The model, with new weights until `load`.
        data: The data module, not set up.
        files: With weights, by step.
        selection: Of the recorded weights.
        events: Peaks and troughs of p_ood by step.
        labels: The groups of the selection, then the whole.
        dims: D of each.

    Raises:
        UserError: The folder is no run of stories, or lacks a trajectory or checkpoints.

    Example:
        >>> stored = StoredRun(Run(Path("runs/mine")))  # doctest: +SKIP
        >>> stored.load(500).batch_terms(fixed_batches(stored.data, 1)[0])  # doctest: +SKIP
    """

    def __init__(self, run: Run, device: torch.device = CPU, overrides: Sequence[str] = ()) -> None:
        self.run = run
        self.device = device
        run.config  # noqa: B018 (no run folder at all is told first)
        self.files = run.stored_weights
        if not self.files:
            raise UserError(
                f"{run.path / 'checkpoints'} holds no checkpoint to replay: train with a ModelCheckpoint that keeps "
                "some (save_top_k: -1)"
            )
        if run.task not in ("stories", ""):
            raise UserError(f"{run.path} is a run of the task {run.task}: replay reads runs of stories")
        module, data = restore(run, overrides)
        assert isinstance(module, ProbedGPT) and isinstance(data, ProbedStories)
        self.module, self.data = module, data
        self.selection = selection_of(run, module)
        self.events = {event.step: event.kind for event in events_of(run)}
        self.labels = (*self.selection.groups, run.trunk)
        self.dims = (*self.selection.dims, self.selection.dim)

    def load(self, step: int) -> ProbedGPT:
        """Put the weights of a checkpoint, a full one or one of weights only, into the module, which is in eval mode.

        Raises:
            UserError: It cannot be read, or is of another model.
        """
        checkpoint = read_checkpoint(self.files[step])
        check_identity(checkpoint, self.module)
        try:
            self.module.load_state_dict(checkpoint["state_dict"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.files[step]} is of another model: {reason}") from None
        return self.module.to(self.device).eval()

    @cached_property
    def probe_weight(self) -> ProbeWeight:
        """Lambda(t); the configuration has the parent's where a run was reheated, as steps begin anew."""
        if (reheated := self.run.lineage) is None:
            return self.module.probe_weight
        constant = self.run.config.get("probe_weight")
        settings = Reheating(probe_weight=None if constant is None else float(constant))
        return settings.weight(self.module.probe_weight, int(reheated.get("parent_step", 0)))

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """Directions of the whole run, each group's own and the whole selection's, on the device.

        `backbone` (uncentred PC1 of all drifts; the last one's coordinate is positive), `pc2` where the path has a
        second component, `theta0`, and `switch` where p_ood has a switch: theta(peak) - theta(trough) of the first.
        They are made in one pass over the snapshot files.

        Raises:
            UserError: The snapshots are missing or of another model, or nothing has moved.
        """
        run, trajectory = self.run, self.run.trajectory
        folder = SnapshotFolder(run.snapshot_folder, self.selection)
        if missing := sorted(set(trajectory.steps) - set(folder.steps())):
            raise UserError(
                f"{run.snapshot_folder} lacks {len(missing)} of {len(trajectory)} snapshots (step {missing[0]} first): "
                "replay needs the recorded weights; restore the folder, or train with write_snapshots true"
            )
        switch = switch_of(run)
        # path_coefficients subtracts the first step's weights from the second's.
        coefficients = path_coefficients(trajectory, {} if switch is None else {"switch": switch[::-1]})
        if not coefficients:
            raise UserError(
                f"some weights of {run.path} have not moved between snapshots: there is no path to compare with"
            )
        own = {name: rows[:-1] for name, rows in coefficients.items()}
        # Where all groups and the whole have the same coefficients, they are parts of one vector.
        apart = {
            f"{name}/whole": rows[-1:].expand(len(rows) - 1, -1)
            for name, rows in coefficients.items()
            if not bool((rows == rows[-1]).all())
        }
        vectors = combine(trajectory.steps, folder.read, own | apart, self.selection, self.device)
        return {name: Axis.of(vectors[name], vectors.get(f"{name}/whole", vectors[name])) for name in own}


def fixed_batches(data: ProbedStories, number: int) -> list[Batch]:
    """Make batches from the training distribution, and none of those that a run trained on.

    They are a function of the settings and seed of the run's data alone: every checkpoint sees the same bytes, and the
    first batches of many are those of few. Stories come in an order of their own, each once before one comes again,
    and a probe is injected with the run's own probability.

    Raises:
        UserError: The corpus cannot be read or is too small for one batch.
    """
    size = data.batch_size
    stories = tokenize(load_texts(data.corpus, "train", data.cache_dir), data.encoding, data.corpus.num_proc)
    require_rows(stories, size, "training stories")
    examples = [
        data.probe.training_example(stories[index], sample_rng(data.seed, Stream.REPLAY_SAMPLES, 0, position))
        for position, index in enumerate(islice(_order(data.seed, len(stories)), number * size))
    ]
    return [collate(examples[first : first + size]) for first in range(0, len(examples), size)]


def _order(seed: int, stories: int) -> Iterator[int]:
    for epoch in count():
        yield from map(int, sample_rng(seed, Stream.REPLAY_ORDER, epoch, 0).permutation(stories))


def sha256(batches: Iterable[Batch]) -> str:
    """Hash the bytes of tokens, targets and masks, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for column in batch[:3]:
            digest.update(f"{column.dtype} {tuple(column.shape)} ".encode())
            digest.update(column.contiguous().numpy().tobytes())
    return digest.hexdigest()


def add_options(parser: ArgumentParser) -> None:
    """Add the options of every command that computes at stored checkpoints."""
    parser.add_argument("--accelerator", choices=("cpu", "cuda", "auto"), default="auto", help="(%(default)s)")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32", help="(%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace records that are there")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="data.OPTION=VALUE", help="for data that has moved"
    )


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the context of a forward pass in a precision: `32`, or `bf16`."""
    return nullcontext if precision == "32" else partial(torch.autocast, device.type, torch.bfloat16)


def device_of(accelerator: str) -> torch.device:
    """Return the device: `cpu`, `cuda`, or for `auto` the better one that there is.

    Raises:
        UserError: There is no GPU.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("--accelerator cuda: torch sees no GPU here; use --accelerator cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
