"""The model of the second task: a pre-norm transformer encoder that classifies a sequence at one position.

Read it from top to bottom: sizes, attention, block, encoder, initialisation. Shapes in comments: B sequences, T
positions, Q of them whose output is asked for, d = `d_model`, nh heads of hs = d / nh values, C classes. Attention is
written out: it can be differentiated twice, in float64 too, and the weights that `Encoder.attention` returns are those
that the output is made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.concentration import Change

ATTENTION_PATTERN: str = r"(?P<group>blocks\.\d+\.attn\.w_[qkvo])\.weight"
"""The four attention matrices of every block, each a group of its own; for `re.search` on full parameter names."""


@dataclass(frozen=True)
class EncoderSize:
    """The numbers that fix the shape of an encoder, its task aside.

    Args:
        n_layer: Number of blocks.
        n_head: Attention heads of each block; divides `d_model`.
        d_model: Width of the residual stream.
        d_ff: Width of the hidden layer of each block's MLP; 0 for blocks of attention alone.

    Raises:
        UserError: A number is out of range, or the heads do not divide the width.
    """

    n_layer: int = 2
    n_head: int = 4
    d_model: int = 128
    d_ff: int = 256

    def __post_init__(self) -> None:
        if min(self.n_layer, self.n_head, self.d_model) < 1 or self.d_ff < 0:
            raise UserError(f"model size: {self}: give 1 or more layers, heads and values, and d_ff of 0 or more")
        if self.d_model % self.n_head != 0:
            raise UserError(f"model size: d_model {self.d_model} is no multiple of n_head {self.n_head}; change one")


class Attention(nn.Module):
    """Multi-head attention with a matrix of its own for each of queries, keys, values and output.

    If causal, a position sees only itself and those before it.
    """

    def __init__(self, size: EncoderSize, causal: bool) -> None:
        super().__init__()
        self.n_head = size.n_head
        self.causal = causal
        self.change: Change | None = None  # set by `Encoder.attending` alone
        self.w_q = nn.Linear(size.d_model, size.d_model)
        self.w_k = nn.Linear(size.d_model, size.d_model)
        self.w_v = nn.Linear(size.d_model, size.d_model)
        self.w_o = nn.Linear(size.d_model, size.d_model)

    def weights(self, x: Float[Tensor, "B T d"], queries: Float[Tensor, "B Q d"]) -> Float[Tensor, "B nh Q T"]:
        """softmax(q k^T / sqrt(hs)), rows that sum to 1; the queries are those of the last Q positions, if causal."""
        q, k = self._heads(self.w_q(queries)), self._heads(self.w_k(x))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, nh, Q, T)
        if self.causal and (count := scores.shape[-2]) > 1:
            later = torch.ones(count, scores.shape[-1], dtype=torch.bool, device=x.device)
            scores = scores.masked_fill(later.triu(1 + scores.shape[-1] - count), -torch.inf)
        weights = scores.softmax(-1)
        return weights if self.change is None else self.change(weights)

    def forward(self, x: Float[Tensor, "B T d"], queries: Float[Tensor, "B Q d"]) -> Float[Tensor, "B Q d"]:
        """Mix the values of all positions for each query."""
        mixed = self.weights(x, queries) @ self._heads(self.w_v(x))  # (B, nh, Q, hs)
        out: Tensor = self.w_o(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Float[Tensor, "B T d"]) -> Float[Tensor, "B nh T hs"]:
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, size: EncoderSize) -> None:
        super().__init__()
        self.w_up = nn.Linear(size.d_model, size.d_ff)
        self.w_down = nn.Linear(size.d_ff, size.d_model)

    def forward(self, x: Float[Tensor, "B Q d"]) -> Float[Tensor, "B Q d"]:
        """Each position by itself."""
        out: Tensor = self.w_down(F.gelu(self.w_up(x)))
        return out


class Block(nn.Module):
    """Attention, then an MLP (if `d_ff` is not 0), each behind a LayerNorm and added to the residual stream."""

    def __init__(self, size: EncoderSize, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.d_model)
        self.attn = Attention(size, causal)
        self.mlp: MLP | None = None
        if size.d_ff:
            self.norm2 = nn.LayerNorm(size.d_model)
            self.mlp = MLP(size)

    def forward(self, x: Float[Tensor, "B T d"], asked: slice) -> Float[Tensor, "B Q d"]:
        """The residual stream behind the block, at the positions that are asked for."""
        normed = self.norm1(x)
        x = x[:, asked] + self.attn(normed, normed[:, asked])
        return x if self.mlp is None else x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Embedding, blocks, final LayerNorm and a linear head, read at one position.

    What the head does not read is not computed: of the last block only the output at the position that is read. No
    random numbers but the seed influence the initial values; the other arguments are those of `ResidueClassifier`.

    Example:
        >>> encoder = Encoder(EncoderSize(), vocab_size=97, classes=97, length=2)
        >>> sum(p.numel() for p in encoder.parameters())
        290401
        >>> encoder(torch.tensor([[3, 5]])).shape
        torch.Size([1, 97])
    """

    def __init__(
        self,
        size: EncoderSize,
        vocab_size: int,
        classes: int,
        length: int,
        causal: bool = False,
        identical_blocks: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.size = size
        self.causal = causal
        self.embedding = nn.Embedding(vocab_size, size.d_model)
        self.position = nn.Parameter(torch.empty(length, size.d_model))
        self.blocks = nn.ModuleList(Block(size, causal) for _ in range(size.n_layer))
        self.norm = nn.LayerNorm(size.d_model)
        self.head = nn.Linear(size.d_model, classes)
        self._read = slice(length - 1, length) if causal else slice(0, 1)
        initialise(self, torch.Generator().manual_seed(seed), identical_blocks=identical_blocks)

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B C"]:
        """Logits of the classes."""
        logits: Tensor = self.head(self.features(tokens))
        return logits

    def features(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B d"]:
        """What the head reads: the normalised residual stream behind the last block."""
        x = self._embed(tokens)
        for block in self.blocks[:-1]:
            x = block(x, slice(None))
        x = self.blocks[-1](x, self._read)
        normed: Tensor = self.norm(x).squeeze(1)
        return normed

    def attention(self, tokens: Int[Tensor, "B T"]) -> list[Float[Tensor, "B nh T T"]]:
        """Attention weights of every block: entry (i, j) of a head is how much position i takes from position j."""
        x, weights = self._embed(tokens), []
        for block in self.blocks:
            assert isinstance(block, Block)
            normed = block.norm1(x)
            weights.append(block.attn.weights(normed, normed))
            x = block(x, slice(None))
        return weights

    @contextmanager
    def attending(self, change: Change) -> Iterator[None]:
        """Put a function behind the softmax of every block for a while."""
        layers = [block.attn for block in self.blocks if isinstance(block, Block)]
        try:
            for layer in layers:
                layer.change = change
            yield
        finally:
            for layer in layers:
                layer.change = None

    def _embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T d"]:
        embedded: Tensor = self.embedding(tokens) + self.position
        return embedded


@torch.no_grad()
def initialise(encoder: Encoder, generator: torch.Generator, *, identical_blocks: bool) -> None:
    """Draw the initial values that PyTorch's own layers would draw.

    Tokens N(0, 1), positions N(0, 1/d); queries, keys and values uniform within sqrt(6 / (3d + d)), the Xavier bound of
    the one fused matrix that `torch.nn.MultiheadAttention` has for them; biases of the attention 0; every other linear
    layer, weights and biases, uniform within 1/sqrt(inputs); LayerNorms 1 and 0.

    With identical blocks the first one is drawn alone, and copied.
    """
    encoder.embedding.weight.normal_(generator=generator)
    encoder.position.normal_(std=encoder.size.d_model**-0.5, generator=generator)
    for number, block in enumerate(encoder.blocks):
        assert isinstance(block, Block)
        if number and identical_blocks:
            block.load_state_dict(encoder.blocks[0].state_dict())
        else:
            layers = (block.attn.w_q, block.attn.w_k, block.attn.w_v)
            bound = math.sqrt(6.0 / (3 * encoder.size.d_model + encoder.size.d_model))
            for layer in layers:
                layer.weight.uniform_(-bound, bound, generator=generator)
            _linear(block.attn.w_o, generator)
            for layer in (*layers, block.attn.w_o):
                layer.bias.zero_()
            if block.mlp is not None:
                _linear(block.mlp.w_up, generator)
                _linear(block.mlp.w_down, generator)
    _linear(encoder.head, generator)


def _linear(layer: nn.Linear, generator: torch.Generator) -> None:
    bound = layer.in_features**-0.5
    layer.weight.uniform_(-bound, bound, generator=generator)
    layer.bias.uniform_(-bound, bound, generator=generator)
