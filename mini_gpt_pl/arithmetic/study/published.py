"""Published numbers of the studies of grokking, as `published.yaml` has them, each with what is known against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import yaml

_LOADED: Mapping[str, Any] = yaml.safe_load(
    files("mini_gpt_pl.arithmetic.study").joinpath("published.yaml").read_text(encoding="utf-8")
)
SETTING: dict[str, Any] = _LOADED["setting"]
"""Facts of the paper's runs, but for operation, seed, length and weight decay (1, or none)."""
NOTES: Mapping[str, str] = _LOADED["notes"]
PC1: Mapping[int, Mapping[str, Sequence[float]]] = _LOADED["pc1"]
"""By layer and operation: of W_Q, W_K, W_V and W_O."""
PC1_NO_DECAY: Mapping[int, Mapping[str, float]] = _LOADED["pc1_no_decay"]
ONSETS: Mapping[str, Mapping[str, Sequence[float]]] = _LOADED["onsets"]
"""By operation: onset, t90, stop and ratio, as far as they were published, a value for each seed."""
ONSETS_NO_DECAY: Mapping[str, Mapping[str, Sequence[float]]] = _LOADED["onsets_no_decay"]
LAST_DEFECT: Mapping[str, Sequence[float]] = _LOADED["last_defect"]
RATES: Mapping[float, Mapping[str, Any]] = _LOADED["rates"]
ON_PATH: Mapping[str, float] = _LOADED["on_path"]
ON_SINGULAR: Mapping[str, Mapping[str, float]] = _LOADED["on_singular"]
