"""The encoder beside PyTorch's own layers: outputs, gradients, initial values; attention weights; sizes."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import one_line_error
from torch import Tensor, nn

from mini_gpt_pl.arithmetic import encoder as module
from mini_gpt_pl.arithmetic.encoder import ATTENTION_PATTERN, Block, Encoder, EncoderSize
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection

PAPER = EncoderSize()
TINY = EncoderSize(n_layer=2, n_head=2, d_model=8, d_ff=12)


def torch_layer(size: EncoderSize) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        size.d_model, size.n_head, size.d_ff, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


def pairs_of(block: Block, layer: nn.TransformerEncoderLayer) -> list[tuple[list[Tensor], Tensor]]:
    """Our parameters that together are one of PyTorch's, stacked."""
    own, theirs = block.attn, layer.self_attn
    assert block.mlp is not None and theirs.in_proj_weight is not None
    fused = (own.w_q, own.w_k, own.w_v)
    return [
        ([part.weight for part in fused], theirs.in_proj_weight),
        ([part.bias for part in fused], theirs.in_proj_bias),
        ([own.w_o.weight], theirs.out_proj.weight),
        ([own.w_o.bias], theirs.out_proj.bias),
        *(
            ([getattr(mine, kind)], getattr(reference, kind))
            for mine, reference in (
                (block.norm1, layer.norm1),
                (block.norm2, layer.norm2),
                (block.mlp.w_up, layer.linear1),
                (block.mlp.w_down, layer.linear2),
            )
            for kind in ("weight", "bias")
        ),
    ]


class Reference(nn.Module):
    """The same model from PyTorch's layers, with the weights of ours."""

    def __init__(self, encoder: Encoder, causal: bool) -> None:
        super().__init__()
        self.own, self.causal = encoder, causal
        self.layers = nn.ModuleList(torch_layer(encoder.size) for _ in encoder.blocks).double()
        for block, layer in zip(encoder.blocks, self.layers, strict=True):
            assert isinstance(block, Block) and isinstance(layer, nn.TransformerEncoderLayer)
            for mine, theirs in pairs_of(block, layer):
                theirs.data.copy_(torch.cat([part.data for part in mine]))

    def stream(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.own.embedding(tokens) + self.own.position
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype) if self.causal else None
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.own.head(self.own.norm(self.stream(tokens)[:, -1 if self.causal else 0]))
        return logits


def ours(causal: bool, length: int = 5) -> tuple[Encoder, Tensor, Tensor]:
    encoder = Encoder(TINY, 11, 7, length, causal=causal, identical_blocks=False, seed=3).double()
    with torch.no_grad():  # biases and norms too: at their initial values a mistake in them would not show
        for i, parameter in enumerate(encoder.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=_generator(i)))
    tokens = torch.randint(11, (6, length), generator=_generator(1))
    return encoder, tokens, torch.randint(7, (6,), generator=_generator(2))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("causal", [False, True])
def test_outputs_and_gradients_are_those_of_pytorchs_layers(causal: bool) -> None:
    encoder, tokens, labels = ours(causal)
    reference = Reference(encoder, causal)
    assert torch.allclose(encoder(tokens), reference(tokens), rtol=0, atol=1e-12)
    F.cross_entropy(encoder(tokens), labels).backward()
    outside = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    assert len(outside) == len(list(encoder.parameters()))
    encoder.zero_grad()
    F.cross_entropy(reference(tokens), labels).backward()
    for name, parameter in encoder.named_parameters():
        if not name.startswith("blocks"):
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, outside[name], rtol=0, atol=1e-12), name
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    for block, layer in zip(encoder.blocks, reference.layers, strict=True):
        assert isinstance(block, Block) and isinstance(layer, nn.TransformerEncoderLayer)
        for mine, theirs in pairs_of(block, layer):
            own = torch.cat([outside[names[id(part)]] for part in mine])
            assert theirs.grad is not None and torch.allclose(own, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_weights_are_those_of_pytorchs_attention(causal: bool) -> None:
    encoder, tokens, _ = ours(causal)
    reference = Reference(encoder, causal)
    x = encoder.embedding(tokens) + encoder.position
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64) if causal else None
    found = encoder.attention(tokens)
    assert len(found) == 2 and found[0].shape == (6, 2, 5, 5)
    for weights, layer in zip(found, reference.layers, strict=True):
        assert isinstance(layer, nn.TransformerEncoderLayer)
        normed = layer.norm1(x)
        _, expected = layer.self_attn(normed, normed, normed, attn_mask=mask, average_attn_weights=False)
        assert torch.allclose(weights, expected, rtol=0, atol=1e-12)
        assert torch.allclose(weights.sum(-1), torch.ones(6, 2, 5, dtype=torch.float64))
        x = layer(x, src_mask=mask)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_weights_are_what_the_output_is_made_of(causal: bool) -> None:
    encoder, tokens, _ = ours(causal)
    x = encoder.embedding(tokens) + encoder.position
    for weights, block in zip(encoder.attention(tokens), encoder.blocks, strict=True):
        assert isinstance(block, Block) and block.mlp is not None
        v = block.attn.w_v(block.norm1(x)).unflatten(-1, (2, 4))  # (B, T, nh, hs)
        x = x + block.attn.w_o(torch.einsum("bhqt,bthe->bqhe", weights, v).flatten(2))
        x = x + block.mlp(block.norm2(x))
    logits = encoder.head(encoder.norm(x[:, -1 if causal else 0]))
    assert torch.allclose(encoder(tokens), logits, rtol=0, atol=1e-12)


