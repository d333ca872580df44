"""What is measured at checkpoints, in files: a JSON record for each, and one long table of them all."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mini_gpt_pl.atomic import finite, write_text
from mini_gpt_pl.errors import UserError

TABLE = "replay.csv"

Record = dict[str, Any]


class Records:
    """A folder of records, by step.

    Args:
        folder: Where they lie; `make` makes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = folder / TABLE

    def file(self, step: int) -> Path:
        """Where the record of a step lies."""
        return self.folder / f"{step:06d}.json"

    @property
    def _files(self) -> list[Path]:
        return sorted(file for file in self.folder.glob("*.json") if re.fullmatch(r"\d{6,}", file.stem))

    def read(self) -> dict[int, Record]:
        """Read all records.

        Raises:
            UserError: One is damaged.
        """
        records = {}
        for file in self._files:
            try:
                records[int(file.stem)] = json.loads(file.read_text())
            except ValueError as error:
                raise UserError(f"{file} cannot be read ({error}): delete it, and replay its step again") from None
        return records

    def read_alike(self, settings: Record, sha256: str) -> dict[int, Record]:
        """Read all records, and refuse those with other settings, or of other batches.

        Raises:
            UserError: Naming the first difference, or a damaged record.
        """
        records, wanted = self.read(), {**settings, "sha256": sha256}
        for step, record in records.items():
            there = {**record.get("settings", {}), "sha256": record.get("sha256")}
            for name in (name for name in {**wanted, **there} if wanted.get(name) != there.get(name)):
                raise UserError(
                    f"{self.file(step)} was replayed with {name} {there.get(name)}, not {wanted.get(name)}: replace "
                    "all records with --overwrite, or choose another folder with --out"
                )
        return records

    def make(self, *, empty: bool = False) -> None:
        """Make the folder; without records and table if it is to be empty.

        Raises:
            UserError: It cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be made ({error.strerror}): choose another folder with --out"
            ) from None
        for file in [*self._files, self.table] if empty else ():
            file.unlink(missing_ok=True)

    def write(self, record: Record) -> None:
        """Write a record, NaN as null, so that a reader sees all of it or nothing."""
        _write(self.file(record["step"]), json.dumps(finite(record), indent=1, allow_nan=False) + "\n")

    def write_table(self, lines: Iterable[tuple[Any, ...]], heads: Iterable[str]) -> None:
        """Write numbers as a CSV file."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(heads)
        writer.writerows(lines)
        _write(self.table, text.getvalue())


def _write(file: Path, text: str) -> None:
    try:
        write_text(file, text)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): choose another folder with --out") from None


# ---------------------------------------------------------------------------------------------- table of a replay


class Line(NamedTuple):
    """One number of the table.

    Attributes:
        step: Of the checkpoint.
        quantity: What it is: `<loss>/abs_cos`, `<loss>/cos`, `<loss>/norm`, `bias`, `bias_sum_of_replayed` (running
            sum of the bias over the checkpoints in the table: not over the steps between them), `interference`,
            `fisher/...`, `logit_lens/<set>`.
        label: Parameter group or the whole; the layer for the logit lens.
        value: The number.
        spread: Standard deviation over batches; of Fisher quantities the standard error.
        null: What chance gives: the noise floor of |cos|, the mean over all directions for a Rayleigh quotient.
    """

    step: int
    quantity: str
    label: str
    value: float | None
    spread: float | None = None
    null: float | None = None


def lines(records: dict[int, Record]) -> Iterator[Line]:
    """Flatten records into numbers, step by step, each beside what chance gives."""
    sums: dict[str, float] = {}
    for step, record in sorted(records.items()):
        floor = record["noise_floor"]
        for loss, by_label in record["gradient"].items():
            for label, shown in by_label.items():
                for name, null in (("abs_cos", floor[label]), ("cos", 0.0), ("norm", None)):
                    value, spread = shown[name]
                    yield Line(step, f"{loss}/{name}", label, value, spread, null)
        for label, (value, spread) in record["bias"].items():
            yield Line(step, "bias", label, value, spread, 0.0)
            sums[label] = sums.get(label, 0.0) + (math.nan if value is None else value)
            yield Line(step, "bias_sum_of_replayed", label, finite(sums[label]), None, 0.0)
        for label, (value, spread) in record["interference"].items():
            yield Line(step, "interference", label, value, spread, 0.0)
        for label, shown in record["fisher"].items():
            estimates = [(f"q_{axis}", pair, shown["random"]) for axis, pair in shown["q"].items()]
            estimates += [("trace", shown["trace"], None), ("anisotropy", shown["anisotropy"], 1.0)]
            estimates += [("lambda_1", (shown["lambda_1"], shown["lambda_1_se"]), None)]
            estimates += [("overlap", (shown["overlap"], shown["overlap_se"]), floor[label])]
            for name, (value, error), null in estimates:
                yield Line(step, f"fisher/{name}", label, value, error, null)
            for k, value in enumerate(shown["eigenvalues"][1:], 2):
                yield Line(step, f"fisher/lambda_{k}", label, value)
        for name, values in record.get("logit_lens", {}).items():
            for layer, value in enumerate(values):
                yield Line(step, f"logit_lens/{name}", f"layer {layer}", value)
