"""The commands with a trainer, through LightningCLI: fit, validate, test, and those that a task adds."""

from __future__ import annotations

import logging
import re
import shlex
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from mini_gpt_pl.atomic import write_text
from mini_gpt_pl.callbacks.divergence import StopOnDivergence
from mini_gpt_pl.callbacks.progress import LiveNumbers
from mini_gpt_pl.callbacks.settled import SettledObjects
from mini_gpt_pl.callbacks.termination import AgreedTermination
from mini_gpt_pl.callbacks.wandb_run import WandbSegments
from mini_gpt_pl.command_line import INTERRUPTED, TERMINATED, split_options
from mini_gpt_pl.errors import UserError, did_you_mean
from mini_gpt_pl.presets import presets, with_presets
from mini_gpt_pl.report.figures import draw_all
from mini_gpt_pl.report.summary import print_summary, table_console
from mini_gpt_pl.runs.checkpoints import read_checkpoint, write_whole
from mini_gpt_pl.runs.folder import CHECKPOINTS, CONFIG, FIGURES, METRICS, OUTCOME, PRODUCTS, Outcome, Run
from mini_gpt_pl.runs.logs import MetricsCSV
from mini_gpt_pl.tasks import TRAINING, commands, task_named, tasks, training_commands
from mini_gpt_pl.training import (
    former_names,
    one_sum,  # noqa: F401 (registers the strategy)
)
from mini_gpt_pl.training.lock import hold, release
from mini_gpt_pl.training.run_folder import (
    WayOn,
    claim,
    direct_wandb,
    end_if_finished,
    expand_home,
    finish_wandb,
    make_folder,
    whole_paths,
)
from mini_gpt_pl.training.trust import OwnCheckpoints, require_no_way_out, split_trust, trusted_config

# What a run's configuration gives to a later command on one of its checkpoints.
_SHARED = ("task", "seed_everything", "trainer", "model", "data")
# What belongs to the command that began a run, not to the one that goes on with it.
_OF_ONE_COMMAND = ("run_dir", "overwrite", "resume")
_DEFAULTS = {"num_sanity_val_steps": 0, "inference_mode": False, "max_epochs": -1, "gradient_clip_val": 1.0}


def subcommands(task: str) -> dict[str, set[str]]:
    """Commands with a trainer that a task has, with the arguments that are no options of theirs."""
    general = {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}
    own = [name for name, command in tasks()[task].commands.items() if command.module == TRAINING]
    return {**general, **{name: {"model", "datamodule"} for name in own}}