def test_a_causal_encoder_reads_only_the_past() -> None:
    encoder, tokens, _ = ours(True)
    above = torch.ones(5, 5, dtype=torch.bool).triu(1)
    assert all((weights[..., above] == 0).all() for weights in encoder.attention(tokens))


def test_it_can_be_differentiated_twice() -> None:
    encoder, tokens, labels = ours(False, length=2)
    parameters = list(encoder.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(encoder(tokens), labels), parameters, create_graph=True)
    norm = torch.stack([(g * g).sum() for g in gradients]).sum()
    assert all(torch.isfinite(h).all() for h in torch.autograd.grad(norm, parameters))


# ------------------------------------------------------------------------------------------ initial values


def test_initial_values_have_the_distributions_of_pytorchs_layers() -> None:
    encoder = Encoder(PAPER, 97, 97, 2, seed=1)
    torch.manual_seed(0)
    layer = torch_layer(PAPER)
    block = encoder.blocks[0]
    assert isinstance(block, Block)
    for mine, fused in pairs_of(block, layer):
        own, theirs = torch.cat([part.data for part in mine]), fused.detach()
        assert own.shape == theirs.shape
        assert own.std(correction=0) == pytest.approx(float(theirs.std(correction=0)), rel=0.15)
        assert own.abs().max() == pytest.approx(float(theirs.abs().max()), rel=0.05)
        assert own.mean() == pytest.approx(float(theirs.mean()), abs=float(4 * own.std() / own.numel() ** 0.5 + 1e-9))
    bounds = {
        "blocks.0.attn.w_q.weight": math.sqrt(6 / 512),
        "blocks.0.attn.w_k.weight": math.sqrt(6 / 512),
        "blocks.0.attn.w_v.weight": math.sqrt(6 / 512),
        "blocks.0.attn.w_o.weight": 128**-0.5,
        "blocks.0.mlp.w_up.weight": 128**-0.5,
        "blocks.0.mlp.w_down.weight": 256**-0.5,
        "head.weight": 128**-0.5,
    }
    weights = {name: parameter.detach() for name, parameter in encoder.named_parameters()}
    for name, bound in bounds.items():
        values = weights[name]
        assert 0.999 * bound < values.abs().max() <= bound, name
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.02), name  # uniform
    assert weights["embedding.weight"].std() == pytest.approx(1.0, rel=0.02)
    assert weights["position"].std() == pytest.approx(128**-0.5, rel=0.15)
    assert all(weights[f"blocks.0.attn.w_{m}.bias"].abs().max() == 0 for m in "qkvo")
    assert all((weights[f"{n}.weight"] == 1).all() for n in ("norm", "blocks.1.norm1", "blocks.1.norm2"))


def test_all_blocks_start_identical_unless_drawn_apart() -> None:
    same, apart = (Encoder(PAPER, 97, 97, 2, identical_blocks=identical) for identical in (True, False))
    states = [[block.state_dict() for block in encoder.blocks] for encoder in (same, apart)]
    assert all(torch.equal(states[0][0][name], value) for name, value in states[0][1].items())
    assert not torch.equal(states[1][0]["attn.w_q.weight"], states[1][1]["attn.w_q.weight"])
    same.blocks[0].attn.w_q.weight.data.zero_()  # type: ignore[union-attr, operator]
    assert same.blocks[1].attn.w_q.weight.abs().max() > 0  # type: ignore[union-attr, operator]


def test_initial_values_are_a_function_of_the_seed_alone() -> None:
    first = Encoder(TINY, 5, 5, 2, seed=4)
    torch.manual_seed(123)
    again, other = Encoder(TINY, 5, 5, 2, seed=4), Encoder(TINY, 5, 5, 2, seed=5)
    values = [torch.cat([p.detach().flatten() for p in e.parameters()]) for e in (first, again, other)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


@pytest.mark.parametrize(
    ("size", "vocab", "classes", "length", "parameters", "norm"),
    [
        (PAPER, 97, 97, 2, 290_401, 118),
        (EncoderSize(n_layer=3), 97, 97, 2, 422_881, 121),
        (EncoderSize(1, 4, 64, 128), 59, 59, 2, 41_339, 64),
        (EncoderSize(5, 4, 128, 0), 256, 8, 16, 367_624, None),  # attention alone
    ],
)
def test_numbers_of_parameters(
    size: EncoderSize, vocab: int, classes: int, length: int, parameters: int, norm: float | None
) -> None:
    encoder = Encoder(size, vocab, classes, length)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
    if norm is not None:
        found = torch.nn.utils.get_total_norm([parameter.detach() for parameter in encoder.parameters()])
        assert found == pytest.approx(norm, rel=0.02)


def test_the_pattern_selects_the_attention_matrices_each_by_itself() -> None:
    selection = ParameterSelection.of(Encoder(PAPER, 97, 97, 2), ATTENTION_PATTERN)
    assert selection.groups == tuple(f"blocks.{i}.attn.w_{m}" for i in range(2) for m in "qkvo")
    assert selection.dim == 131_072


@pytest.mark.parametrize("wrong", [{"n_layer": 0}, {"d_ff": -1}, {"n_head": 3}])
def test_a_shape_that_cannot_be_is_one_line(wrong: dict[str, int]) -> None:
    with one_line_error("model size: "):
        EncoderSize(**wrong)


def test_the_example_holds() -> None:
    assert doctest.testmod(module).attempted > 2
    assert doctest.testmod(module).failed == 0
