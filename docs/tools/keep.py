"""Keep the small results of runs: what a report needs, without weights and without paths of the machine.

python -m docs.tools.keep runs/seeds runs/beta2 --out docs/replication/runs
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mini_gpt_pl.command_line import one_line_errors
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.folder import CONFIG, LINEAGE, METRICS, OUTCOME, REPLAY, TRAJECTORY, Run, runs_below

# Live geometry follows from the Gram matrices, and a z-score from its cosine and the dimension.
_FOLLOWS = r"^backbone/|^overhead/|_z$"
_AS_THEY_ARE = (TRAJECTORY, OUTCOME, LINEAGE, "switching.json")


def keep(run: Run, folder: Path) -> None:
    """Copy configuration, metrics, Gram matrices, outcome, reheat, switches, replay and experiments of a run.

    Raises:
        UserError: The run has no configuration or no metrics, or the folder is the run's own.
    """
    if folder.resolve() == run.path.resolve():
        raise UserError(f"{folder} is the run itself: give --out another folder")
    config, metrics = _without_paths(run.config), run.metrics
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    metrics.loc[:, ~metrics.columns.str.contains(_FOLLOWS)].to_csv(folder / METRICS, float_format="%.6g")
    for name in _AS_THEY_ARE:
        if (run.path / name).is_file():
            shutil.copyfile(run.path / name, folder / name)
    for part in (REPLAY, "experiments"):
        for file in sorted((run.path / part).glob("*.json")):
            (folder / part).mkdir(exist_ok=True)
            shutil.copyfile(file, folder / part / file.name)


def _without_paths(value: Any) -> Any:
    """Leave of every absolute path its last part: the rest is the machine's."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def main(args: Sequence[str] | None = None) -> None:
    """Keep the runs named on the command line, or those in folders of runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, or folders of run folders")
    parser.add_argument("--out", type=Path, required=True, help="where OUT/FOLDER/RUN goes")
    options = parser.parse_args(args)
    with one_line_errors():
        for given in options.runs:
            for path in runs_below(given):
                inside = path.resolve().relative_to(given.resolve().parent)
                keep(Run(path), options.out / inside)
                print(options.out / inside)


if __name__ == "__main__":
    main()
