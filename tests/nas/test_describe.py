import contextlib
import dataclasses
import random

import pytest
from strategies import random_config

from nas.describe import (
    attention_words,
    best_words,
    describe_config,
    describe_trial,
    design_facts,
    format_bpb,
    format_bytes,
    format_count,
    format_loss,
    format_ms,
    format_rate,
    format_s,
    objective_words,
    significant,
    stopped_words,
    trial_facts,
    twin_words,
)
from nas.evaluation import Evaluation
from search_spaces.config import InvalidConfig, SLMConfig
from search_spaces.counting import params


def config(**changes: object) -> SLMConfig:
    values: dict[str, object] = {"vocab_size": 2048, "d_model": 128, "num_layers": 6, "num_heads": 4, "head_dim": 32}
    return SLMConfig.from_dict({**values, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": "gqa", "num_kv_heads": 2}, "6 layers × 128, GQA 4/2 heads × 32, gated SiLU ×2.7, RMSNorm, vocab 2048, tied"),
        ({"num_layers": 1, "num_heads": 1}, "1 layer × 128, MHA 1 head × 32, gated SiLU ×2.7, RMSNorm, vocab 2048, tied"),
        (
            {"attention": "mqa", "ffn": "standard", "activation": "gelu_tanh", "norm": "layernorm", "tie_embeddings": False},
            "6 layers × 128, MQA 4/1 heads × 32, standard GELU-tanh ×4.0, LayerNorm, vocab 2048, untied",
        ),
        (
            {"attention": "mla", "kv_rank": 48, "q_rank": 64, "rotary_dim": 16},
            "6 layers × 128, MLA 4 heads × 32 on latent 48+16, queries 64, gated SiLU ×2.7, RMSNorm, vocab 2048, tied",
        ),
        (
            {"num_layers": 2, "attention": "gqa", "num_heads": [4, 8], "num_kv_heads": [2, 4], "ffn_dim": [64, 512], "qk_norm": True},
            "2 layers × 128, GQA 4–8/2–4 heads × 32, gated SiLU ×0.5–4.0, RMSNorm, QK-norm, vocab 2048, tied",
        ),
        (
            {"rotary_dim": 8, "block": "parallel", "sharing": "cycle", "num_unique_layers": 3, "shared_parts": "ffn"},
            "6 layers × 128, 3 unique ffn cycled, MHA 4 heads × 32, rotary 25 %, gated SiLU ×2.7, RMSNorm, parallel blocks, "
            "vocab 2048, tied",
        ),
        (
            {"positions": "learned", "series_activation": 2, "augmented_shortcuts": 1},
            "6 layers × 128, MHA 4 heads × 32, learned positions, gated SiLU ×2.7, RMSNorm, 2-term scalar series, 1 augmented shortcut, "
            "vocab 2048, tied",
        ),
    ],
)
def test_architectures_in_words(changes: dict[str, object], words: str) -> None:
    assert describe_config(config(**changes)) == words


def test_attention_in_words() -> None:
    assert attention_words(config(attention="gqa", num_kv_heads=2)) == "GQA with 2 key/value heads"
    assert attention_words(config()) == "MHA with 4 heads"
    assert attention_words(config(attention="mqa")) == "MQA"
    assert attention_words(config(attention="mla", kv_rank=16)) == "MLA with a latent of 16"


def test_facts_tell_designs_apart() -> None:
    facts = design_facts(config(attention="mqa", num_layers=2, ffn_dim=[64, 192]))
    assert (facts["attention"], facts["kv heads"], facts["FFN ratio"], facts["sharing"]) == ("MQA", 1, 1.0, "none")
    assert facts.keys() == design_facts(config(attention="mla", kv_rank=8, sharing="sequence", num_unique_layers=3)).keys()


@pytest.mark.parametrize("seed", range(60))
def test_no_two_models_have_the_same_facts(seed: int) -> None:
    """Nor do two that differ in a single field."""
    one, other = random_config(random.Random(seed)), random_config(random.Random(seed + 1000))
    changed = [other]
    for field in dataclasses.fields(SLMConfig):
        with contextlib.suppress(InvalidConfig):
            changed.append(dataclasses.replace(one, **{field.name: getattr(other, field.name)}))
    for config in changed:
        assert config == one or design_facts(config) != design_facts(one)


