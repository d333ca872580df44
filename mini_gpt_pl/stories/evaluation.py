"""What an evaluation of the stories says, as one metric."""

from __future__ import annotations

import math

import numpy as np
import torch
from typing_extensions import override

from mini_gpt_pl.stories.data.datamodule import Batch
from mini_gpt_pl.stories.objective import TargetCounts, loss_terms
from mini_gpt_pl.stories.scoring import Scores
from mini_gpt_pl.training.sums import Means

EVALUATIONS = ("lm", "in", "ood")
"""The evaluation sets in the order of the data module's loaders."""


_DRAWS = 1000


def binomial_error(share: float, count: int) -> float:
    """Standard error sqrt(p (1 - p) / n) of a share p of n answers; NaN without answers."""
    return math.sqrt(max(share * (1 - share), 0.0) / count) if count else math.nan


def bootstrap_error(share: float, count: int) -> float:
    """Standard deviation of a share of n answers over draws of n of them with replacement.

    Which answers are right is all that counts, so that a draw has a binomial number of right ones. 1,000 draws, from
    the same random numbers each time: 2 % of the error itself is chance.
    """
    if not count or math.isnan(share):
        return math.nan
    rng = np.random.Generator(np.random.Philox(key=0))
    return float(rng.binomial(count, min(max(share, 0.0), 1.0), _DRAWS).std(ddof=1)) / count


class StoryEvaluation(Means):
    """Losses on held-out stories, and answers to probes within and beyond the distances that are trained on.

    `val/loss` is the mean negative log-likelihood (NLL) of ordinary targets in nats, `val/perplexity` its exponential.
    `probe/p_in` and `probe/p_ood` are the shares of probed sequences whose every probed token is right, `probe/nll_in`
    and `probe/nll_ood` the mean NLLs of probed tokens, `probe/lm_ood` that of the ordinary targets around them, and
    `probe/r_ood` the ratio of the latter two. `probe/p_in_se` and `probe/p_ood_se` are the binomial errors of the two
    shares, `probe/p_ood_bootstrap` the bootstrap's of the latter.
    """

    def __init__(self) -> None:
        super().__init__(["val/loss", "probe/p_in", "probe/p_ood", "probe/nll_in", "probe/nll_ood", "probe/lm_ood"])

    @override
    def update(self, batch: Batch, scores: Scores, evaluation: str) -> None:  # type: ignore[override]
        """Add a batch, without waiting for the device.

        Args:
            batch: The batch, B sequences of T tokens.
            scores: What the model says about its targets, each (B, T).
            evaluation: The set that it is of, one of `EVALUATIONS`.
        """
        counts = TargetCounts(batch.lm_count, batch.probe_count)
        terms = loss_terms(scores.nll, batch.targets, batch.probe_mask, counts)
        if evaluation == "lm":
            super().update("val/loss", terms.lm * counts.lm, counts.lm)
            return
        probed = batch.probe_mask.any(-1)
        exact = (scores.hit | ~batch.probe_mask).all(-1)  # every masked position is right
        super().update(f"probe/p_{evaluation}", (exact & probed).sum(), probed.sum())
        super().update(f"probe/nll_{evaluation}", terms.probe * counts.probe, counts.probe)
        if evaluation == "ood":
            super().update("probe/lm_ood", terms.lm * counts.lm, counts.lm)

    @override
    def compute(self) -> dict[str, float]:
        """Return the numbers over all batches of all ranks, on the host; NaN where a set had no batch."""
        counts = dict(zip(self.names, self.sums[:, 1].tolist(), strict=True))
        answers = {name: int(counts[f"probe/p_{name}"]) for name in ("in", "ood")}
        means = super().compute()
        errors = {f"probe/p_{name}_se": binomial_error(means[f"probe/p_{name}"], n) for name, n in answers.items()}
        errors["probe/p_ood_bootstrap"] = bootstrap_error(means["probe/p_ood"], answers["ood"])
        loss = means.pop("val/loss")
        perplexity = float(torch.tensor(loss).exp())
        ratio = means["probe/nll_ood"] / max(means["probe/lm_ood"], 1e-8)
        return {"val/loss": loss, "val/perplexity": perplexity, **means, "probe/r_ood": ratio, **errors}
