"""The command line: fit, validate, test, predict and reheat."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from typing_extensions import override

from callbacks.divergence import StopOnDivergence
from callbacks.reheat import REHEAT_FILE
from callbacks.wandb_run import WandbSegments
from mini_gpt_pl.data.datamodule import ProbedStories
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.logs import MetricsCSV
from mini_gpt_pl.module import ProbedGPT, read_checkpoint
from mini_gpt_pl.report.figures import draw_all
from mini_gpt_pl.report.summary import print_summary
from mini_gpt_pl.runs import CHECKPOINTS, CONFIG, METRICS, PRODUCTS, Run
from mini_gpt_pl.trainer import GeometryTrainer

# What a run's configuration gives to a later command on one of its checkpoints.
_SHARED = ("seed_everything", "trainer", "model", "data")
_TRAINING = ("fit", "reheat")


class RunConfig(SaveConfigCallback):
    """Write the resolved configuration into the run folder, and hand it to W&B."""

    @override
    @rank_zero_only
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        file = Path(trainer.default_root_dir) / CONFIG
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(yaml.safe_load(text), allow_val_change=True)


class ProbedCLI(LightningCLI):
    """LightningCLI with a run folder, one CSV for every run, and `reheat`."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        skipped = LightningCLI.subcommands()
        return {
            **skipped,
            "predict": {"model", "datamodule"},
            "reheat": {"model", "datamodule"},
        }

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/default", help="Folder for everything the run writes.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace a run that run_dir already holds.")
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
        parser.link_arguments("data.context", "model.context", apply_on="instantiate")

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        run = Run(Path(config.run_dir))
        config.trainer.default_root_dir = config.run_dir
        if self.subcommand not in _TRAINING:
            config.trainer.logger = False
            config.trainer.enable_checkpointing = False
            config.trainer.callbacks = None
            return
        resumed = _resumed_run(self.subcommand, config)
        _claim(run, overwrite=config.overwrite, resumed=resumed)
        _direct_wandb(config, run, str(self.subcommand))

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand in _TRAINING:
            self._complete(trainer)
        return trainer

    def _complete(self, trainer: Trainer) -> None:
        """Give every training run what it must have, whatever its configuration lists."""
        root = Path(trainer.default_root_dir)
        table = MetricsCSV(root / METRICS)
        config = self.config[self.subcommand]
        if self.subcommand == "fit" and config.ckpt_path:
            table.resume(int(read_checkpoint(config.ckpt_path)["global_step"]))
        trainer.loggers = [table, *trainer.loggers]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(root / CHECKPOINTS)
        extra = [StopOnDivergence(), WandbSegments()]
        trainer.callbacks[:0] = extra  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------ after a command

    def after_fit(self) -> None:
        """Print what was found and where it lies."""
        self._close()

    def after_reheat(self) -> None:
        """Print what was found, the gain, and where it lies."""
        self._close()

    def _close(self) -> None:
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        run = Run(Path(self.config[self.subcommand].run_dir))
        figures = draw_all(run)
        console = Console()
        print_summary(run, console)
        _print_reheat(run, console)
        _print_products(run, figures, console)
        stopped = next(c for c in self.trainer.callbacks if isinstance(c, StopOnDivergence))  # type: ignore[attr-defined]
        if stopped.step is not None:
            raise UserError(f"the run diverged: its loss was not finite at step {stopped.step}; its records are kept")

    def predict(self, **kwargs: Any) -> None:
        """Print the continuation of the prompt."""
        print(self.trainer.predict(**kwargs))


# ------------------------------------------------------------------------------------------------ run folders


def _resumed_run(subcommand: str, config: Any) -> Run | None:
    """The run that a `fit --ckpt_path` continues."""
    if subcommand != "fit" or not config.ckpt_path:
        return None
    read_checkpoint(config.ckpt_path)
    return Run.of_checkpoint(config.ckpt_path)


