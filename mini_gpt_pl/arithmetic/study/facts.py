"""What a run of residues was, in words and numbers that can be compared."""

from __future__ import annotations

from typing import Any

from mini_gpt_pl.report.settings import Facts, mapping, said, transformer
from mini_gpt_pl.runs.folder import Run

OWN_SEED = "by the seed"
"""The split of a run that has no seed of its own for it."""


def residue_facts(run: Run) -> dict[str, Any]:
    """Collect what decides how a run of residues goes."""
    config = run.settings
    model, data = mapping(config, "model"), mapping(config, "data")
    settings = Facts.of_config(config)
    recorder = next(iter(run.callback_settings("TrajectoryRecorder")), {})
    operations, split = data.get("operations"), said(data, "split_seed", OWN_SEED)
    return {
        "model": transformer(model.get("size")),
        **settings.of_optimizer,
        "warm-up": settings.warmup,
        "schedule length": settings.length,
        "steps": settings.steps,
        "sequences a step": settings.examples,
        "clipping": settings.clipping,
        "operation": data.get("operation"),
        "modulus": data.get("modulus"),
        "training fraction": data.get("train_fraction"),
        "operations": None if operations is None else ", ".join(operations),
        "mirror pairs together": data.get("mirror_together"),
        "split": OWN_SEED if split == data.get("seed", config.get("seed_everything")) else split,
        "identical blocks": model.get("identical_blocks"),
        "eps": mapping(mapping(model, "optimizer"), "init_args").get("eps"),
        "steps a snapshot": mapping(recorder, "schedule").get("every"),
        "seed": settings.seed,
    }
