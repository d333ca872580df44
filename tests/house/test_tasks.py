"""The list of tasks, as the studies' files give it: every name in it leads somewhere."""

from __future__ import annotations

from importlib import import_module

import pytest
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from mini_gpt_pl.report.contents import Contents
from mini_gpt_pl.tasks import commands, task_of, tasks, training_commands


@pytest.mark.parametrize("name", tasks())
def test_the_parts_of_a_task_are_what_they_are_called(name: str) -> None:
    task = tasks()[name]
    kinds = {"model": LightningModule, "data": LightningDataModule, "trainer": Trainer}
    assert all(issubclass(task.load(part), kind) for part, kind in kinds.items())  # type: ignore[arg-type]
    assert isinstance(task.load("contents"), Contents)
    assert {"class_path", "init_args"} == task.optimizer.keys()
    assert task_of({"task": name}) == name


def test_one_task_is_the_default() -> None:
    assert [task.default for task in tasks().values()] == [True, False, False, False]


def test_every_command_has_a_module_and_a_branch_its_closing() -> None:
    assert {"fit", "reheat", "report", "overlaps"} <= commands().keys()
    assert commands(trainer=True).keys() | commands(trainer=False).keys() == commands().keys()
    for command in commands().values():
        assert callable(import_module(command.module).main)
        if command.closing:
            module, _, name = command.closing.rpartition(".")
            assert callable(getattr(import_module(module), name))
    assert training_commands() == ("fit", "reheat")


def test_a_configuration_without_a_task_is_known_by_an_option_of_its_model() -> None:
    assert task_of({"model": {"probe_weight": {}}}) == "stories"
    assert task_of({"model": {"width": 3}}) == task_of({"task": "mine"}) == ""
