"""Whether a run's path steers its attention: changes of path scores against changes of entropy.

mini_gpt_pl routing runs/grokking/markers --start 1000

The run's `AttentionProbe` and recorder have one schedule, as configs/grokking/attention.yaml gives them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mini_gpt_pl.arithmetic.statistics.routing import steered
from mini_gpt_pl.command_line import CommandParser
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.folder import Run

_ENTROPY = re.compile(r"attention/\w+/layer\d+/entropy")


def routing(run: Run, pattern: str = r"w_[qk]$", k: int = 3, start: int = 0, draws: int = 1999) -> pd.DataFrame:
    """Correlate score changes of the query and key matrices' path with entropy changes, of all batches and layers.

    The start of training, where everything changes fast at once, is to be left out: surrogates are stationary.

    Args:
        run: With an `AttentionProbe` and a recorder.
        pattern: Which recorded groups' path, taken together.
        k: Number of centred principal directions.
        start: First step that counts.
        draws: Phase-randomised surrogates for each pair.

    Returns:
        Columns component, quantity, intervals, r, level (95 % of the surrogates' |r| stay under it), p, and adjusted,
        the p for all pairs tried together (Holm).

    Raises:
        UserError: The run recorded no entropy, no group matches, or too few steps are shared.
    """
    if not run.exists:
        raise UserError(f"there is no run folder {run.path}: give one that holds a config.yaml")
    named = [str(name) for name in run.metrics if _ENTROPY.fullmatch(str(name))]
    if not named:
        raise UserError(f"{run.path} recorded no entropy of attention: add an AttentionProbe to its callbacks")
    series = {name: run.series(name) for name in named}
    quantities = {name: ([int(step) for step in values.index], values.tolist()) for name, values in series.items()}
    pairs = steered(run.trajectory, pattern, quantities, k, start=start, draws=draws)
    rows = [
        (s.component, s.quantity, s.intervals, s.correlated.value, s.correlated.level, s.correlated.p, s.adjusted)
        for s in pairs
    ]
    return pd.DataFrame(rows, columns=["component", "quantity", "intervals", "r", "level", "p", "adjusted"])


def main(args: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = CommandParser("routing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run with an AttentionProbe")
    parser.add_argument("--groups", default=r"w_[qk]$", help="which recorded groups, searched in their names")
    parser.add_argument("--k", type=int, default=3, help="number of principal directions")
    parser.add_argument("--start", type=int, default=0, help="first step that counts")
    options = parser.parse_args(args)
    print(
        routing(Run(options.run), options.groups, options.k, options.start).to_string(
            index=False, float_format="{:.4f}".format
        )
    )
