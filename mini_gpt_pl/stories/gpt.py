"""The model: a GPT-2-like decoder without linear biases and without dropout.

Read it from top to bottom: sizes, attention, MLP, block, GPT. Shapes in comments: B sequences, T positions, N rows
(positions of all sequences, one behind the other), d = ``d_model``, nh heads of hs = d / nh values, V the vocabulary,
Vp the vocabulary padded for the hardware.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.stories.packing import Packing, packed_attention, spread_rows
from mini_gpt_pl.stories.scoring import Scores, score

INIT_STD = 0.02
LAYER_NORM_EPS = 1e-5

TRUNK_PATTERN: str = r"(?P<group>blocks\.\d+)\.(?:attn\.(?:qkv|out_proj)|mlp\.(?:w_up|w_down))\.weight"
"""The trunk: the four matrices of every block, grouped by block; for ``re.search`` on full parameter names."""


@dataclass(frozen=True)
class GPTSize:
    """The five numbers that fix the shape of a GPT, its vocabulary aside.

    Args:
        n_layer: Number of transformer blocks.
        n_head: Attention heads of each block; divides ``d_model``.
        d_model: Width of the residual stream.
        d_ff: Width of the hidden layer of each MLP.
        context: Longest sequence, in tokens.

    Raises:
        UserError: A number is below 1, or the heads do not divide the width.
    """

    n_layer: int
    n_head: int
    d_model: int
    d_ff: int
    context: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(f"model size: {field.name} is {getattr(self, field.name)}; give 1 or more")
        if self.d_model % self.n_head != 0:
            raise UserError(f"model size: d_model {self.d_model} is no multiple of n_head {self.n_head}; change one")


PRESETS: dict[str, GPTSize] = {
    "quickstart": GPTSize(n_layer=4, n_head=4, d_model=128, d_ff=512),  # 1.1 M with 2,300 tokens
    "16m": GPTSize(n_layer=4, n_head=8, d_model=256, d_ff=1024),  # 16,081,664 with 50,257 tokens
    "51m": GPTSize(n_layer=8, n_head=16, d_model=512, d_ff=2048),  # 51,045,888 with 50,257 tokens
}


class CausalSelfAttention(nn.Module):
    """Multi-head attention to the present and the past: softmax(q k^T / sqrt(hs) + causal mask) v."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.n_head = size.n_head
        self.qkv = nn.Linear(size.d_model, 3 * size.d_model, bias=False)
        self.out_proj = nn.Linear(size.d_model, size.d_model, bias=False)

    def forward(
        self, x: Float[Tensor, "*rows d"], packing: Packing | None = None, context: int = 0
    ) -> Float[Tensor, "*rows d"]:
        """Mix each position with those before it; the rows of ``qkv.weight`` are q, then k, then v.

        ``x`` is whole sequences (B, T, d) or, with a packing of sequences of length ``context``, rows (N, d).
        """
        d = x.shape[-1]
        heads = self.qkv(x).unflatten(-1, (3, self.n_head, d // self.n_head))  # (B, T, 3, nh, hs) or (N, 3, nh, hs)
        if packing is not None:
            y = packed_attention(heads, packing, context)  # (N, nh, hs)
        else:
            q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, nh, T, hs)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)  # (B, T, nh, hs)
        out: Tensor = self.out_proj(y.flatten(-2))
        return out


class MLP(nn.Module):
    """W_down GELU(W_up x), with the exact (erf) GELU."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.w_up = nn.Linear(size.d_model, size.d_ff, bias=False)
        self.w_down = nn.Linear(size.d_ff, size.d_model, bias=False)

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Apply the same two layers at every position."""
        out: Tensor = self.w_down(F.gelu(self.w_up(x)))
        return out


