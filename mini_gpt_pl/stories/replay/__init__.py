"""Gradients at stored checkpoints against directions that exist only after the run: the whole run's backbone."""

from mini_gpt_pl.stories.replay.command import main

__all__ = ["main"]
