"""What is kept of an experiment: one JSON file with its settings and, by key, each trial's labels and evaluations."""

from __future__ import annotations

import json
from typing import Any

from mini_gpt_pl.atomic import write_text
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.experiments.relaxation import Answers
from mini_gpt_pl.stories.experiments.trials import Trial

FOLDER = "experiments"


class Records:
    """The trials of one experiment on one run that are done.

    Args:
        run: The run.
        name: Of the experiment; its original variant ends in `_original`.

    Attributes:
        settings: What every trial has in common; empty where there is no file.
        trials: What each trial gave: `labels`, and `answers`, one row of `Answers` for each evaluation.

    Raises:
        UserError: The file is damaged.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.file = run.path / FOLDER / f"{name}.json"
        self.settings: dict[str, Any] = {}
        self.trials: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            try:
                recorded = json.loads(self.file.read_text())
                self.settings, self.trials = dict(recorded["settings"]), dict(recorded["trials"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.file} is damaged ({error}): delete it, or give --overwrite") from None

    def begin(self, settings: dict[str, Any], *, overwrite: bool) -> None:
        """Go on with what is there, or begin anew.

        Raises:
            UserError: What is there was made with other settings.
        """
        settings = json.loads(json.dumps(settings))  # as they are read back
        if overwrite:
            self.settings, self.trials = {}, {}
        differing = sorted(key for key in settings if self.settings.get(key, settings[key]) != settings[key])
        if differing:
            raise UserError(
                f"{self.file} was made with other settings ({', '.join(differing)}): give those, or --overwrite"
            )
        self.settings = settings

    def add(self, trial: Trial, answers: list[Answers]) -> None:
        """Record a trial; the file is whole at any time."""
        self.trials[trial.key] = {"labels": dict(trial.labels), "answers": [list(row) for row in answers]}
        self.file.parent.mkdir(exist_ok=True)
        write_text(self.file, json.dumps({"settings": self.settings, "trials": self.trials}, indent=1) + "\n")