@rank_zero_only
def _claim(run: Run, *, overwrite: bool, resumed: Run | None) -> None:
    """Make sure that nothing already recorded is lost by mistake."""
    if not run.exists or (resumed is not None and resumed.path.resolve() == run.path.resolve()):
        return
    if not overwrite:
        last = next(reversed(run.checkpoints.values()), None)
        resume = f"resume it with --ckpt_path {last}, " if last else ""
        raise UserError(
            f"{run.path} already holds a run: {resume}replace it with --overwrite true, "
            "or choose another folder with --run_dir"
        )
    for product in PRODUCTS:
        path = run.path / product
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _direct_wandb(config: Any, run: Run, command: str) -> None:
    """Point W&B loggers at the run folder, obey WANDB_MODE, and trace resumed and reheated runs to their origin."""
    loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
    mode = os.environ.get("WANDB_MODE")
    origin = _wandb_origin(config.ckpt_path) if config.get("ckpt_path") else {}
    for logger in loggers:
        if not str(getattr(logger, "class_path", "")).endswith("WandbLogger"):
            continue
        run.path.mkdir(parents=True, exist_ok=True)
        arguments = logger.init_args
        arguments.save_dir = str(run.path)
        arguments.name = arguments.get("name") or run.path.name
        if mode is not None:
            arguments.offline = mode == "offline"  # the logger's flag would win over the variable
        more = dict(logger.get("dict_kwargs") or {})
        if origin.get("group"):
            more.setdefault("group", origin["group"])
        if command == "reheat":
            more.setdefault("job_type", "reheat")
        elif origin.get("run_id") and not arguments.offline:
            arguments.id = origin["run_id"]  # online the run goes on; offline it gets a new segment in its group
        if more:
            logger.dict_kwargs = more


def _wandb_origin(checkpoint: str) -> dict[str, str]:
    states = read_checkpoint(checkpoint).get("callbacks", {})
    return dict(states.get(WandbSegments.__name__, {}))


def _print_reheat(run: Run, console: Console) -> None:
    file = run.path / REHEAT_FILE
    if not file.is_file():
        return
    found = json.loads(file.read_text())
    console.print(
        f"re-entry gain G = {found['gain']:+.3f}: p_ood {found['p0']:.3f} -> {found['peak']:.3f} at step "
        f"{found['peak_step']:.0f}"
    )
    if "coordinate_before" in found:
        console.print(
            f"in the parent's basis: a {found['coordinate_before']:.2f} -> {found['coordinate_after']:.2f}, "
            f"||r|| {found['residual_before']:.2f} -> {found['residual_after']:.2f}"
        )


def _print_products(run: Run, figures: list[Path], console: Console) -> None:
    for product in PRODUCTS:
        path = run.path / product
        if path.exists() and product != "figures":
            console.print(f"  {path}{'/' if path.is_dir() else ''}", highlight=False)
    for figure in figures:
        console.print(f"  {figure}", highlight=False)


# ------------------------------------------------------------------------------------------- the command line


def with_run_config(args: Sequence[str]) -> list[str]:
    """Start a command on a checkpoint from the configuration of the run that the checkpoint lies in.

    The run's configuration goes right behind the subcommand, so that everything else on the command line wins over it.
    A reheated run gets a folder of its own inside its parent's.
    """
    args = list(args)
    position = next((i for i, arg in enumerate(args) if arg in ProbedCLI.subcommands()), None)
    checkpoint = _value_of("--ckpt_path", args)
    if position is None or checkpoint is None or (run := Run.of_checkpoint(checkpoint)) is None:
        return args
    command = args[position]
    shared = {key: run.config[key] for key in _SHARED if key in run.config}
    folder = run.path if command == "fit" else run.path / command / Path(checkpoint).stem
    base = ["--config", yaml.safe_dump(shared), "--run_dir", str(folder)]
    return [*args[: position + 1], *base, *args[position + 1 :]]


def _value_of(option: str, args: Sequence[str]) -> str | None:
    for i, arg in enumerate(args):
        if arg == option and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(f"{option}="):
            return arg.split("=", 1)[1]
    return None


def run_cli(args: Sequence[str]) -> ProbedCLI:
    """Parse and run one command."""
    return ProbedCLI(
        ProbedGPT,
        ProbedStories,
        save_config_callback=RunConfig,
        trainer_class=GeometryTrainer,
        trainer_defaults={
            "num_sanity_val_steps": 0,
            "inference_mode": False,
            "max_epochs": -1,
            "gradient_clip_val": 1.0,
        },
        seed_everything_default=42,
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "mini_gpt_pl"},
        args=list(args),
    )


def main() -> None:
    """Run the command line; an error that the user can put right is one line and exit status 2."""
    args = sys.argv[1:]
    try:
        args = with_run_config(args)
        sys.argv = sys.argv[:1]  # Lightning warns when arguments come both ways
        run_cli(args)
    except UserError as error:
        message = re.sub(r"\s*\n\s*", " ", str(error))
        print(f"mini_gpt_pl: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
