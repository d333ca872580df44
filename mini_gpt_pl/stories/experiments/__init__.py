"""Experiments that train again from a run's checkpoints: recovery, depth under noise, and moves of single blocks."""

from mini_gpt_pl.stories.experiments.command import main

__all__ = ["main"]
