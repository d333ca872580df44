"""What a run of stories was, which published run it repeats, and which runs differ in optimizer or beta2 only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mini_gpt_pl.figures.plotting import Change
from mini_gpt_pl.report.families import AnyRun, families, family, several
from mini_gpt_pl.report.published import Beside, Book, book
from mini_gpt_pl.report.settings import (
    OF_OPTIMIZER,
    config_facts,
    differences,
    facts,
    mapping,
    optimizer_label,
    transformer,
)
from mini_gpt_pl.runs.folder import TRAJECTORY, Run
from mini_gpt_pl.stories.gpt import PRESETS
from mini_gpt_pl.stories.study.words import words

BOOK: Book = book("mini_gpt_pl.stories.study")
"""The published values: arXiv 2602.23696 ("paper"), and its authors' repository."""
MAIN, SHORT = "51 M, 10,000 steps", "51 M, 4,000 steps"
COLUMN = f"paper ({SHORT})"
"""Head of the column with published values where several runs stand beside runs of 4,000 steps."""
_PREFERRED = 0.95


# ------------------------------------------------------------------------------------------------------ one run


def story_facts(run: Run) -> dict[str, Any]:
    """Collect what decides how a run of stories goes.

    `tokenizer` is a name without folder and ending, so that one rank file under two paths is one tokenizer.
    """
    config = run.settings
    model, data, of_any = mapping(config, "model"), mapping(config, "data"), config_facts(config)
    size, tokenizer, weights = model.get("size"), data.get("tokenizer"), _weights(run)
    return {
        "model": transformer(asdict(PRESETS[size]) if isinstance(size, str) and size in PRESETS else size),
        "tokenizer": None if tokenizer is None else Path(str(tokenizer)).name.split(".")[0],
        "context": data.get("context"),
        **{key: of_any[key] for key in (*OF_OPTIMIZER, "warm-up", "schedule length", "steps")},
        "sequences a step": of_any["examples a step"],
        "clipping": of_any["clipping"],
        "lambda": None if None in weights else "{:g} to {:g} at step {}".format(*weights),
        "share of probe sequences": mapping(data, "probe").get("p_probe"),
        "corpus": mapping(data, "corpus").get("name"),
        "seed": of_any["seed"],
    }


def _weights(run: Run) -> tuple[Any, Any, Any]:
    weight = mapping(mapping(run.settings, "model"), "probe_weight")
    return weight.get("first"), weight.get("second"), weight.get("switch_step")


def lambda_change(run: Run) -> Change | None:
    """Return where lambda, the weight of the probe's loss, changes; None where it does not within the run."""
    first, second, step = _weights(run)
    last = run.trajectory.steps[-1] if (run.path / TRAJECTORY).is_file() else int(run.metrics.index[-1])
    if None in (first, second) or not step or not 0 < step < last:
        return None
    return Change(int(step), "" if first == second else f"λ: {first:g} → {second:g}")


# ------------------------------------------------------------------------------------------ which published run


def main_run(run: Run) -> Beside:
    """Return the main run of the paper that a run is compared with: that of its seed if it has one of the two."""
    of_run = facts(run)
    differs = differences(of_run, words("settings")["paper"])
    if run.lineage is not None:
        differs.insert(0, "reheated from a checkpoint instead of trained from scratch")
    if (seed := of_run["seed"]) not in (None, 42, 271):
        differs.append(f"seed {seed} instead of 42")
    return Beside("seed271" if seed == 271 else "seed42", tuple(differs), MAIN, BOOK)


def control_beside(run: Run) -> Beside | None:
    """Return the optimizer control of the paper (Table 8) that has a run's optimizer, by its settings; None without."""
    of_run = facts(run)
    for name, control in words("settings")["controls"].items():
        if all((of_run[key] or 0) == value for key, value in control.items() if key in OF_OPTIMIZER):
            # In 4,000 steps the second lambda acted on the last one only.
            return _short(name, of_run, control, "beta1", "beta2", "lambda")
    return None


def beta2_beside(run: Run) -> Beside | None:
    """Return the published run that has a run's beta2; None without."""
    of_run = facts(run)
    name = "" if of_run["beta2"] is None else f"beta2/{of_run['beta2']:g}"
    settings = words("settings")["beta2"] | {"beta2": of_run["beta2"]}
    return _short(name, of_run, settings, "lambda") if (name, "pc1") in BOOK.values else None


def _short(name: str, of_run: Mapping[str, Any], settings: Mapping[str, Any], *ignored: str) -> Beside:
    published = {**words("settings")["paper"], **settings, **words("settings")["short"]}
    return Beside(name, tuple(differences(of_run, published, ignored)), SHORT, BOOK)


def reheat_beside(run: Run, record: Mapping[str, Any]) -> Beside:
    """Return the published reheat of a run's seed and learning rate; one that holds nothing where there is none."""
    lr, of_run, all_settings = record.get("lr"), facts(run), words("settings")
    name = f"reheat/{of_run['seed']}/{lr:g}" if isinstance(lr, int | float) else ""
    if (name, "gain") not in BOOK.values:
        return Beside("", (), MAIN, BOOK)
    published = {key: all_settings["paper"][key] for key in all_settings["reheat_shares"]} | all_settings["reheat"]
    differs = differences({**of_run, "reheated step": record.get("parent_step")}, published)
    return Beside(name, tuple(differs), MAIN, BOOK)


# ------------------------------------------------------------------------------------------ which runs belong together


def beta2_of(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Runs that differ in beta2 (and perhaps seed) only, by falling beta2; none if there is no such pair."""
    alike = [run for run in family(runs, "beta2", "seed") if facts(run)["beta2"] is not None]
    return sorted(several(alike, "beta2"), key=lambda run: -float(facts(run)["beta2"]))


def one_beta2(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Of runs that differ in beta2 (and perhaps seed) only, keep those of one beta2: 0.95, else the commonest one."""
    chosen: list[AnyRun] = []
    for part in families(runs, "beta2", "seed"):
        count = Counter(facts(run).get("beta2") for run in part)
        beta2 = _PREFERRED if count[_PREFERRED] else count.most_common(1)[0][0]
        chosen += [run for run in part if facts(run)["beta2"] == beta2]
    return [run for run in runs if run in chosen]


def optimizers_of(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Runs that differ in their optimizer, its settings and their length, one of each; none if there are not two.

    Of several runs of one kind, that of the seed that most runs have, and the first of those.
    """
    chosen = one_beta2(family(runs, *OF_OPTIMIZER, "steps", "seed"))
    usual = Counter(facts(run)["seed"] for run in chosen)
    kinds: dict[str, AnyRun] = {}
    for run in sorted(chosen, key=lambda run: -usual[facts(run)["seed"]]):
        kinds.setdefault(optimizer_label(facts(run)), run)
    return list(kinds.values()) if len(kinds) > 1 else []


def optimizer_labels(runs: Sequence[Run]) -> list[str]:
    """Name the optimizers of runs, with their beta2 where runs that have one differ in it."""
    differ = len({facts(run)["beta2"] for run in runs} - {None}) > 1
    return [optimizer_label(facts(run), beta2=differ) for run in runs]
