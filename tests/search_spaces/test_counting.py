import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, random_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cost_models.program import build_program
from search_spaces import counting
from search_spaces.config import InvalidConfig, SLMConfig
from search_spaces.counting import count, decode_flops, prefill_flops
from search_spaces.model import SLM
from search_spaces.precision import PRECISIONS, matrix_bytes
from search_spaces.quantisation import quantised_names
from search_spaces.references import reference
from search_spaces.workload import RequestTokens

TINY = SLMConfig(vocab_size=100, d_model=32, num_layers=2, num_heads=4, ffn_dim=64, context=16)


def _flops(run) -> int:
    # Only the plain kernel decomposes into products that the counter knows on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@given(configs())
@settings(max_examples=150, deadline=None)
def test_params_equal_the_model(config):
    model = SLM(config, device="meta")
    assert counting.params(config) == sum(p.numel() for p in model.parameters())


@given(configs())
@settings(max_examples=60, deadline=None)
def test_param_components_equal_the_model_by_part(config):
    model = SLM(config, device="meta")
    found: dict[str, int] = {}
    for name, p in model.named_parameters():
        if "norm" in name:
            part = "norm"
        elif ".shortcuts." in name:
            part = "shortcuts"
        elif name.endswith((".scale", ".shift")):
            part = "activation"
        else:
            part = {"attentions": "attention", "ffns": "ffn", "head": "head", "embed": name.split(".")[1]}[name.split(".")[0]]
        part = "embedding" if part == "tokens" else part
        found[part] = found.get(part, 0) + p.numel()
    assert counting.params_by_component(config) == found


@pytest.mark.parametrize("seed", range(40))
def test_flops_equal_pytorchs_own_count(seed):
    rng = random.Random(seed)
    config = random_config(rng)
    model = SLM(config).eval()
    tokens = rng.randint(1, config.context - 1)
    prompt = torch.randint(config.vocab_size, (1, tokens))
    assert prefill_flops(config, tokens) == _flops(lambda: model.prefill(prompt))
    assert prefill_flops(config, tokens, every_logit=True) == _flops(lambda: model(prompt))
    _, caches = model.prefill(prompt)
    assert decode_flops(config, tokens) == _flops(lambda: model.decode(prompt[:, :1], caches))


def test_flops_by_hand():
    # Two layers of 4 heads of 8: Q, K, V, O are 4 x 32 x 32 elements, the gated FFN 3 x 32 x 64.
    assert counting.decode_flops_by_component(TINY, 10) == {
        "attention_projections": 2 * 2 * 4 * 32 * 32,
        "attention_scores": 2 * 2 * 2 * 10 * 32,
        "ffn": 2 * 2 * 3 * 32 * 64,
        "head": 2 * 32 * 100,
    }
    whole = counting.prefill_flops_by_component(TINY, 8)
    assert whole["attention_scores"] == 2 * 2 * 2 * 8 * 8 * 32
    # Row s of the needed half has s + 1 scores.
    needed = whole | {"attention_scores": 2 * 2 * 2 * sum(range(1, 9)) * 32}
    assert counting.prefill_flops_by_component(TINY, 8, masked=False) == needed
    assert decode_flops(TINY, 0) == decode_flops(TINY, 10) - 2 * 2 * 2 * 10 * 32


@pytest.mark.parametrize("seed", range(25))
def test_cache_bytes_equal_the_rows_a_model_returns(seed):
    config = random_config(random.Random(seed))
    _, caches = SLM(config, device="meta").prefill(torch.zeros(1, 7, dtype=torch.long, device="meta"))
    held = sum(rows.numel() * rows.element_size() for cache in caches for rows in cache)
    assert counting.kv_bytes(config, 7) == 7 * counting.kv_bytes_per_token(config) == held


@pytest.mark.parametrize("seed", range(25))
def test_weight_bytes_equal_the_constants_a_model_holds(seed):
    config = random_config(random.Random(seed))
    model = SLM(config, device="meta")
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert counting.weight_bytes(config) == held


@given(configs(), st.sampled_from(PRECISIONS))
@settings(max_examples=24, deadline=None)
def test_weight_bytes_of_a_precision_are_those_of_the_program_that_is_deployed(config, precision):
    assert counting.weight_bytes(config, precision) == build_program(config, RequestTokens(prompt=3, generated=2), precision).weight_bytes


@given(configs())
@settings(max_examples=40, deadline=None)
def test_only_what_is_quantised_gets_smaller(config):
    model = SLM(config, device="meta")
    quantised = [tuple(model.get_parameter(name).shape) for name in quantised_names(model)]
    for precision in PRECISIONS:
        saved = sum(4 * rows * columns - matrix_bytes(rows, columns, precision) for rows, columns in quantised)
        assert counting.param_bytes(config) - counting.param_bytes(config, precision) == saved
        assert counting.peak_bytes(config) - counting.peak_bytes(config, precision=precision) == saved


def test_latent_cache_is_its_rank_and_rotary_part():
    mla = SLMConfig(vocab_size=100, d_model=64, num_layers=3, attention="mla", num_heads=4, kv_rank=12, rotary_dim=6)
    assert counting.kv_bytes_per_token(mla) == 3 * (12 + 6) * 4


