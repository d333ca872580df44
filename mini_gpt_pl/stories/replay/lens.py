"""Logit lens: what the head would answer if the model ended earlier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mini_gpt_pl.stories.data.batch import Batch
from mini_gpt_pl.stories.gpt import GPT

# Sequences at a time: the model makes logits of all their positions.
_ROWS = 32


@torch.no_grad()
def lens_accuracy(
    gpt: GPT, batches: Iterable[Batch], autocast: Callable[[], AbstractContextManager[Any]]
) -> list[float]:
    """Exact-match accuracy of the probe when final norm and head follow the embedding, and each block.

    Args:
        gpt: In eval mode.
        batches: An evaluation set with probes; on any device.
        autocast: Makes the context of the forward pass.

    Returns:
        n_layer + 1 shares of the examples whose masked positions are all right, the last one p itself; NaN without
        examples.
    """
    device = gpt.tok_emb.weight.device
    right = torch.zeros(len(gpt.blocks) + 1, dtype=torch.float64, device=device)
    examples = 0
    for batch in batches:
        for rows in range(0, len(batch.tokens), _ROWS):
            tokens, targets, mask = (part[rows : rows + _ROWS].to(device) for part in batch[:3])
            with autocast(), _captured(gpt, mask) as states:
                gpt(tokens)
                answers = [F.linear(gpt.ln_f(state), gpt.tok_emb.weight)[:, : gpt.vocab_size] for state in states]
            missed = torch.zeros(len(states), *mask.shape, dtype=torch.bool, device=device)
            missed[:, mask] = torch.stack([logits.argmax(-1) != targets[mask] for logits in answers])
            right += (~missed.any(-1) & mask.any(-1)).sum(-1)
            examples += int(mask.any(-1).sum())
    return (right / examples).tolist() if examples else [float("nan")] * len(right)


@contextmanager
def _captured(gpt: GPT, mask: Bool[Tensor, "B T"]) -> Iterator[list[Float[Tensor, "n d"]]]:
    """Collect the residual stream at the masked positions before the first block and after each one."""
    states: list[Tensor] = []
    hooks = [gpt.blocks[0].register_forward_pre_hook(lambda block, inputs: states.append(inputs[0][mask]))]
    hooks += [block.register_forward_hook(lambda block, inputs, out: states.append(out[mask])) for block in gpt.blocks]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
