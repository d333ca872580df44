"""W&B workspaces and reports as code: the panels follow from what runs logged.

`layout` has the panels of the registry of metrics and says which of them runs can fill, `sweeps` lays out the report of
a sweep, `objects` turns both into what W&B takes, and `command` is the command line.
"""

from mini_gpt_pl.dashboard.command import main
from mini_gpt_pl.dashboard.layout import Logged, Panel, Section, workspace_sections

__all__ = ["Logged", "Panel", "Section", "main", "workspace_sections"]
