"""The former place of `mini_gpt_pl.runs.logs`."""

from mini_gpt_pl.runs.logs import *  # noqa: F403
