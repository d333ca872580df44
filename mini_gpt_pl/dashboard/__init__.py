"""W&B workspaces and reports as code: the panels follow from what runs logged.

`layout` says what a panel is and which of them runs can fill, `catalogue` lists them, `sweeps` lays out the report of a
sweep, `objects` turns both into what W&B takes, `preview` draws the workspace, and `command` is the command line.
"""

from mini_gpt_pl.dashboard.command import main
from mini_gpt_pl.dashboard.layout import Logged, Panel, Section, workspace_sections

__all__ = ["Logged", "Panel", "Section", "main", "workspace_sections"]