class RunConfig(SaveConfigCallback):
    """Write the resolved configuration into the run folder, and hand it to W&B, once training begins.

    Not earlier: a resume that is refused (another tokenizer, a missing snapshot) must leave the folder as it was.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_config(trainer, pl_module, "fit")
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / OUTCOME).unlink(missing_ok=True)  # it goes on: not ended yet

    @override
    @rank_zero_only
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        write_text(Path(trainer.default_root_dir) / CONFIG, text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(yaml.safe_load(text), allow_val_change=True)


class ProbedCLI(LightningCLI):
    """LightningCLI with a run folder, one CSV for every run, the task's commands, and errors of one line.

    Args:
        task: Name of what is trained.
        settings: Of `LightningCLI`, but for the classes of model and data.

    Raises:
        UserError: For anything on the command line, or in a file that it names, that is not as it should be.
    """

    def __init__(self, task: str, **settings: Any) -> None:
        self.task = task
        self._words = frozenset(settings.get("args") or ())
        of = tasks()[task]
        for name in subcommands(task).keys() & training_commands():
            setattr(self, f"after_{name}", self._close)
        super().__init__(of.load("model"), of.load("data"), trainer_class=of.load("trainer"), **settings)

    checkpoint: dict[str, Any] | None = None
    """Counters and callback states of `--ckpt_path`, without its weights."""

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return subcommands(self.task)

    @override
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # Each parser takes a twentieth of a second or more; one command line holds one of the commands.
        every = self.subcommands()
        wanted = {name: skipped for name, skipped in every.items() if name in self._words} or every
        self.subcommands = lambda: wanted  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/default", help="Folder for everything the run writes.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace a run that run_dir already holds.")
        parser.add_argument(
            "--task", type=Literal[tuple(tasks())], default=self.task, help="What is trained, on which data."
        )
        task = tasks()[self.task]
        # The module's own default is a function, which a kept configuration could not name.
        parser.set_defaults({"model.optimizer": task.optimizer})
        for name in task.from_data:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        for option in task.from_seed:
            parser.link_arguments("seed_everything", option, compute_fn=_fixed_seed)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        command = next((arg for arg in args if arg in commands(trainer=True)), None)
        if command is not None and command not in subcommands(self.task):
            whose = " and ".join(name for name, task in tasks().items() if command in task.commands)
            raise UserError(f"{command} is for {whose}, and this is the task {self.task}: it has no {command}")
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            of_command = getattr(self, "_subcommand_parsers", {}).get(command)
            options = list(getattr(of_command, "_option_string_actions", ()))
            raise UserError(_one_line_usage(str(error), command, options)) from None
        expand_home(self.config)
        seed = self.config[command].get("seed_everything") if command else None
        if isinstance(seed, int) and not 0 <= seed < 2**32:
            raise UserError(f"--seed_everything={seed}: give a number from 0 to {2**32 - 1}")

    @override
    def _parse_ckpt_path(self) -> None:
        """Look into the checkpoint; nothing that it holds overrides the command line."""
        config = self.config[self.config.subcommand]
        if commands()[self.config.subcommand].option and config.ckpt_path:
            config.ckpt_path = str(Path(config.ckpt_path).resolve())  # recorded: a resume may come from elsewhere
        if config.get("ckpt_path") == "" and self.config.subcommand == "fit":
            raise UserError("--ckpt_path is empty: give RUN/checkpoints/STEP.ckpt, or leave it out")
        path = config.get("resume") or config.get("ckpt_path")
        if path:
            loaded = read_checkpoint(path)
            if (self.config.subcommand == "fit" or config.get("resume")) and "optimizer_states" not in loaded:
                raise UserError(
                    f"{path} holds weights alone, without an optimizer: it can be validated, replayed and reheated "
                    "with --moments zeroed, not resumed; give a full checkpoint"
                )
            self.checkpoint = {key: loaded.get(key) for key in ("global_step", "callbacks")}
        elif self.config.subcommand != "fit":
            raise UserError(f"{self.config.subcommand} needs a checkpoint: give --ckpt_path RUN/checkpoints/STEP.ckpt")

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        run = Run(Path(config.run_dir))
        config.trainer.default_root_dir = config.run_dir
        self._logger_as_given = deepcopy(config.trainer.logger)
        if not self._trains:
            # Lightning would ask for the callbacks that we leave out on purpose.
            warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided")
            config.trainer.logger = False
            config.trainer.enable_checkpointing = False
            config.trainer.callbacks = None
            return
        branch = self.subcommand if self.subcommand != "fit" else None
        if (batches := config.trainer.accumulate_grad_batches) is not None and batches < 1:
            raise UserError(f"--trainer.accumulate_grad_batches={batches}: give 1 or more")
        config.data = whole_paths(config.data)
        end_if_finished(run, config, self.checkpoint)
        self._replaces = claim(run, config, branch)
        direct_wandb(config, run, branch, self.checkpoint)

    @property
    def _trains(self) -> bool:
        return self.subcommand in training_commands()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # What W&B gets for this one segment (its id, its group) is no part of the configuration that is kept.
        config = self.config[self.subcommand].trainer
        config.logger = self._logger_as_given
        listed = self.config_init[self.subcommand].trainer.callbacks or []
        bars = [one for one in (listed if isinstance(listed, list) else [listed]) if isinstance(one, ProgressBar)]
        if self._trains and config.enable_progress_bar is not False and not bars:
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": [LiveNumbers()]}
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"{str(error).rstrip('.!')}: correct the --trainer options") from error
        if self._trains:
            if trainer.is_global_zero:
                hold(Path(trainer.default_root_dir))
            make_folder(Run(Path(trainer.default_root_dir)), clear=self._replaces)
            self._complete(trainer)
        return trainer

    def _complete(self, trainer: Trainer) -> None:
        """Give every training run what it must have, whatever its configuration lists."""
        root = Path(trainer.default_root_dir)
        trainer.loggers = [MetricsCSV(root / METRICS), *trainer.loggers]
        write_whole(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(root / CHECKPOINTS)
        extra = [
            OwnCheckpoints(root),
            WayOn(root),
            Timer(),
            StopOnDivergence(),
            SettledObjects(),
            AgreedTermination(),
            WandbSegments(),
        ]
        trainer.callbacks[:0] = extra  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------ after a command

    def after_validate(self) -> None:
        """Print what was measured: Lightning's own table leaves out what it did not hand to the loggers itself."""
        if self.trainer.is_global_zero:
            for name, value in sorted(self.trainer.callback_metrics.items()):
                print(f"{name:<16} {float(value):.4f}")

    after_test = after_validate

    def _close(self) -> None:
        """Record how a training ended, draw its figures, and print its results and where they lie."""
        trainer: Any = self.trainer
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        finish_wandb()  # before the table, which is to be the last thing on the screen
        run = Run(Path(self.config[self.subcommand].run_dir))
        stopped = next(callback for callback in trainer.callbacks if isinstance(callback, StopOnDivergence))
        if not trainer.interrupted:
            milestones: dict[str, int | None] = {}
            for callback in trainer.callbacks:
                milestones |= getattr(callback, "milestones", {})
            state: Literal["finished", "diverged"] = "finished" if stopped.step is None else "diverged"
            Outcome(state, trainer.global_step, milestones).write(run.path)
        figures = draw_all(run)
        console = table_console()
        print_summary(run, console)
        for line in commands()[str(self.subcommand)].closing_lines(run):
            console.print(line)
        if (outcome := run.outcome) is not None and outcome.milestones:
            steps = [f"{name} {step}" for name, step in outcome.milestones.items() if step is not None]
            missed = [name for name, step in outcome.milestones.items() if step is None]
            parts = [f"reached: {', '.join(steps)}"] if steps else []
            parts += [f"not within {outcome.step} steps: {', '.join(missed)}"] if missed else []
            console.print(f"milestones {'; '.join(parts)}", highlight=False)
        seconds = next(callback for callback in trainer.callbacks if isinstance(callback, Timer)).time_elapsed("train")
        console.print(f"{trainer.global_step} steps in {seconds:.1f} s, evaluations and probes included")
        products = [path for name in PRODUCTS if name != FIGURES and (path := run.path / name).exists()]
        for path in [*products, *figures]:
            console.print(f"  {path}{'/' if path.is_dir() else ''}", highlight=False)
        if stopped.step is not None:
            raise UserError(f"the run diverged: its loss was not finite at step {stopped.step}; its records are kept")

    def predict(self, **kwargs: Any) -> None:
        """Print what the task's trainer predicts."""
        text = self.trainer.predict(**kwargs)
        if self.trainer.is_global_zero:
            print(text)