def test_what_is_not_as_usual_is_said() -> None:
    words = describe_config(
        config(qkv_bias=True, ffn_bias=True, norm="layernorm", norm_bias=False, embedding_scale=128**0.5, context=512, rope_theta=5e5)
    )
    assert words.endswith("tied, bias on QKV and FFN, norms without bias, embeddings × √width, context 512, rotary base 500000")
    mla = describe_config(config(attention="mla", kv_rank=48, v_head_dim=16, norm_eps=1e-6, head_bias=True))
    assert mla.endswith("tied, bias on head, epsilon 1e-06, values of 16")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (4.5, "4.50"), (0.9996, "1.00"), (99.96, "100"), (812.4, "812"), (1234.5, "1230"), (-3.14159, "-3.14")],
)
def test_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_quantities() -> None:
    assert [format_s(s) for s in (None, 0, 1.23e-5, 0.00456, 0.99996, 1.2, 204, 7300)] == [
        *("–", "0 s", "12.3 µs", "4.56 ms", "1.00 s", "1.20 s", "3.4 min", "2.0 h"),
    ]
    assert [format_count(n) for n in (None, 7, 812, 999.6, 812_345, 1_260_000, 2_800_000_000)] == [
        *("–", "7", "812", "1.00 k", "812 k", "1.26 M", "2.80 G"),
    ]
    assert [format_bytes(n) for n in (None, 512, 5_040_000)] == ["–", "512 B", "5.04 MB"]
    assert [format_rate(n) for n in (None, 4.56, 17_234)] == ["–", "4.56", "17,200"]
    assert [format_ms(s) for s in (None, 0.000288)] == ["–", "0.288"]
    assert [format_bpb(None), format_bpb(2.4126), format_bpb(2.4126, 0.0123)] == ["–", "2.413", "2.413 ± 0.012"]


def test_a_trial_is_its_config_and_the_precision_where_it_is_told() -> None:
    trial = Evaluation(trial=0, config=config())
    assert describe_trial(trial) == describe_config(config())
    assert describe_trial(trial.evolve(weights="int4")) == f"{describe_config(config())}, int4 weights"
    assert describe_trial(Evaluation(trial=0, weights="int4")) == "–"
    assert trial_facts(trial.evolve(weights="int4")) == design_facts(config()) | {"weights": "int4"}


def test_what_a_trial_was_scored_on_in_words() -> None:
    plain = Evaluation(trial=0, state="complete", val_bpb=2.4126, val_bpb_stderr=0.0123)
    task = {"name": "pairs.jsonl", "kind": "pairs", "loss": 0.612, "loss_stderr": 0.02, "accuracy": 0.714}
    pairs = plain.evolve(score={"task": task})
    notes = plain.evolve(score={"task": {**task, "name": "notes.txt", "kind": "text", "accuracy": None}})
    assert [objective_words(es) for es in ([], [plain], [pairs], [plain, notes])] == [
        *("bits per byte", "bits per byte", "loss on pairs.jsonl", "bits per byte of notes.txt"),
    ]
    assert [format_loss(e) for e in (plain, pairs, notes)] == ["2.413 ± 0.012", "0.612 ± 0.020 (71 %)", "0.612 ± 0.020"]
    assert [best_words([e]) for e in (plain, pairs)] == ["best bits per byte", "smallest loss on pairs.jsonl"]


def test_a_twin_and_a_stopped_trial_in_words() -> None:
    plain = Evaluation(trial=0, state="complete", val_bpb=2.4)
    assert (twin_words(plain), stopped_words(plain)) == ("", "")
    size = params(config())
    assert twin_words(plain.evolve(score={"twin": config().to_dict()})) == f"twin of {format_count(size)}"
    assert stopped_words(plain.evolve(state="stopped", score={"rungs": [{"train_bytes": 64_000}]})) == "stopped at 64.0 kB"
