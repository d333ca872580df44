"""Tables of one run about its gradients: signed bias, Fisher curvature, alignment, interference, logit lens.

Replayed quantities use the whole run's backbone at stored checkpoints; where a run was not replayed, what was logged
while it ran (with the backbone of the past) stands in, and the title says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mini_gpt_pl.geometry.vectors.alignment import noise_floor
from mini_gpt_pl.report.measures import PHASES, RecordedPath, phase_of
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate, word
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.beside import Setting
from mini_gpt_pl.stories.study.published import PUBLISHED

_PARTS = (("combined", "combined"), ("lm", "LM"), ("probe", "probe"))
_LIVE = {"combined": "gradient", "lm": "lm", "probe": "probe"}
_PAST = "Measured while the run went on, with the v_b of the snapshots before; the run has not been replayed."


def replayed(run: Run) -> dict[int, dict[str, Any]]:
    """What a replay found, by step in ascending order."""
    return dict(sorted(run.replayed.items()))


def dig(found: Any, *keys: str) -> Any:
    """Follow keys into nested mappings; None where one is missing."""
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def estimate(found: Any) -> tuple[float, float]:
    """Read a number, or a number and its spread; NaN for what is missing."""
    values = found if isinstance(found, Sequence) and not isinstance(found, str) else [found]
    plain = [math.nan if value is None else float(value) for value in (*values, None)]
    return plain[0], plain[1]


def _labels(path: RecordedPath) -> list[str]:
    """Groups, then the whole selection."""
    groups = list(path.trajectory.groups)
    return [*(groups if len(groups) > 1 else ()), path.trunk]


def _dim(path: RecordedPath, label: str) -> int:
    return path.trajectory.dim_of(None if label == path.trunk else label)


def _event(found: Mapping[str, Any]) -> Cell:
    return word(str(found.get("event") or "-"))


# -------------------------------------------------------------------------------------------------- signed bias


def bias(path: RecordedPath, setting: Setting) -> list[Table]:
    """Signed projection b of gradients on the backbone per group and its running sum B (paper, Table 5)."""
    steps = replayed(path.run)
    if any(found.get("bias") for found in steps.values()):
        return [_replayed_bias(path, setting, steps)]
    return _live_bias(path, setting)


def _replayed_bias(path: RecordedPath, setting: Setting, steps: Mapping[int, Mapping[str, Any]]) -> Table:
    labels, form = _labels(path), "{:+.4f}"
    rows: list[Row] = []
    sums, chances = dict.fromkeys(labels, 0.0), dict.fromkeys(labels, 0.0)
    keys = [f"bias_sum/{label}" for label in labels]
    for step, found in steps.items():
        cells = {label: estimate(dig(found, "bias", label)) for label in labels}
        for label, (mean, _) in cells.items():
            sums[label] += 0.0 if math.isnan(mean) else mean
            length = estimate(dig(found, "gradient", "combined", label, "norm"))[0]
            chances[label] += (0.0 if math.isnan(length) else length) * noise_floor(_dim(path, label)) / len(steps)
        row = {"step": word(f"{step:,}"), "event": _event(found), "source": word("this run")}
        rows.append({**row, **{label: number(mean, form, sd) for label, (mean, sd) in cells.items()}})
    summed = {label: number(value, form) for label, value in sums.items()}
    rows.append({"step": word("sum B"), "source": word("this run"), **summed})
    by_chance = {label: number(value or math.nan, "{:.4f}") for label, value in chances.items()}
    rows.append({"step": word("|b| by chance"), "source": word("this run"), **by_chance})
    for name, prefix in (("200", "bias/200"), ("1,800", "bias/1800"), ("2,000", "bias/2000"), ("sum B", "bias_sum")):
        published = {label: setting.get(f"{prefix}/{label}") for label in labels}
        keys += [f"{prefix}/{label}" for label in labels]
        if any(published.values()):
            shown = {label: number(_plain(value.value), form) for label, value in published.items() if value}
            rows.append({"step": word(name), "source": word(setting.column), **shown})
    notes = [
        "b = <g, v_b> of single-batch gradients of the combined loss, the group's own whole-run v_b, a(T) > 0, mean ± "
        "standard deviation over the same fixed batches at every checkpoint; B is its sum over these checkpoints only.",
        "By chance: the mean |<g, w>| of one batch and a random direction w, ||g|| sqrt(2 / (pi D)), averaged over the "
        "checkpoints. Negative b: the gradient step goes along +v_b.",
        *setting.notes(*keys),
    ]
    return tabulate("table5_signed_bias", "Signed gradient bias along the backbone (paper, Table 5)", rows, notes)


def _plain(value: float | tuple[float, float]) -> float:
    return math.nan if isinstance(value, tuple) else value


def _live_bias(path: RecordedPath, setting: Setting) -> list[Table]:
    rows: list[Row] = []
    keys = []
    for label in _labels(path):
        values, total = (path.run.series(f"alignment/{label}/{name}") for name in ("bias", "bias_sum"))
        if values.empty:
            continue
        phases = [phase_of(float(step), path.length) for step in values.index]
        cells = {}
        for phase in PHASES:
            inside = values[[name == phase for name in phases]]
            cells[f"b, {phase}"] = number(float(inside.mean()), "{:+.4f}", float(inside.std()))
        keys.append(f"bias_sum/{label}")
        row = {"group": word(label), **cells, "sum B": number(float(total.iloc[-1]) if len(total) else None, "{:+.3f}")}
        lengths = _gradient_lengths(path, label)
        row["|b| by chance"] = number(lengths * noise_floor(_dim(path, label)), "{:.4f}")
        rows.append({**row, **{f"B, {key}": cell for key, cell in setting.cell(keys[-1], "{:+.2f}").items()}})
    if not rows:
        return []
    notes = [
        f"b = <g, v_b> of the accumulated training gradient, mean ± standard deviation by phase; B is its sum over all "
        f"measured steps. {_PAST}",
        "By chance: ||g|| sqrt(2 / (pi D)) with the mean length of the gradients, from b and their cosine.",
        *setting.notes(*keys),
    ]
    title = "Signed gradient bias along the past backbone (paper, Table 5)"
    return [tabulate("table5_signed_bias", title, rows, notes)]


def _gradient_lengths(path: RecordedPath, label: str) -> float:
    """Mean ||g|| of the measured gradients, as <g, v_b> / cos."""
    bias, cos = (path.run.series(f"alignment/{label}/{name}") for name in ("bias", "gradient"))
    ratio = (bias / cos).abs()
    return float(ratio[ratio.notna()].mean())


# ------------------------------------------------------------------------------------------------------- Fisher

_DIRECTIONS = (("backbone", "q(v_b)"), ("switch", "q(v_sw)"), ("pc2", "q(PC2)"), ("theta0", "q(theta_0)"))


def fisher(path: RecordedPath, setting: Setting) -> list[Table]:
    """Curvature of the empirical Fisher along directions, and its anisotropy (paper, Tables 6 and 7)."""
    steps = {step: found for step, found in replayed(path.run).items() if dig(found, "fisher", path.trunk)}
    rows = [_replayed_fisher(path, step, found) for step, found in steps.items()] or _live_fisher(path)
    if not rows:
        return []
    keys = ["overlap"]
    for step in _published_steps(setting):
        row = {"step": word(f"{step:,}"), "source": word(setting.column)}
        names = {"backbone": "q(v_b)", "switch": "q(v_sw)", "pc2": "q(PC2)", "anisotropy": "anisotropy"}
        for name, column in names.items():
            keys.append(f"fisher/{step}/{name}")
            if (value := setting.get(keys[-1])) is not None:
                row[column] = number(_plain(value.value), "{:.1f}" if name == "anisotropy" else "{:.1e}")
        rows.append(row)
    notes = [
        "Mean squared projection of mini-batch gradients of the combined loss (empirical Fisher of batch means), ± "
        "standard error; random: the exact mean over all directions off v_b; anisotropy: q(v_b) over it, 1 by chance.",
        "Isotropy is a low bar: compare q(v_b) with q of other directions of the path and of theta_0 too.",
        "u_1: leading mode of the same gradients; by chance |<u_1, v_b>| is the noise floor sqrt(2 / (pi D)).",
        None if steps else _PAST,
        *setting.notes(*keys),
    ]
    title = "Fisher curvature along the backbone (paper, Tables 6 and 7)"
    tables = [tabulate("table6_fisher", title, rows, notes)]
    return [*tables, *_fisher_blocks(path, steps)]


def _published_steps(setting: Setting) -> list[int]:
    keys = [key.split("/") for name, key in PUBLISHED if name == setting.name]
    return sorted({int(parts[1]) for parts in keys if parts[0] == "fisher"})


def _replayed_fisher(path: RecordedPath, step: int, found: Mapping[str, Any]) -> dict[str, Cell]:
    trunk = dig(found, "fisher", path.trunk)
    row = {"step": word(f"{step:,}"), "event": _event(found), "source": word("this run")}
    for name, column in _DIRECTIONS:
        row[column] = number(*_spread("{:.1e}", dig(trunk, "q", name)))
    row["random"] = number(estimate(dig(trunk, "random"))[0], "{:.1e}")
    row["anisotropy"] = number(*_spread("{:.1f}", dig(trunk, "anisotropy")))
    row["lambda_1"] = number(
        estimate(dig(trunk, "lambda_1"))[0], "{:.1e}", estimate(dig(trunk, "lambda_1_se"))[0], "se"
    )
    row["|<u_1, v_b>|"] = number(abs(estimate(dig(trunk, "overlap"))[0]), "{:.1e}")
    row["by chance"] = number(noise_floor(path.trajectory.dim), "{:.1e}")
    return row


def _spread(form: str, found: Any) -> tuple[float, str, float, str]:
    value, error = estimate(found)
    return value, form, error, "se"


def _live_fisher(path: RecordedPath) -> list[dict[str, Cell]]:
    prefix, dim = f"fisher/{path.trunk}/batch_mean", path.trajectory.dim
    rows = []
    for step in path.run.series(f"{prefix}/q_backbone").index:

        def at(name: str, step: int = step) -> float:
            return float(path.run.series(f"{prefix}/{name}").get(step, math.nan))

        row = {"step": word(f"{step:,}"), "source": word("this run")}
        for name, column in _DIRECTIONS:
            row[column] = number(at(f"q_{name}"), "{:.1e}", at(f"q_{name}_se"), "se")
        row["random"] = number((at("trace") - at("q_backbone")) / max(1, dim - 1), "{:.1e}")
        row["anisotropy"] = number(at("anisotropy"), "{:.1f}", at("anisotropy_se"), "se")
        row["lambda_1"] = number(at("lambda_1"), "{:.1e}")
        row["|<u_1, v_b>|"] = number(abs(at("overlap")), "{:.1e}")
        row["by chance"] = number(noise_floor(dim), "{:.1e}")
        rows.append(row)
    return rows


def _fisher_blocks(path: RecordedPath, steps: Mapping[int, Mapping[str, Any]]) -> list[Table]:
    """Anisotropy of every group at the replayed checkpoints."""
    rows: list[Row] = []
    for label in _labels(path):
        cells = {
            f"step {step:,}": number(*_spread("{:.1f}", dig(found, "fisher", label, "anisotropy")))
            for step, found in steps.items()
        }
        if any(cell.value is not None for cell in cells.values()):
            rows.append({"group": word(label), **cells})
    notes = ["q(v_b) over the mean of all directions, each group with its own v_b, ± standard error; 1 by chance."]
    title = "Fisher anisotropy along the backbone, block by block"
    return [tabulate("fisher_blocks", title, rows, notes)] if rows else []


# --------------------------------------------------------------------------------------------------- alignment


def gradient_alignment(path: RecordedPath, setting: Setting) -> list[Table]:
    """|cos| of single-batch gradients with the backbone beside the noise floor (paper, equation 10)."""
    steps, live = replayed(path.run), False
    rows = [_alignment_row(path, label, steps) for label in _labels(path)]
    if not any(cell.value is not None for row in rows for name, cell in row.items() if name.endswith("|cos|")):
        rows, live = [_live_alignment_row(path, label) for label in _labels(path)], True
    if not any(cell.value is not None for row in rows for name, cell in row.items() if name.endswith("|cos|")):
        return []
    for row in rows:
        row |= setting.cell("gradient/combined" if row["group"].text != path.trunk else "", "{:.3f}")
    notes = [
        "Means of |cos| with each group's own v_b"
        + (", over the measured steps." if live else f" over batches, averaged over {len(steps)} checkpoints."),
        "Floor: mean |cos| of independent isotropic vectors, sqrt(2 / (pi D)); / floor: in units of it.",
        _PAST if live else None,
        *setting.notes("gradient/combined"),
    ]
    return [tabulate("gradient_alignment", "Alignment of single-batch gradients (paper, equation 10)", rows, notes)]


def _alignment_row(path: RecordedPath, label: str, steps: Mapping[int, Mapping[str, Any]]) -> dict[str, Cell]:
    means = {}
    for part, _ in _PARTS:
        found = [estimate(dig(at, "gradient", part, label, "abs_cos"))[0] for at in steps.values()]
        known = [value for value in found if not math.isnan(value)]
        means[part] = math.fsum(known) / len(known) if known else math.nan
    return _alignment_cells(path, label, means)


def _live_alignment_row(path: RecordedPath, label: str) -> dict[str, Cell]:
    means = {part: float(path.run.series(f"alignment/{label}/{metric}").abs().mean()) for part, metric in _LIVE.items()}
    return _alignment_cells(path, label, means)


def _alignment_cells(path: RecordedPath, label: str, means: Mapping[str, float]) -> dict[str, Cell]:
    floor = noise_floor(_dim(path, label))
    row = {"group": word(label), "floor": number(floor, "{:.1e}")}
    for part, words in _PARTS:
        row[f"{words}, |cos|"] = number(means[part], "{:.4f}")
        row[f"{words}, / floor"] = number(means[part] / floor, "{:.1f}")
    return row


def interference(path: RecordedPath, setting: Setting) -> list[Table]:
    """Cosines of the gradients of the loss's parts, whole selection, beside the noise floor."""
    rows = _replayed_interference(path)
    live = not rows
    if live:
        rows = _live_interference(path)
    if not rows:
        return []
    floor = noise_floor(path.trajectory.dim)
    notes = [
        f"Mean ± standard deviation over {'measured steps' if live else 'batches'}; floor: sqrt(2 / (pi D)) = "
        f"{floor:.1e}, the mean |cos| of independent isotropic vectors, a low bar: gradients of one batch differ from "
        "those of another by far more, as the standard deviation says.",
    ]
    several = live and len(_loss_pairs(path)) > 1
    title = f"Interference of the {'tasks' if several else 'two objectives'}"
    return [tabulate("interference", title, rows, notes)]


