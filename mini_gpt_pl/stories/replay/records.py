"""What a replay writes: a JSON file for each checkpoint, and one long table of them all."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mini_gpt_pl.atomic import replacing
from mini_gpt_pl.errors import UserError

TABLE = "replay.csv"

Record = dict[str, Any]


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


def read_all(folder: Path) -> dict[int, Record]:
    """Read the records in a folder, by step.

    Raises:
        UserError: One is damaged.
    """
    found = {}
    for file in files(folder):
        try:
            found[int(file.stem)] = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file} cannot be read ({error}): delete it, and replay its step again") from None
    return found


def files(folder: Path) -> list[Path]:
    """Return the records in a folder."""
    return sorted(file for file in folder.glob("*.json") if re.fullmatch(r"\d{6,}", file.stem))


def check(folder: Path, known: dict[int, Record], settings: Record, sha256: str) -> None:
    """Refuse to put records with other settings, or of other batches, side by side.

    Raises:
        UserError: Naming the first difference.
    """
    for step, record in known.items():
        wanted = {**settings, "sha256": sha256}
        there = {**record.get("settings", {}), "sha256": record.get("sha256")}
        for name in (name for name in {**wanted, **there} if wanted.get(name) != there.get(name)):
            raise UserError(
                f"{file_of(folder, step)} was replayed with {name} {there.get(name)}, not {wanted.get(name)}: replace "
                "all records with --overwrite, or choose another folder with --out"
            )


def file_of(folder: Path, step: int) -> Path:
    """Return where the record of a step lies."""
    return folder / f"{step:06d}.json"


def write(folder: Path, record: Record) -> None:
    """Write a record, NaN as null, so that a reader sees all of it or nothing."""
    text = json.dumps(_finite(record), indent=1, allow_nan=False) + "\n"
    with _written(file_of(folder, record["step"])) as file:
        file.write_text(text)


def write_table(folder: Path, found: dict[int, Record]) -> Path:
    """Write all records as one long table, and return its path."""
    with _written(folder / TABLE) as file, file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(Line._fields)
        writer.writerows(lines(found))
    return folder / TABLE


def lines(found: dict[int, Record]) -> Iterator[Line]:
    """Flatten records into numbers, step by step, each beside what chance gives."""
    sums: dict[str, float] = {}
    for step in sorted(found):
        record = found[step]
        yield from _gradient_lines(step, record)
        for label, (value, spread) in record["bias"].items():
            yield Line(step, "bias", label, value, spread, 0.0)
            sums[label] = sums.get(label, 0.0) + (math.nan if value is None else value)
            yield Line(step, "bias_sum_of_replayed", label, _finite(sums[label]), None, 0.0)
        for label, (value, spread) in record["interference"].items():
            yield Line(step, "interference", label, value, spread, 0.0)
        for label, shown in record["fisher"].items():
            yield from _fisher_lines(step, label, shown, record["noise_floor"][label])
        for name, values in record.get("logit_lens", {}).items():
            for layer, value in enumerate(values):
                yield Line(step, f"logit_lens/{name}", f"layer {layer}", value)


def _gradient_lines(step: int, record: Record) -> Iterator[Line]:
    for loss, by_label in record["gradient"].items():
        for label, shown in by_label.items():
            for name, null in (("abs_cos", record["noise_floor"][label]), ("cos", 0.0), ("norm", None)):
                value, spread = shown[name]
                yield Line(step, f"{loss}/{name}", label, value, spread, null)


def _fisher_lines(step: int, label: str, shown: Record, floor: float) -> Iterator[Line]:
    estimates = [(f"q_{axis}", pair, shown["random"]) for axis, pair in shown["q"].items()]
    estimates += [("trace", shown["trace"], None), ("anisotropy", shown["anisotropy"], 1.0)]
    estimates += [("lambda_1", [shown["lambda_1"], shown["lambda_1_se"]], None)]
    estimates += [("overlap", [shown["overlap"], shown["overlap_se"]], floor)]
    for name, (value, error), null in estimates:
        yield Line(step, f"fisher/{name}", label, value, error, null)
    for k, value in enumerate(shown["eigenvalues"][1:], 2):
        yield Line(step, f"fisher/lambda_{k}", label, value)


def headline(record: Record, whole: str) -> list[str]:
    """Cells of the closing table: step, event, and the whole selection's numbers beside what chance gives."""
    floor = record["noise_floor"][whole]
    aligned = [value and value / floor for value in record["gradient"]["combined"][whole]["abs_cos"]]
    cells = [str(record["step"]), record["event"] or "", _plus_minus(aligned, ".1f")]
    cells += [_plus_minus(record["bias"][whole], ".1e"), _plus_minus(record["interference"][whole], ".3f")]
    shown = record["fisher"].get(whole)
    if shown is None:
        return [*cells, "-", "-"]
    return [*cells, _plus_minus(shown["anisotropy"], ".1f"), f"{shown['overlap'] / floor:.1f}"]


def _plus_minus(pair: Sequence[float | None], form: str) -> str:
    value, spread = ("-" if number is None else f"{number:{form}}" for number in pair)
    return value if spread == "-" else f"{value} ± {spread}"


def make(folder: Path) -> None:
    """Make the folder.

    Raises:
        UserError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): choose another folder with --out") from None


@contextmanager
def _written(file: Path) -> Iterator[Path]:
    try:
        with replacing(file) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): choose another folder with --out") from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
