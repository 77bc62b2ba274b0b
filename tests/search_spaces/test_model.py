import math
import random

import pytest
import torch
from hypothesis import given, settings
from strategies import configs, random_config
from torch import Tensor, nn

from search_spaces.config import SLMConfig
from search_spaces.model import SLM, rope_table, rotate

MLA = {"attention": "mla", "kv_rank": 8, "v_head_dim": 5, "rotary_dim": 4}


def make(**changes) -> SLMConfig:
    return SLMConfig(**{"vocab_size": 60, "d_model": 32, "num_layers": 4, "num_heads": 4, "context": 24} | changes)


def lively(config: SLMConfig, seed: int = 0) -> SLM:
    """A float64 model whose every parameter is random and matters."""
    model = SLM(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            # Matrices keep activations of order one; norms, biases and series vary around where they start.
            p.copy_(noise / math.sqrt(p.shape[-1]) if p.ndim > 1 else p + 0.3 * noise)
    return model.eval()


def some_tokens(config: SLMConfig, length: int, seed: int = 0, batch: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def grown(caches, rows):
    return [tuple(torch.cat((c, r), dim=1) for c, r in zip(cache, row, strict=True)) for cache, row in zip(caches, rows, strict=True)]


def worst_difference(model: SLM, tokens: Tensor, prompt: int) -> float:
    """Largest difference of prefill-then-decode logits from those of one full pass."""
    full = model(tokens)
    logits, caches = model.prefill(tokens[:, :prompt])
    worst = (logits[:, 0] - full[:, prompt - 1]).abs().max().item()
    for i in range(prompt, tokens.shape[1]):
        logits, rows = model.decode(tokens[:, i : i + 1], caches)
        caches = grown(caches, rows)
        worst = max(worst, (logits[:, 0] - full[:, i]).abs().max().item())
    return worst


# --- decode and prefill -----------------------------------------------------------------------------


@torch.no_grad()
def test_decode_agrees_with_one_full_pass_for_random_configs():
    for seed in range(120):
        rng = random.Random(seed)
        config = random_config(rng)
        model = lively(config, seed)
        prompt = rng.randint(1, 8)
        worst = worst_difference(model, some_tokens(config, prompt + 8, seed, batch=rng.randint(1, 2)), prompt)
        assert worst < 1e-9, (seed, worst, config)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"attention": "gqa", "num_kv_heads": 2}, MLA], ids=["mha", "gqa", "mla"])
def test_decode_starts_from_an_empty_cache(changes):
    config = make(**changes)
    model, tokens = lively(config), some_tokens(config, 5)
    full = model(tokens)
    caches = [tuple(rows[:, :0] for rows in cache) for cache in model.prefill(tokens[:, :1])[1]]
    for i in range(5):
        logits, rows = model.decode(tokens[:, i : i + 1], caches)
        caches = grown(caches, rows)
        assert torch.allclose(logits[:, 0], full[:, i], atol=1e-9, rtol=0)


@torch.no_grad()
def test_decode_reaches_the_last_position_of_the_context():
    config = make()
    assert worst_difference(lively(config), some_tokens(config, config.context), 20) < 1e-9


@torch.no_grad()
@given(configs())
@settings(max_examples=40, deadline=None)
def test_later_tokens_do_not_change_earlier_logits(config):
    model, tokens = lively(config), some_tokens(config, 10)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % config.vocab_size
    one, other = model(tokens), model(changed)
    assert torch.allclose(one[:, :6], other[:, :6], atol=1e-12, rtol=0)
    assert (one[:, 6:] - other[:, 6:]).abs().amax(dim=(0, 2)).min() > 0


@torch.no_grad()
def test_a_batch_is_its_rows():
    config = make(**MLA)
    model, tokens = lively(config), some_tokens(config, 7, batch=3)
    assert torch.allclose(model(tokens), torch.cat([model(row[None]) for row in tokens]), atol=1e-12, rtol=0)


@torch.no_grad()
def test_rows_of_the_cache_have_the_stated_shapes():
    config = make(attention="gqa", head_dim=7, rotary_dim=6, num_heads=[4, 4, 6, 6], num_kv_heads=[2, 4, 2, 3])
    _, caches = lively(config).prefill(some_tokens(config, 5))
    assert [tuple(k.shape) for k, _ in caches] == [tuple(v.shape) for _, v in caches] == [(1, 5, k, 7) for k in (2, 4, 2, 3)]
    _, caches = lively(make(**MLA)).prefill(some_tokens(config, 5))
    assert [(tuple(c.shape), tuple(r.shape)) for c, r in caches] == [((1, 5, 8), (1, 5, 4))] * 4