def _replayed_interference(path: RecordedPath) -> list[Row]:
    """Of the language and the probe loss, at the replayed checkpoints."""
    floor = noise_floor(path.trajectory.dim)
    rows: list[Row] = []
    for step, found in replayed(path.run).items():
        mean, spread = estimate(dig(found, "interference", path.trunk))
        if math.isnan(mean):
            continue
        row = {"steps": word(f"{step:,}"), "event": _event(found), _cosine("lm", "probe"): _mean(mean, spread)}
        batches = dig(found, "settings", "batches")
        if batches and spread > 0:
            row["/ standard error"] = number(mean / (spread / math.sqrt(batches)), "{:+.1f}")
        rows.append(row | {"/ floor": number(abs(mean) / floor, "{:.0f}")})
    return rows


def _live_interference(path: RecordedPath) -> list[Row]:
    """Of every two losses that were logged, by phase."""
    floor, pairs = noise_floor(path.trajectory.dim), _loss_pairs(path)
    rows: list[Row] = []
    for phase in PHASES:
        row: dict[str, Cell] = {}
        for name, (one, other) in pairs.items():
            values = path.run.series(name)
            inside = values[[phase_of(float(step), path.length) == phase for step in values.index]]
            if len(inside):
                mean = float(inside.mean())
                over = "/ floor" if len(pairs) == 1 else f"/ floor, {_loss(one)} and {_loss(other)}"
                row |= {_cosine(one, other): _mean(mean, float(inside.std()))}
                row |= {over: number(abs(mean) / floor, "{:.0f}")}
        if row:
            rows.append({"steps": word(phase), **row})
    return rows


