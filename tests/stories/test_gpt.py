"""The model against closed forms, brute force and Hugging Face's GPT-2."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.stories.gpt import GPT, PRESETS, TRUNK_PATTERN, GPTSize
from mini_gpt_pl.stories.scoring import Scores

TINY = GPTSize(n_layer=2, n_head=4, d_model=32, d_ff=48, context=12)
VOCAB = 29


def make_gpt(size: GPTSize = TINY, vocab_multiple: int = 1, dtype: torch.dtype = torch.float64) -> GPT:
    """A model whose weights are all far from their initial values, so that every one of them matters."""
    torch.manual_seed(0)
    gpt = GPT(size, VOCAB, vocab_multiple)
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return gpt.to(dtype)


def make_tokens(batch: int = 3, length: int = TINY.context, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def count(gpt: GPT) -> int:
    return sum(p.numel() for p in gpt.parameters())


def trunk(gpt: GPT) -> dict[str, int]:
    return {name: p.numel() for name, p in gpt.named_parameters() if re.search(TRUNK_PATTERN, name)}


# --- sizes and names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "vocab", "total", "trunk_total"),
    [("16m", 50257, 16_081_664, 3_145_728), ("51m", 50257, 51_045_888, 25_165_824)],
)
def test_published_parameter_counts(preset: str, vocab: int, total: int, trunk_total: int) -> None:
    with torch.device("meta"):
        gpt = GPT(PRESETS[preset], vocab)
    assert count(gpt) == total
    assert sum(trunk(gpt).values()) == trunk_total
    assert len(trunk(gpt)) == 4 * PRESETS[preset].n_layer


def test_paper2_size_and_quickstart() -> None:
    with torch.device("meta"):
        assert count(GPT(GPTSize(12, 12, 768, 3072), 50257)) == 123_767_040
        assert 0.9e6 < count(GPT(PRESETS["quickstart"], 2300)) < 1.2e6


def test_state_dict_names_are_exact() -> None:
    per_block = [
        "ln1.weight",
        "ln1.bias",
        "attn.qkv.weight",
        "attn.out_proj.weight",
        "ln2.weight",
        "ln2.bias",
        "mlp.w_up.weight",
        "mlp.w_down.weight",
    ]
    expected = {f"blocks.{i}.{name}" for i in range(TINY.n_layer) for name in per_block}
    expected |= {"tok_emb.weight", "pos_emb.weight", "ln_f.weight", "ln_f.bias"}
    assert set(make_gpt().state_dict()) == expected


def test_trunk_pattern_groups_blocks_under_a_prefix() -> None:
    found = [re.search(TRUNK_PATTERN, f"gpt.{name}") for name, _ in make_gpt().named_parameters()]
    groups = [match["group"] for match in found if match]
    assert groups == ["blocks.0"] * 4 + ["blocks.1"] * 4


def test_two_digit_block_is_its_own_group() -> None:
    match = re.search(TRUNK_PATTERN, "gpt.blocks.11.mlp.w_up.weight")
    assert match is not None and match["group"] == "blocks.11"


@pytest.mark.parametrize(
    "numbers", [(0, 1, 8, 8, 8), (1, 0, 8, 8, 8), (1, 1, 0, 8, 8), (1, 1, 8, 0, 8), (1, 1, 8, 8, 0), (1, 3, 8, 8)]
)
def test_impossible_sizes_are_user_errors(numbers: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="model size"):
        GPTSize(*numbers)


@pytest.mark.parametrize(("vocab", "multiple"), [(0, 1), (5, 0)])
def test_impossible_vocabularies_are_user_errors(vocab: int, multiple: int) -> None:
    with pytest.raises(UserError, match="vocab"):
        GPT(TINY, vocab, multiple)


@pytest.mark.parametrize(("multiple", "padded"), [(1, 29), (8, 32), (29, 29), (64, 64)])
def test_padded_vocabulary(multiple: int, padded: int) -> None:
    gpt = GPT(TINY, VOCAB, multiple)
    assert (gpt.vocab_size, gpt.padded_vocab, gpt.tok_emb.num_embeddings) == (VOCAB, padded, padded)
    assert gpt(make_tokens()).shape == (3, 12, VOCAB)


# --- initialisation ----------------------------------------------------------------------------------------


def test_initial_weights_are_normal_with_std_002() -> None:
    torch.manual_seed(3)
    gpt = GPT(PRESETS["quickstart"], 500)
    for name, p in gpt.named_parameters():
        if p.ndim == 2:
            z_mean = p.mean().item() / 0.02 * math.sqrt(p.numel())
            z_var = (p.var().item() / 0.02**2 - 1) * math.sqrt(p.numel() / 2)
            excess_kurtosis = ((p / 0.02) ** 4).mean().item() - 3
            assert abs(z_mean) < 5 and abs(z_var) < 5, name
            assert abs(excess_kurtosis) < 5 * math.sqrt(96 / p.numel()), name
        else:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name


def test_initialisation_follows_the_global_seed() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in GPT(TINY, VOCAB).parameters()])

    assert torch.equal(weights(5), weights(5))
    assert not torch.equal(weights(5), weights(6))


# --- the function ------------------------------------------------------------------------------------------


def hugging_face_twin(gpt: GPT) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=gpt.padded_vocab,
        n_positions=gpt.size.context,
        n_embd=gpt.size.d_model,
        n_layer=gpt.size.n_layer,
        n_head=gpt.size.n_head,
        n_inner=gpt.size.d_ff,
        activation_function="gelu",
        layer_norm_epsilon=1e-5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    twin = transformers.GPT2LMHeadModel(config).double().eval()
    ours = gpt.state_dict()
    renamed = {"wte.weight": "tok_emb.weight", "wpe.weight": "pos_emb.weight"}
    renamed |= {f"ln_f.{kind}": f"ln_f.{kind}" for kind in ("weight", "bias")}
    for i in range(gpt.size.n_layer):
        renamed |= {f"h.{i}.ln_{j}.{kind}": f"blocks.{i}.ln{j}.{kind}" for j in (1, 2) for kind in ("weight", "bias")}
        renamed[f"h.{i}.attn.c_attn.weight"] = f"blocks.{i}.attn.qkv.weight"
        renamed[f"h.{i}.attn.c_proj.weight"] = f"blocks.{i}.attn.out_proj.weight"
        renamed[f"h.{i}.mlp.c_fc.weight"] = f"blocks.{i}.mlp.w_up.weight"
        renamed[f"h.{i}.mlp.c_proj.weight"] = f"blocks.{i}.mlp.w_down.weight"
    with torch.no_grad():
        for name, p in twin.transformer.named_parameters():
            if name not in renamed:
                p.zero_()  # a bias that our model does not have
            else:
                value = ours[renamed.pop(name)]
                p.copy_(value.T if ".c_" in name else value)  # Conv1D stores (in, out)
    assert not renamed
    return twin


@pytest.mark.parametrize("vocab_multiple", [1, 16])
def test_logits_equal_hugging_face_gpt2(vocab_multiple: int) -> None:
    gpt, tokens = make_gpt(vocab_multiple=vocab_multiple), make_tokens()
    with torch.no_grad():
        theirs = hugging_face_twin(gpt)(tokens).logits[..., :VOCAB]
        ours = gpt(tokens)
    assert ours.std() > 0.5  # far from the trivial function
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("changed", [1, 6, 11])
def test_logits_ignore_the_future_and_see_the_present(changed: int) -> None:
    gpt, tokens = make_gpt(), make_tokens()
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % VOCAB
    with torch.no_grad():
        difference = (gpt(tokens) - gpt(other)).abs().amax(dim=(0, 2))  # (T,)
    assert difference[:changed].max() < 1e-13
    assert difference[changed:].min() > 1e-6


def test_a_prefix_gives_the_same_logits() -> None:
    gpt, tokens = make_gpt(), make_tokens()
    torch.testing.assert_close(gpt(tokens[:, :5]), gpt(tokens)[:, :5], rtol=0, atol=1e-12)


def test_too_long_a_sequence_names_both_numbers() -> None:
    with pytest.raises(UserError, match=r"13.*12"):
        make_gpt()(make_tokens(length=13))


# --- scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_multiple", [1, 16])
def test_scores_equal_brute_force(vocab_multiple: int) -> None:
    gpt, tokens, targets = make_gpt(vocab_multiple=vocab_multiple), make_tokens(), make_tokens(seed=2)
    logits = gpt(tokens).detach()
    targets[0] = logits[0].argmax(dim=-1)  # some hits
    targets[1, 3:7] = -100
    scores = gpt(tokens, targets)
    assert isinstance(scores, Scores)
    for b in range(tokens.shape[0]):
        for t in range(tokens.shape[1]):
            row, y = logits[b, t].tolist(), int(targets[b, t])
            expected = 0.0 if y == -100 else math.log(sum(math.exp(z) for z in row)) - row[y]
            assert scores.nll[b, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
            assert bool(scores.hit[b, t]) == (max(range(VOCAB), key=row.__getitem__) == y)
    assert scores.hit[0].all()


def test_uniform_logits_cost_log_vocab() -> None:
    gpt = make_gpt(vocab_multiple=16)
    with torch.no_grad():
        gpt.tok_emb.weight.zero_()
    nll = gpt(make_tokens(), make_tokens(seed=2)).nll
    torch.testing.assert_close(nll, torch.full_like(nll, math.log(VOCAB)))  # 29, not the padded 32


def test_a_tie_is_no_hit() -> None:
    """Two tokens with one embedding have one logit everywhere: neither alone is the most likely."""
    gpt, tokens = make_gpt(vocab_multiple=16), make_tokens()
    best = int(gpt(tokens)[0, 0].argmax())
    assert bool(gpt(tokens, torch.full_like(tokens, best)).hit[0, 0])
    other = next(token for token in range(VOCAB) if token != best and token not in tokens)
    with torch.no_grad():
        gpt.tok_emb.weight[other] = gpt.tok_emb.weight[best]
    assert gpt(tokens)[0, 0, other] == gpt(tokens)[0, 0, best]
    for target in (best, other):
        assert not gpt(tokens, torch.full_like(tokens, target)).hit[0, 0]


def test_padding_rows_get_no_gradient_and_no_say() -> None:
    gpt, tokens, targets = make_gpt(vocab_multiple=16), make_tokens(), make_tokens(seed=2)
    before = gpt(tokens, targets)
    before.nll.sum().backward()
    grad = gpt.tok_emb.weight.grad
    assert grad is not None
    assert torch.equal(grad[VOCAB:], torch.zeros(3, TINY.d_model, dtype=grad.dtype))
    assert (grad[:VOCAB].abs().amax(dim=1) > 0).all()
    with torch.no_grad():
        gpt.tok_emb.weight[VOCAB:] = 1e3
    after = gpt(tokens, targets)
    assert torch.equal(before.nll, after.nll) and torch.equal(before.hit, after.hit)


def test_nll_is_float32_in_a_bfloat16_model() -> None:
    gpt, tokens, targets = make_gpt(dtype=torch.bfloat16), make_tokens(), make_tokens(seed=2)
    nll = gpt(tokens, targets).nll
    assert nll.dtype == torch.float32
    logits = gpt(tokens)
    assert logits.dtype == torch.bfloat16
    exact = -logits.double().log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(nll.double(), exact, rtol=1e-5, atol=1e-5)


# --- compilation -------------------------------------------------------------------------------------------


def test_forward_is_one_graph() -> None:
    gpt, tokens, targets = make_gpt(vocab_multiple=16), make_tokens(), make_tokens(seed=2)
    eager = torch.autograd.grad(gpt(tokens, targets).nll.mean(), list(gpt.parameters()))
    eager_logits = gpt(tokens)
    names = list(gpt.state_dict())
    torch.compiler.reset()
    gpt.compile(fullgraph=True, backend="eager")
    compiled = torch.autograd.grad(gpt(tokens, targets).nll.mean(), list(gpt.parameters()))
    torch.testing.assert_close(gpt(tokens), eager_logits)
    torch.testing.assert_close(compiled, eager)
    assert list(gpt.state_dict()) == names


def test_forward_has_no_graph_break() -> None:
    gpt = make_gpt()
    torch.compiler.reset()
    explained = torch._dynamo.explain(gpt)(make_tokens(), make_tokens(seed=2))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


# --- generation --------------------------------------------------------------------------------------------


def test_greedy_generation_is_stepwise_argmax_beyond_the_context() -> None:
    gpt, prompt = make_gpt(), make_tokens(batch=2, length=7)
    rows = prompt.tolist()
    for _ in range(9):  # 7 + 9 > 12: the window slides
        for row in rows:
            row.append(int(gpt(torch.tensor([row[-TINY.context :]]))[0, -1].argmax()))
    assert gpt.generate(prompt, 9, temperature=0.0).tolist() == rows


def test_sampling_is_a_function_of_the_generator() -> None:
    gpt, prompt = make_gpt(), make_tokens(batch=2, length=3)

    def sample(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        tokens: list[list[int]] = gpt.generate(prompt, 8, temperature=2.0, generator=generator).tolist()
        return tokens

    state = torch.get_rng_state()
    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(state, torch.get_rng_state())


def test_top_1_is_greedy_and_top_k_stays_in_the_best_k() -> None:
    gpt, prompt = make_gpt(), make_tokens(batch=64, length=3)
    assert torch.equal(gpt.generate(prompt, 4, top_k=1), gpt.generate(prompt, 4, temperature=0.0))
    generator = torch.Generator().manual_seed(0)
    drawn = gpt.generate(prompt, 1, temperature=5.0, top_k=3, generator=generator)[:, -1:]
    ranks = (gpt(prompt)[:, -1] > gpt(prompt)[:, -1].gather(1, drawn)).sum(dim=1)
    assert set(ranks.tolist()) == {0, 1, 2}
    assert torch.equal(gpt.generate(prompt, 0), prompt)


def test_sampled_frequencies_follow_the_tempered_softmax() -> None:
    gpt, n, temperature = make_gpt(), 20_000, 1.7
    prompt = make_tokens(batch=1, length=3)
    p = (gpt(prompt)[0, -1] / temperature).softmax(dim=-1)
    generator = torch.Generator().manual_seed(0)
    drawn = gpt.generate(prompt.expand(n, -1), 1, temperature=temperature, generator=generator)[:, -1]
    frequency = torch.bincount(drawn, minlength=VOCAB) / n
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-3).all()
    assert p.max() > 0.1  # not uniform


def test_generation_leaves_mode_and_gradients_alone() -> None:
    gpt = make_gpt().train()
    tokens = gpt.generate(make_tokens(), 2)
    assert gpt.training and not tokens.requires_grad
    assert all(p.grad is None for p in gpt.parameters())


@pytest.mark.parametrize(
    "arguments", [{"temperature": -1.0}, {"top_k": 0}, {"prompt": torch.zeros(1, 0, dtype=torch.long)}]
)
def test_impossible_generation_is_a_user_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="generate"):
        make_gpt().generate(**{"prompt": make_tokens(), "max_new_tokens": 1, **arguments})