# --- attention --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("q_rank", [0, 6])
def test_absorbed_latent_attention_equals_the_expanded_form(q_rank):
    """One layer by the published formulas, keys and values expanded, against the absorbed decode step."""
    config = make(**MLA, q_rank=q_rank)
    attention = lively(config).attentions[0]
    H, d, v, R, L = 4, 8, 5, 4, 8
    x = torch.randn(1, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    table = rope_table(config)[:9].double()
    rope = table.chunk(2, dim=1)
    _, cache = attention.prefill(x[:, :8], (rope[0][:8], rope[1][:8]))
    decoded, _ = attention.decode(x[:, 8:], (rope[0][8:], rope[1][8:]), cache)

    def rms(y, norm):
        return y / (y.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * norm.weight

    h = rms(x @ attention.q_down.weight.T, attention.q_norm) if q_rank else x
    q = (h @ attention.q.weight.T).view(9, H, d + R)
    latent = x @ attention.kv_down.weight.T
    c, k_rope = rms(latent[0, :, :L], attention.kv_norm), rotate(latent[..., None, L:], rope)[0, :, 0]
    k = torch.einsum("hdl,sl->shd", attention.k_up, c)
    values = torch.einsum("hvl,sl->shv", attention.v_up, c)
    q_rope = rotate(q[None, ..., d:], rope)[0]
    scores = torch.einsum("hd,shd->hs", q[8, :, :d], k) + torch.einsum("hr,sr->hs", q_rope[8], k_rope)
    p = torch.softmax(scores / math.sqrt(d + R), dim=-1)
    expanded = torch.einsum("hs,shv->hv", p, values).reshape(1, 1, H * v) @ attention.out.weight.T
    assert torch.allclose(decoded, expanded, atol=1e-12, rtol=0)


@torch.no_grad()
def test_grouped_heads_are_multi_head_with_repeated_keys_and_values():
    grouped = lively(make(attention="gqa", num_kv_heads=2))
    plain = SLM(make()).double().eval()
    state = grouped.state_dict()
    for name in state:
        if name.endswith((".k.weight", ".v.weight")):
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    plain.load_state_dict(state)
    tokens = some_tokens(grouped.config, 9)
    assert torch.allclose(grouped(tokens), plain(tokens), atol=1e-10, rtol=0)


def test_rotary_turns_pairs_by_position_and_leaves_the_rest():
    config = make(head_dim=8, rotary_dim=4, rope_theta=100.0)
    table = rope_table(config)
    assert table.shape == (24, 4)
    assert torch.allclose(table[7, [1, 3]], torch.tensor([math.cos(0.7), math.sin(0.7)]))  # 7 * 100^(-2/4)
    x = torch.arange(1.0, 9.0).view(1, 1, 1, 8).expand(1, 24, 1, 8)
    turned = rotate(x, table.chunk(2, dim=1))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[:, 0], x[:, 0])
    a, b = 1 * math.cos(7) - 3 * math.sin(7), 3 * math.cos(7) + 1 * math.sin(7)
    assert turned[0, 7, 0, [0, 2]].tolist() == pytest.approx([a, b], abs=1e-5)


@torch.no_grad()
def test_scores_depend_on_relative_position_only():
    config = make(num_layers=1)
    attention = lively(config).attentions[0]
    table = rope_table(config).double()
    x = torch.randn(1, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    at = [attention.prefill(x, table[i : i + 4].chunk(2, dim=1))[0] for i in (0, 11)]
    assert torch.allclose(at[0], at[1], atol=1e-6, rtol=0)  # the table is rounded to float32


# --- structure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", ["both", "attention", "ffn"])
def test_shared_layers_are_the_same_modules(parts):
    model = SLM(make(num_layers=6, sharing="cycle_rev", num_unique_layers=2, shared_parts=parts), device="meta")
    blocks = list(model.blocks())
    pattern = [0, 1, 0, 1, 1, 0]
    for part in ("attention", "ffn"):
        expected = pattern if parts in ("both", part) else list(range(6))
        modules = [getattr(b, part) for b in blocks]
        assert all((modules[i] is modules[j]) == (expected[i] == expected[j]) for i in range(6) for j in range(6))
    assert len(model.attentions) == (2 if parts != "ffn" else 6)
    assert len(model.ffns) == (2 if parts != "attention" else 6)


def test_training_a_shared_layer_moves_it_everywhere():
    model = lively(make(sharing="sequence", num_unique_layers=2))
    model(some_tokens(model.config, 6)).logsumexp(-1).sum().backward()
    assert model.block(0).attention.q.weight.grad is model.block(1).attention.q.weight.grad
    assert model.block(0).attention.q.weight.grad.abs().sum() > 0


def test_a_tied_head_is_the_embedding():
    tied, untied = SLM(make()), SLM(make(tie_embeddings=False))
    assert tied.head.weight is tied.embed.tokens.weight
    assert untied.head.weight is not untied.embed.tokens.weight
    before = sum(p.numel() for p in tied.parameters())
    assert sum(p.numel() for p in untied.parameters()) == before + 60 * 32


@torch.no_grad()
@pytest.mark.parametrize("seed", range(12))
def test_every_parameter_matters(seed):
    """No weight is stored that the logits do not depend on."""
    config = random_config(random.Random(seed))
    model, tokens = lively(config), some_tokens(config, 12)
    before = model(tokens)
    for name, p in model.named_parameters():
        # A key's bias adds the same to every score of a query, which softmax removes, unless a norm or rotary follows.
        if name.endswith("k.bias") and not config.qk_norm and config.positions == "learned":
            continue
        kept = p.clone()
        rows = (
            slice(None)
            if "embed" not in name
            else [*tokens[0].unique().tolist()]
            if "tokens" in name
            else slice(0, 12 + config.position_offset)
        )
        p[rows] += 0.1 * torch.randn(p[rows].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        changed = model(tokens)
        p.copy_(kept)
        assert (changed - before).abs().max() > 1e-9, name


def _without(model: SLM, kind: str) -> SLM:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if kind in name:
                p.zero_()
    return model


@torch.no_grad()
def test_augmented_shortcuts_add_their_bottlenecks():
    config = make(augmented_shortcuts=2, shortcut_reduction=8)
    tokens = some_tokens(config, 6)
    plain = SLM(make()).double().eval()
    full = lively(config)
    plain.load_state_dict({k: v for k, v in full.state_dict().items() if "shortcuts" not in k})
    assert (full(tokens) - plain(tokens)).abs().max() > 1e-3
    attention = full.attentions[0]
    x = torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    down, up = attention.shortcuts.down.weight.chunk(2, dim=0), attention.shortcuts.up.weight.chunk(2, dim=1)
    expected = sum(nn.functional.gelu(x @ a.T) @ b.T for a, b in zip(down, up, strict=True))
    assert torch.allclose(attention.shortcuts(x), expected, atol=1e-12, rtol=0)
    assert torch.allclose(_without(full, "shortcuts.up")(tokens), plain(tokens), atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["scalar", "channel"])
@pytest.mark.parametrize("ffn", ["gated", "standard"])
def test_series_activation_sums_its_terms(mode, ffn):
    config = make(series_activation=3, series_mode=mode, ffn=ffn, activation="silu")
    part = lively(config).ffns[0]
    scale, shift = part.activation.scale, part.activation.shift
    assert scale.shape == shift.shape == (3, part.up.out_features if mode == "channel" else 1)
    x = torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    into = x @ (part.gate if part.gate is not None else part.up).weight.T
    act = sum(nn.functional.silu(scale[i] * into + shift[i]) for i in range(3))
    expected = (act if part.gate is None else act * (x @ part.up.weight.T)) @ part.down.weight.T
    assert torch.allclose(part(x), expected, atol=1e-12, rtol=0)
    assert (part(x) - nn.functional.linear(nn.functional.silu(into), part.down.weight)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("form", ["sequential", "parallel", "parallel_shared_norm"])
def test_block_forms(form):
    model = lively(make(block=form, norm="layernorm"))
    block = model.block(0)
    table = model.embed.rope[:5]
    rope = table.chunk(2, dim=1)
    x = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a = block.attention.prefill(block.attention.norm(x), rope)[0]
    if form == "sequential":
        expected = x + a + block.ffn(block.ffn.norm(x + a))
    elif form == "parallel":
        expected = x + a + block.ffn(block.ffn.norm(x))
    else:
        expected = x + a + block.ffn(block.attention.norm(x))
    assert torch.allclose(block.prefill(x, rope)[0], expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_embeddings_are_scaled_and_positions_offset():
    plain, scaled = lively(make()), lively(make(embedding_scale=3.0))
    tokens, positions = some_tokens(plain.config, 4), torch.arange(4)
    assert torch.allclose(scaled.embed(tokens, positions)[0], 3 * plain.embed(tokens, positions)[0])
    learned = lively(make(positions="learned", position_offset=2)).embed
    expected = learned.tokens.weight[tokens[0]] + learned.positions.weight[2:6]
    assert torch.equal(learned(tokens, positions)[0][0], expected)


# --- initialisation ---------------------------------------------------------------------------------


@given(configs())
@settings(max_examples=25, deadline=None)
def test_initialise_is_deterministic(config):
    one = SLM(config).initialise(7).state_dict()
    other = SLM(config).initialise(7).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    different = SLM(config).initialise(8).state_dict()
    assert not torch.equal(one["embed.tokens.weight"], different["embed.tokens.weight"])


def test_initialise_starts_norms_at_one_and_biases_at_zero():
    biased = {"qkv_bias": True, "attention_bias": True, "ffn_bias": True, "head_bias": True, "norm": "layernorm"}
    model = SLM(make(**biased)).initialise(0)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(p, torch.zeros_like(p)), name
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p)), name


def test_initial_predictions_are_close_to_uniform():
    config = make(vocab_size=256)
    tokens = some_tokens(config, 24, batch=4)
    logits = SLM(config).initialise(0)(tokens)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(256), rel=0.05)