def test_sharing_saves_parameters_but_neither_flops_nor_cache_nor_reads():
    shared, plain = reference("mobilellm-ls-125m"), reference("mobilellm-125m")
    assert counting.params(shared) == counting.params(plain)
    assert counting.kv_bytes_per_token(shared) == 2 * counting.kv_bytes_per_token(plain)
    assert counting.bytes_read_by_component(shared)["ffn"] == 2 * counting.bytes_read_by_component(plain)["ffn"]
    one, two = (counting.decode_flops_by_component(c, 99) for c in (plain, shared))
    assert all(two[part] == 2 * one[part] for part in ("attention_projections", "attention_scores", "ffn"))
    assert two["head"] == one["head"]


def test_bytes_read_by_hand():
    read = counting.bytes_read_by_component(TINY, context=10)
    assert read == {
        "embedding": 4 * 32,
        "positions": 4 * 8,
        "attention": 4 * 2 * 4 * 32 * 32,
        "ffn": 4 * 2 * 3 * 32 * 64,
        "norm": 4 * 5 * 32,
        "head": 4 * 100 * 32,
        "kv_cache": 4 * 2 * 10 * 2 * 32,
    }
    assert counting.bytes_read_by_component(TINY, tokens=6)["embedding"] == 6 * 4 * 32
    # A group of 32 inputs is 16 bytes and a scale of 2; down projections have two groups a row. Norms and cache are floats.
    assert counting.bytes_read_by_component(TINY, context=10, precision="int4") == read | {
        "embedding": 18,
        "attention": 2 * 4 * 32 * 18,
        "ffn": 2 * (2 * 64 * 18 + 32 * 2 * 18),
        "head": 100 * 18,
    }


@given(configs())
@settings(max_examples=60, deadline=None)
def test_reading_misses_no_weight(config):
    """Without sharing and tables, one decode step reads each weight exactly once."""
    if config.sharing != "none":
        return
    counts = count(config, context=0)
    tables = ("embedding", "positions", "head")
    held = {k: 4 * v for k, v in counts.params_by_component.items() if k not in tables}
    assert {k: v for k, v in counts.bytes_read_by_component.items() if k not in tables} == held
    tables_bytes = counting.weight_bytes(config) - sum(held.values())
    for precision in PRECISIONS:
        counts = count(config, context=0, precision=precision)
        read = sum(v for k, v in counts.bytes_read_by_component.items() if k not in tables)
        stored_tables = counts.weight_bytes - read
        matrix = matrix_bytes(config.vocab_size, config.d_model, precision) - 4 * config.vocab_size * config.d_model
        assert stored_tables == tables_bytes + matrix * (1 if config.tie_embeddings else 2)


def test_counts_put_it_together():
    counts = count(TINY, context=10)
    assert counts.params == counting.params(TINY)
    assert counts.flops_per_token == decode_flops(TINY, 10)
    assert counts.bytes_read_per_token == sum(counting.bytes_read_by_component(TINY, context=10).values())
    # Decoding at C = 15: 2 D and the larger of attention (2 x 8 x 8 and 4 x 16 scores), FFN (2 x 64) and 100 logits.
    assert counts.workspace_bytes == 4 * (2 * 32 + 2 * 8 * 8 + 4 * 16)
    assert counts.peak_bytes == counts.weight_bytes + counts.kv_bytes + counts.workspace_bytes
    assert counts.kv_bytes == 16 * counts.kv_bytes_per_token
    assert count(TINY).context == 15


def test_peak_grows_with_the_prompt_and_the_context():
    small, large = counting.peak_bytes(TINY, prompt_tokens=1), counting.peak_bytes(TINY, prompt_tokens=16)
    # 16 tokens at once: 2 S D, queries, keys, values, output, which the gated FFN's 2 x 64 equal, and a row of scores a head.
    assert large - counting.weight_bytes(TINY) - counting.kv_bytes(TINY, 16) == 4 * (2 * 16 * 32 + 16 * 4 * 32 + 4 * 16)
    assert counting.peak_bytes(TINY, context=8) < small < large


def test_the_workspace_grows_with_the_prompt_and_not_with_its_square():
    long = SLMConfig.from_dict({**TINY.to_dict(), "context": 40_000})
    once, twice = (counting.workspace_bytes(long, tokens=n) for n in (10_000, 20_000))
    assert twice == 2 * once


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decode_flops(TINY, 16), "context=16 is not within 0 and 15"),
        (lambda: decode_flops(TINY, -1), "context=-1 is not within 0 and 15"),
        (lambda: prefill_flops(TINY, 17), "tokens=17 is not within 1 and 16"),
        (lambda: counting.kv_bytes(TINY, 17), "context=17 is not within 0 and 16"),
        (lambda: counting.bytes_read_by_component(TINY, tokens=9, context=8), "context=8 is not within 0 and 7"),
        (lambda: counting.peak_bytes(TINY, prompt_tokens=9, context=8), "prompt_tokens=9 is not within 1 and 8"),
    ],
)
def test_lengths_a_model_cannot_have_are_refused(call, message):
    with pytest.raises(InvalidConfig, match=message):
        call()


def test_counting_needs_no_torch():
    code = (
        "import sys; from search_spaces import counting, references; "
        "counting.count(references.reference('gpt2-124m')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
