"""Names that Lightning, torch, jsonargparse and others do not promise, and that this package leans on.

When an upgrade fails here, the entry says who needs the name and what to do. A private name that the code uses and no
entry lists fails too.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lightning.pytorch as pl
import pytest
import tiktoken
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mini_gpt_pl.callbacks import AgreedTermination, MetricsCSV, Schedule, TrajectoryRecorder
from mini_gpt_pl.command_line import CommandParser
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.logs import log_now
from mini_gpt_pl.training import one_sum
from mini_gpt_pl.training.cli import ProbedCLI

ROOT = Path(__file__).resolve().parents[2]


class Lean(NamedTuple):
    """A name that is not promised.

    Attributes:
        name: The attribute.
        there: Whether it is still there.
        user: The file that needs it.
        remedy: What to do when it is gone.
    """

    name: str
    there: Callable[[], bool]
    user: str
    remedy: str


def _loop() -> Any:
    return pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False).fit_loop.epoch_loop


def _trainer() -> Any:
    return pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)


def _scheduler() -> Any:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def _encoding() -> Any:
    return tiktoken.Encoding("x", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={})


def _subcommands() -> bool:
    """`ProbedCLI.parse_arguments` looks the options of a command up here; `LightningCLI` sets it."""
    return "_subcommand_parsers" in LightningCLI._add_subcommands.__code__.co_names


LEANS = [
    Lean("_signal_connector", lambda: hasattr(_trainer(), "_signal_connector"), "callbacks/termination.py",
         "find where the trainer keeps its signal handlers now; without it Lightning waits for rank 0 at each batch"),
    Lean("_sigterm_notifier_fn", lambda: hasattr(_trainer()._signal_connector, "_sigterm_notifier_fn"),
         "callbacks/termination.py", "find what a SIGTERM calls now; without it training ends in Lightning's own way"),
    Lean("_broadcast_sigterm_tensor", lambda: hasattr(_loop(), "_broadcast_sigterm_tensor"),
         "callbacks/termination.py", "if Lightning no longer waits for rank 0 at each batch, delete AgreedTermination"),
    Lean("_add_subcommands", lambda: hasattr(LightningCLI, "_add_subcommands"), "mini_gpt_pl/training/cli.py",
         "nothing breaks: every command's parser is built, which takes a second; override what builds them now"),
    Lean("_parse_ckpt_path", lambda: hasattr(LightningCLI, "_parse_ckpt_path"), "mini_gpt_pl/training/cli.py",
         "override what now lets a checkpoint's hyper-parameters win over the command line, and read the checkpoint's "
         "counters there: W&B's trace through resumed runs needs them"),
    Lean("_subcommand_parsers", _subcommands, "mini_gpt_pl/training/cli.py",
         "errors name no nearest option: look the command's parser up where Lightning keeps it now"),
    Lean("_option_string_actions", lambda: hasattr(argparse.ArgumentParser(), "_option_string_actions"),
         "mini_gpt_pl/command_line.py", "errors name no nearest option: collect the options from `_actions`"),
    Lean("_last_global_step_saved", lambda: hasattr(ModelCheckpoint(), "_last_global_step_saved"),
         "mini_gpt_pl/runs/logs.py", "take the step of the file that was saved last: rows up to it are final"),
    Lean("_last_lr", lambda: hasattr(_scheduler(), "_last_lr"), "mini_gpt_pl/stories/module.py",
         "give a resumed scheduler its rates where `get_last_lr` takes them from, for LearningRateMonitor"),
    Lean("_trainer", lambda: hasattr(BoringModel(), "_trainer"), "callbacks/bases.py",
         "ask for `module.trainer`, and catch what it raises where there is none"),
    Lean("_iterator", lambda: hasattr(DataLoader(TensorDataset(torch.zeros(1))), "_iterator"),
         "mini_gpt_pl/stories/data/stream.py", "end persistent workers in the new way, or they end with the process"),
    Lean("_dynamo", lambda: hasattr(torch._dynamo, "maybe_mark_dynamic"), "mini_gpt_pl/stories/module.py",
         "mark batch sizes as dynamic by what `torch.compiler` offers; without it each size is compiled anew"),
    Lean("_flash_attention_forward", lambda: hasattr(torch.ops.aten, "_flash_attention_forward"),
         "mini_gpt_pl/stories/packing.py", "call `torch.nn.attention.varlen.varlen_attn`, 0.2 ms a call slower"),
    Lean("_foreach_mul_", lambda: hasattr(torch, "_foreach_mul_"), "mini_gpt_pl/geometry/directions/steering.py",
         "multiply tensor by tensor"),
    Lean("_foreach_add_", lambda: hasattr(torch, "_foreach_add_"), "mini_gpt_pl/geometry/directions/steering.py",
         "add tensor by tensor"),
    Lean("_version", lambda: hasattr(torch.zeros(1), "_version"), "callbacks/last_gradient.py",
         "flatten the gradient anew for every probe that asks"),
    Lean("_modules", lambda: hasattr(nn.Module(), "_modules"), "callbacks/measuring.py", "walk `named_children`"),
    Lean("_buffers", lambda: hasattr(nn.Module(), "_buffers"), "callbacks/measuring.py",
         "walk `named_buffers(recurse=False)`; a buffer that a forward makes must be taken out again by name"),
    Lean("_non_persistent_buffers_set", lambda: hasattr(nn.Module(), "_non_persistent_buffers_set"),
         "callbacks/measuring.py", "put a buffer that a forward exchanged back with `register_buffer(persistent=...)`"),
    Lean("_parameters", lambda: hasattr(nn.Module(), "_parameters"), "mini_gpt_pl/geometry/vectors/selection.py",
         "walk `named_parameters(recurse=False)`, which gives a tied parameter once"),
    Lean("_step_supports_amp_scaling",
         lambda: hasattr(torch.optim.AdamW([torch.zeros(1)], fused=True), "_step_supports_amp_scaling"),
         "callbacks/last_gradient.py", "look for `fused` in the groups: such a one unscales by itself"),
    Lean("_pat_str", lambda: hasattr(_encoding(), "_pat_str"), "mini_gpt_pl/stories/data/tokenizer.py",
         "keep the pattern beside the encoding when it is loaded: the tokenizer's fingerprint is made of it"),
    Lean("_mergeable_ranks", lambda: hasattr(_encoding(), "_mergeable_ranks"), "mini_gpt_pl/stories/data/tokenizer.py",
         "keep the ranks beside the encoding when it is loaded: the tokenizer's fingerprint is made of them"),
    Lean("_fingerprint", lambda: hasattr(datasets.Dataset.from_dict({"a": [1]}), "_fingerprint"),
         "mini_gpt_pl/stories/data/corpus.py", "hash the texts themselves: the cache of tokens is named by it"),
]  # fmt: skip
# What Python promises of named tuples, in spite of the underscore.
PROMISED = {"_asdict", "_fields", "_replace"}


@pytest.mark.parametrize("lean", LEANS, ids=lambda lean: lean.name)
def test_a_private_name_is_still_there(lean: Lean) -> None:
    assert lean.there(), f"{lean.name} is gone; {lean.user} needs it: {lean.remedy}"
    assert lean.name in (ROOT / lean.user).read_text(), f"{lean.user} no longer needs {lean.name}: take its entry out"


def test_every_private_name_of_others_has_an_entry() -> None:
    own: set[str] = set()
    used: dict[str, str] = {}
    for file in [*(ROOT / "mini_gpt_pl").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    own.add(name)
                case ast.Attribute(attr=name, value=ast.Name(id="self"), ctx=ast.Store()):
                    own.add(name)
                case ast.Attribute(attr=name):
                    used[name] = file.name
                case ast.ImportFrom(module=str(module), names=names) if not module.startswith("mini_gpt_pl"):
                    used |= {alias.name: file.name for alias in names}
    private = {name: file for name, file in used.items() if name.startswith("_") and not name.startswith("__")}
    unlisted = {name: file for name, file in private.items() if name not in own}.keys() - {lean.name for lean in LEANS}
    assert unlisted <= PROMISED, {name: used[name] for name in unlisted - PROMISED}


# ------------------------------------------------------------------------------- what happens when they are gone


def test_one_sum_needs_no_private_name() -> None:
    """It is imported by every command: a name that is gone would end all of them."""
    tree = ast.parse(Path(one_sum.__file__).read_text())
    names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    own = {"_accumulating", "_average", "_gradients"}
    assert {name for name in names if name.startswith("_")} <= own


@pytest.mark.parametrize("gone", ["_signal_connector", "_broadcast_sigterm_tensor"])
def test_termination_leaves_lightnings_own_way_where_the_names_are_gone(
    gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loop:
        _broadcast_sigterm_tensor = staticmethod(lambda: None)

    class Connector:
        _sigterm_notifier_fn = staticmethod(lambda: None)

    class FitLoop:
        epoch_loop = Loop()

    class Two:
        """A trainer of two ranks, as far as the callback looks at it."""

        world_size = 2
        fit_loop = FitLoop()
        _signal_connector = Connector()

    monkeypatch.delattr(Two if gone == "_signal_connector" else Loop, gone)
    callback, trainer = AgreedTermination(), Two()
    callback.setup(trainer, BoringModel(), "fit")  # type: ignore[arg-type]
    assert not vars(Two.fit_loop.epoch_loop)  # nothing was put in Lightning's place
    callback.teardown(trainer, BoringModel(), "fit")  # type: ignore[arg-type]


def fit(folder: Path) -> pl.Trainer:
    recorder = TrajectoryRecorder("weight", Schedule(every=2))
    checkpoints = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        default_root_dir=folder,
        logger=MetricsCSV(folder / "metrics.csv"),
        callbacks=[recorder, AgreedTermination(), checkpoints],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(BoringModel())
    return trainer


def test_a_run_of_ones_own_needs_neither_state_keys_nor_the_step_of_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pl.Callback, "_generate_state_key")
    monkeypatch.setattr(ModelCheckpoint, "state_key", property(lambda self: "ModelCheckpoint"))  # it uses it itself
    fit(tmp_path)
    assert (tmp_path / "trajectory.safetensors").is_file()
    saved = torch.load(next((tmp_path / "checkpoints").glob("*.ckpt")), weights_only=True)
    assert "TrajectoryRecorder{'pattern': 'weight', 'name': 'trunk'}" in saved["callbacks"]


def test_what_is_logged_at_once_is_where_monitors_look(tmp_path: Path) -> None:
    """`log_now` writes into the mapping that `trainer.callback_metrics` returns; a copy would be written in vain."""
    trainer = fit(tmp_path)
    log_now(trainer, {"mine": 1.5}, step=4)
    assert float(trainer.callback_metrics["mine"]) == 1.5


def test_an_error_without_a_parsers_table_of_options_is_still_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = CommandParser("report")
    assert ProbedCLI.parse_arguments is not LightningCLI.parse_arguments
    monkeypatch.delattr(parser, "_option_string_actions")
    with pytest.raises(UserError, match="unrecognized arguments: --nope; see mini_gpt_pl report --help"):
        parser.error("unrecognized arguments: --nope")


def test_the_wording_that_complaints_are_condensed_from() -> None:
    """`_one_line_usage` takes jsonargparse's messages apart by these words; without them they are shown as they are."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--n", type=int)
    with pytest.raises(ArgumentError, match='Parser key "n":'):
        parser.parse_args(["--n=x"])
    with pytest.raises(ArgumentError, match=r"not accept option 'm'|unrecognized arguments: --m"):
        parser.parse_args(["--m=1"])