def _fixed_seed(seed: bool | int) -> int:
    if isinstance(seed, bool):
        raise UserError("--seed_everything: this task needs a number, which its split, batches and weights come from")
    return seed


# ------------------------------------------------------------------------------------------- the command line


def with_run_config(args: Sequence[str]) -> list[str]:
    """Start a command on a checkpoint from the configuration of the run that the checkpoint lies in.

    Names of shipped configurations become files. The run's configuration goes right behind the subcommand, so that
    everything else on the command line wins over it; it is taken as `trust.trusted_config` allows.
    A branch gets a folder of its own inside its parent's.
    """
    args, trusted = split_trust(with_presets(args))
    position = next((i for i, arg in enumerate(args) if arg in commands(trainer=True)), None)
    others, options = split_options(args[(position or 0) + 1 :], "--ckpt_path")
    checkpoint = options[-1][1] if options else ""
    if position is not None and args[position] == "fit" and not options:
        _require_a_choice(args[position + 1 :])
    if position is None or not checkpoint or (run := Run.of_checkpoint(checkpoint)) is None:
        return args
    command, rest = args[position], args[position + 1 :]
    config = trusted_config(run, trusted)
    require_no_way_out(run)
    shared = {key: config[key] for key in _SHARED if key in config}
    folder = run.path if command == "fit" else run.path / command / Path(checkpoint).stem
    task = tasks().get(run.task)
    if command == "fit" and task and (branch := task.branch_of(config)):
        # Its settings are those of the command that began it, so it goes on under that.
        shared = {key: value for key, value in config.items() if key not in _OF_ONE_COMMAND}
        command, rest = branch, ["--resume", checkpoint, *others]
    base = ["--config", yaml.safe_dump(shared), "--run_dir", str(folder)]
    return [*args[:position], command, *base, *rest]