class Block(nn.Module):
    """Pre-norm block: x + attn(ln1(x)), then x + mlp(ln2(x))."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(size.d_model, eps=LAYER_NORM_EPS)
        self.attn = CausalSelfAttention(size)
        self.ln2 = nn.LayerNorm(size.d_model, eps=LAYER_NORM_EPS)
        self.mlp = MLP(size)

    def forward(
        self, x: Float[Tensor, "*rows d"], packing: Packing | None = None, context: int = 0
    ) -> Float[Tensor, "*rows d"]:
        """Add what attention and MLP find to the residual stream; the arguments are those of the attention."""
        x = x + self.attn(self.ln1(x), packing, context)
        x = x + self.mlp(self.ln2(x))
        return x


class GPT(nn.Module):
    """Decoder-only language model whose output head is its token table (tied weights).

    Every matrix and both embedding tables start from N(0, 0.02^2), drawn from the global torch generator;
    LayerNorms start from gain 1 and bias 0. There is no 1/sqrt(2 n_layer) scaling of the residual matrices.

    Args:
        size: Shape of the model.
        vocab_size: Number of tokens V.
        vocab_multiple: The token table is padded to a multiple of this (64 suits tensor cores). The padding
            rows are cut off the logits, so they never win, never enter a loss and never get a gradient.

    Attributes:
        padded_vocab: Rows of the token table, Vp >= V.

    Raises:
        UserError: ``vocab_size`` or ``vocab_multiple`` is below 1.

    Example:
        >>> gpt = GPT(PRESETS["quickstart"], vocab_size=2300)
        >>> gpt(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 2300])
    """

    def __init__(self, size: GPTSize, vocab_size: int, vocab_multiple: int = 1) -> None:
        super().__init__()
        if vocab_size < 1 or vocab_multiple < 1:
            raise UserError(f"model: vocab_size {vocab_size}, vocab_multiple {vocab_multiple}; give 1 or more")
        self.size = size
        self.vocab_size = vocab_size
        self.padded_vocab = -(-vocab_size // vocab_multiple) * vocab_multiple
        self.tok_emb = nn.Embedding(self.padded_vocab, size.d_model)
        self.pos_emb = nn.Embedding(size.context, size.d_model)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.n_layer))
        self.ln_f = nn.LayerNorm(size.d_model, eps=LAYER_NORM_EPS)
        self.apply(_init_weights)

    @overload
    def forward(self, tokens: Int[Tensor, "B T"], targets: None = None) -> Float[Tensor, "B T V"]: ...

    @overload
    def forward(
        self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], packing: Packing | None = None
    ) -> Scores: ...

    def forward(
        self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"] | None = None, packing: Packing | None = None
    ) -> Float[Tensor, "B T V"] | Scores:
        """Logits of the next token at each position or, given the targets, how well these are predicted.

        Scoring inside the model keeps the logits, the largest tensor by far, from ever leaving it.

        Args:
            tokens: Token ids; T is at most ``size.context``.
            targets: The token that follows each position; -100 marks one that does not count.
            packing: Of the targets: only its rows are computed, and the scores are the same.

        Raises:
            UserError: The sequence is longer than the context.
        """
        T, context = tokens.shape[1], self.size.context
        if context < T:
            raise UserError(f"model: {T} tokens do not fit a context of {context}; cut the sequence")
        if targets is None:
            logits = F.linear(self.features(tokens), self.tok_emb.weight)  # (B, T, Vp)
            return logits[..., : self.vocab_size]
        features, labels = self.features(tokens, packing), targets.flatten()
        if packing is not None:
            labels = labels[packing.rows]
        nll, hit = score(features.flatten(0, -2), self.tok_emb.weight, labels, self.vocab_size)
        if packing is not None:
            nll, hit = (spread_rows(values, packing.rows, targets.numel()) for values in (nll, hit))
        return Scores(nll.view_as(targets), hit.view_as(targets))

    def features(self, tokens: Int[Tensor, "B T"], packing: Packing | None = None) -> Float[Tensor, "*rows d"]:
        """What the head sees: (B, T, d) or, with a packing, (N, d); the arguments are those of the forward pass."""
        T = tokens.shape[1]
        position = torch.arange(T, device=tokens.device)
        if packing is not None:
            tokens, position = tokens.flatten()[packing.rows], packing.rows % T
        x = self.tok_emb(tokens) + self.pos_emb(position)
        for block in self.blocks:
            x = block(x, packing, T)
        features: Tensor = self.ln_f(x)
        return features

    @torch.no_grad()
    def generate(
        self,
        prompt: Int[Tensor, "B T"],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B S"]:
        """Continue the prompts token by token; the model sees the last ``size.context`` tokens.

        Args:
            prompt: Token ids, at least one a row.
            max_new_tokens: Tokens to add, S - T.
            temperature: Divides the logits; 0 takes the most likely token.
            top_k: Sample among the k most likely tokens only.
            generator: Source of randomness, on the model's device; None is torch's global one.

        Raises:
            UserError: A prompt is empty, the temperature is negative or ``top_k`` is below 1.
        """
        if prompt.shape[1] == 0:
            raise UserError("generate: the prompt is empty; give at least one token")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise UserError(f"generate: temperature {temperature}, top_k {top_k}; give >= 0 and >= 1")
        tokens = prompt
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.size.context :])[:, -1]  # (B, V)
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)
            else:
                # topk rather than a threshold: exactly k candidates, also when the k-th has ties.
                k = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
                best, ids = logits.float().topk(k, dim=-1)
                choice = torch.multinomial((best / temperature).softmax(dim=-1), num_samples=1, generator=generator)
                new = ids.gather(-1, choice)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens


def _init_weights(module: nn.Module) -> None:
    """N(0, 0.02^2) for tables and matrices; LayerNorm keeps PyTorch's own gain 1 and bias 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, mean=0.0, std=INIT_STD)
