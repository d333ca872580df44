"""Every point of a grid file in one command, which goes on wherever it stopped.

`grid` reads the file and makes its points, `points` knows their run folders, `local` runs them here, `remote` hands
them to W&B agents or a cluster, `progress` shows what happens, and `command` is the command line.
"""

from mini_gpt_pl.sweep.command import main
from mini_gpt_pl.sweep.grid import Point, Sweep, read_sweep

__all__ = ["Point", "Sweep", "main", "read_sweep"]