def _require_a_choice(words: Sequence[str]) -> None:
    """Refuse a bare `fit`, which would train a model of 51 million weights without an end and without a probe."""
    given = {word.partition("=")[0] for word in words}
    chosen = {"-c", "--config", "--model", "--model.size", "-h", "--help", "--print_config"}
    if not given & chosen:
        shipped = [name for name in presets() if "/" not in name] + ["paper/base", "grokking/smoke"]
        raise UserError(
            f"fit: say what is to be trained, as in -c {shipped[0]} or with --model.size; what is shipped: "
            f"{', '.join(shipped)} and more (README)"
        )


# Lines of a parser's complaint that only say that alternatives nobody meant do not fit either.
_NOISE = re.compile(
    r"Expected a path but|Does not validate against|Subtypes:|Errors:|Given value type|Given value: \[?Namespace"
    r"|expected NoneType|Expected a dot import|Not a valid subclass|Subclass types expect|a class path|a dict with"
)


def _one_line_usage(message: str, command: str | None, options: list[str]) -> str:
    """Condense a parser's complaint to the option, what is wrong with it, and where to look."""
    for pattern, plain in (
        (r"Type typing\.Callable\[.*\] expects a function or a callable class: ", ""),
        (r"\.* Got value: Namespace\(.*", ""),
        (r"Call to compute_fn of link .* failed: ", ""),
        (r"(\w+ a )?typing\.Literal\[(.*?)\]", r"expected one of \2"),
        (r"Expected a <class '(?:[\w.]*\.)?(\w+)'>", r"expected \1"),
        (r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1"),
        (r'^Parser key "([\w.]+)":', r"--\1:"),
        (r'Parser key "([\w.]+)":', r"\1:"),
    ):
        message = re.sub(pattern, plain, message)
    lines = [line.strip(" -") if line.startswith(" ") else line for line in message.splitlines()]
    telling = [line for line in lines if line and not _NOISE.match(line)]
    text = "; ".join(telling or lines).replace(":;", ":")
    unknown = re.search(r"unrecognized arguments: (--[\w.]+)|not accept option '([\w.]+)'", text)
    hint = did_you_mean(unknown[1] or f"--{unknown[2]}", options) if unknown else ""
    return f"{text}; {f'{hint} ' if hint else ''}see mini_gpt_pl {f'{command} ' if command else ''}--help"


def run_cli(args: Sequence[str]) -> ProbedCLI:
    """Parse and run one command; whatever the user can put right raises a `UserError`."""
    raises = {"exit_on_error": False}
    former_names.install()
    try:
        task = task_named(args)
        return ProbedCLI(
            task,
            save_config_callback=RunConfig,
            trainer_defaults=_DEFAULTS,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "mini_gpt_pl", **raises, **dict.fromkeys(subcommands(task), raises)},
            args=list(args),
        )
    except MisconfigurationException as error:  # Lightning's word for an error of the user
        raise UserError(str(error)) from error
    except SIGTERMException:
        raise SystemExit(TERMINATED) from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning has ended the run and exits with 1
            raise SystemExit(INTERRUPTED) from None
        raise
    except ValueError as error:  # the parser wraps what the constructor of a callback says
        raise (_said_by_us(error) or error) from error
    except Exception as error:
        wandb = sys.modules.get("wandb.errors")  # imported by the logger if there is one
        if wandb is None or not isinstance(error, wandb.Error):
            raise
        remedy = "log in with `wandb login`, give WANDB_MODE=offline, or correct --trainer.logger"
        raise UserError(f"W&B refuses the run ({' '.join(str(error).split())}): {remedy}") from error
    finally:
        finish_wandb()
        release()


def _said_by_us(error: BaseException | None) -> UserError | None:
    """The error of ours that another one was raised from, if there is one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, UserError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def run_line(line: str, *, verbose: bool = False) -> ProbedCLI:
    """Run one command line in this process, as `main.run` has it."""
    _quiet()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        if not verbose:
            warnings.filterwarnings("ignore", module=r"lightning\.")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
        try:
            return run_cli(with_run_config(shlex.split(line)))
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _quiet() -> None:
    """Silence an advertisement, and a deprecation inside Lightning that no user can act on."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_no_advertisement)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return not re.search(r"Tip: .*\[lit\w+\]\(", record.getMessage())


def main(args: Sequence[str]) -> None:
    """Run one command line, whose words are in `sys.argv` too, from which a strategy starts the other ranks."""
    _quiet()
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    run_cli(with_run_config(args))