def _loss_pairs(path: RecordedPath) -> dict[str, tuple[str, str]]:
    """Metrics of the whole selection's interference, and the two losses of each."""
    found = {}
    for name in map(str, path.run.metrics.columns):
        pair = name.removeprefix(f"alignment/{path.trunk}/").split("_vs_")
        if name.startswith(f"alignment/{path.trunk}/") and len(pair) == 2:
            found[name] = (pair[0], pair[1])
    return found


def _loss(name: str) -> str:
    return dict(_PARTS).get(name, name)


def _cosine(one: str, other: str) -> str:
    return f"cos(g_{_loss(one)}, g_{_loss(other)})"


def _mean(mean: float, spread: float) -> Cell:
    return number(mean, "{:+.4f}", spread)


def logit_lens(path: RecordedPath, setting: Setting) -> list[Table]:
    """Probe accuracy read off after the embedding and after each block, at the replayed checkpoints."""
    rows: list[Row] = []
    for step, found in replayed(path.run).items():
        for name in ("ood", "in"):
            layers = dig(found, "logit_lens", name)
            if isinstance(layers, Sequence) and layers:
                heads = ["embedding", *(f"block {index}" for index in range(len(layers) - 1))]
                shown = {head: number(estimate(value)[0]) for head, value in zip(heads, layers, strict=True)}
                row = {"step": word(f"{step:,}"), "event": _event(found), "set": word(f"p_{name}")}
                rows.append({**row, **shown})
    if not rows:
        return []
    codewords = ((path.run.settings.get("data") or {}).get("probe") or {}).get("n_codewords")
    notes = [
        "Exact match of the final LayerNorm and head applied to each layer's output.",
        f"Guessing one of {codewords} codewords gives {1 / codewords:.4f}." if codewords else None,
    ]
    return [tabulate("logit_lens", "Logit lens: where in the network the key is", rows, notes)]
