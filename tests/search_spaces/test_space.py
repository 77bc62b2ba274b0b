"""Search spaces: what loads, what is refused, and that whatever is drawn can be built."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from optuna.samplers import RandomSampler, TPESampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FixedTrial

from search_spaces.config import SLMConfig, shared_index
from search_spaces.counting import count
from search_spaces.parameters import BY_NAME, PARAMETERS, InvalidSpace, Parameter
from search_spaces.space import REPAIRS, Space, describe, load_space, space_names

NEEDED: dict[str, Any] = {"vocab_size": [512, 1024], "d_model": {"low": 32, "high": 64, "step": 16}, "num_layers": 4, "head_dim": 16}
FIXED: dict[str, Any] = {"vocab_size": 512, "d_model": 128, "num_layers": 6, "head_dim": 16}
optuna.logging.set_verbosity(optuna.logging.WARNING)


def space_of(base: dict[str, Any] = NEEDED, **more: Any) -> Space:
    return Space.from_dict({"name": "mine", "parameters": {**base, **more}})


def built(**more: Any) -> SLMConfig:
    """The architecture of a space in which nothing is left to ask."""
    space = space_of(FIXED, **more)
    assert space.asked == ()
    return space.config({})


# --- shipped spaces -----------------------------------------------------------------------


@pytest.mark.parametrize("name", space_names())
def test_shipped_space_draws_mostly_within_its_stated_parameters(name: str) -> None:
    space, rng = load_space(name), random.Random(7)
    assert space.name == name
    assert space.about
    assert space.params_range is not None
    least, most = space.params_range
    sizes = [count(space.config(space.draw(rng))).params for _ in range(200)]
    inside = sum(least <= n <= most for n in sizes) / len(sizes)
    assert inside >= 0.8
    # Not a narrow band inside the range either: the middle half spans more than a factor of two.
    quarter = sorted(sizes)
    assert quarter[150] > 1.8 * quarter[50]


def test_shipped_names_are_the_files_in_the_folder() -> None:
    folder = Path(__file__).parents[2] / "search_spaces" / "spaces"
    assert sorted(space_names()) == sorted(p.stem for p in folder.glob("*.toml"))


def test_tiny_reaches_every_kind_of_choice() -> None:
    space, rng = load_space("tiny"), random.Random(1)
    configs = [space.config(space.draw(rng)) for _ in range(1500)]
    for field, values in {
        "attention": {"mha", "gqa", "mqa", "mla"},
        "positions": {"rotary", "learned"},
        "ffn": {"gated", "standard"},
        "activation": {"relu", "gelu", "gelu_tanh", "silu"},
        "norm": {"layernorm", "rmsnorm"},
        "block": {"sequential", "parallel", "parallel_shared_norm"},
        "sharing": {"none", "sequence", "cycle", "cycle_rev"},
        "shared_parts": {"both", "attention", "ffn"},
        "series_mode": {"scalar", "channel"},
        "qk_norm": {True, False},
        "tie_embeddings": {True, False},
        "augmented_shortcuts": {0, 1},
    }.items():
        counts = Counter(getattr(c, field) for c in configs)
        assert set(counts) == values
        assert min(counts.values()) > 60, (field, counts)
    assert any(isinstance(c.num_heads, tuple) for c in configs)
    assert any(isinstance(c.ffn_dim, tuple) for c in configs)
    assert any(c.q_rank for c in configs)
    assert all(c.num_kv_heads == c.num_heads for c in configs if c.attention == "mla")


def test_drawn_architectures_are_models_with_the_counted_parameters() -> None:
    from search_spaces.model import SLM

    space, rng = load_space("tiny"), random.Random(3)
    for _ in range(25):
        config = space.config(space.draw(rng))
        model = SLM(config)  # on the CPU: these are small, and a first model on "meta" costs torch a second
        assert sum(p.numel() for p in model.parameters()) == count(config).params


# --- never an invalid config --------------------------------------------------------------


def _any_value(rng: random.Random, p: Parameter) -> Any:
    """A legal value of a parameter, the extremes often."""
    if p.kind == "bool":
        return rng.random() < 0.5
    if p.kind == "word":
        return rng.choice(p.words)
    if p.kind == "span":
        return rng.choice(["none", f"{rng.choice([0.01, rng.uniform(0.1, 4)])}..{rng.choice([0.01, 64.0, rng.uniform(0.1, 4)])}"])
    most = {"num_layers": 16, "d_model": 700, "vocab_size": 70000}.get(p.name, p.most)
    if p.kind == "int":
        return rng.choice([int(p.least), int(most), rng.randint(int(p.least), min(int(most), int(p.least) + 20))])
    return rng.choice([p.least, most, rng.uniform(p.least, min(most, 2.0)), 1.0 if most >= 1 else most])


def test_no_assignment_makes_an_invalid_config() -> None:
    rng = random.Random(11)
    for _ in range(300):
        # Every combination of kinds is open in each space, so that none is refused; the numbers go to their extremes.
        table: dict[str, Any] = {p.name: sorted({_any_value(rng, p), _any_value(rng, p)}) for p in PARAMETERS}
        table |= {p.name: list(p.words) for p in PARAMETERS if p.kind == "word"}
        table |= {
            "series_activation": [1, 2, 3],
            "augmented_shortcuts": [0, 2],
            "num_layers": sorted({1, 2, _any_value(rng, BY_NAME["num_layers"])}),
        }
        table["unique_fraction"] = sorted({rng.uniform(0.01, 1.0), 0.5, 1.0})
        space = Space.from_dict({"parameters": table})
        for _ in range(5):
            params = space.draw(rng)
            config = space.config(params)
            assert (config.num_layers, config.d_model) == (params["num_layers"], space._value(space.axes[1], params))


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """A [parameters] table of lists, ranges, single values and gaps that may or may not load."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    table: dict[str, Any] = {"attention": ["mla", rng.choice(["mha", "gqa", "mqa"])]}
    for p in PARAMETERS[::-1]:
        form = rng.choice(["one", "list", "range", "out"])
        if p.name in table or (form == "out" and p.default is not None):
            continue
        values = sorted({_any_value(rng, p) for _ in range(3)}, key=str)
        never_matters = p.needs is not None and isinstance(table.get(p.needs[0]), str)
        if form == "range" and p.kind in ("int", "float") and p.name != "vocab_size" and not never_matters:
            table[p.name] = {"low": min(values), "high": max(values)}
        else:
            table[p.name] = values if form == "list" and not never_matters else values[0]
    return table


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], derandomize=True)
@given(table=tables(), seed=st.integers(0, 1000))
def test_any_space_that_loads_survives_drawing_and_files(table: dict[str, Any], seed: int) -> None:
    try:
        space = Space.from_dict({"name": "any", "about": 'a "text"', "parameters": table})
    except InvalidSpace:
        reject()
    assert Space.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    rng = random.Random(seed)
    for _ in range(4):
        params = space.draw(rng)
        assert space.config(params) == space.suggest(FixedTrial(params))
        assert space.requested_vocab(params) in space.vocab_choices


# --- Optuna sees a static space -----------------------------------------------------------


@pytest.mark.parametrize("name", space_names())
def test_every_trial_is_asked_the_same(name: str) -> None:
    space, study = load_space(name), optuna.create_study(sampler=RandomSampler(seed=5))
    first: list[tuple[str, Any]] = []
    for _ in range(60):
        trial = study.ask()
        config = space.suggest(trial)
        assert config == space.config(trial.params)
        first = first or list(trial.distributions.items())
        assert list(trial.distributions.items()) == first
        study.tell(trial, 0.0)
    assert [n for n, _ in first] == [axis.name for axis in space.asked]
    assert IntersectionSearchSpace().calculate(study) == dict(first)


def test_parameters_are_asked_in_one_order_however_the_file_orders_them() -> None:
    table = {**NEEDED, "qk_norm": [True, False], "ffn_ratio": {"low": 1.0, "high": 2.0}}
    backwards = dict(reversed(table.items()))
    one, other = (Space.from_dict({"parameters": t}) for t in (table, backwards))
    assert one == other
    assert [a.name for a in one.asked] == ["vocab_size", "d_model", "qk_norm", "ffn_ratio"]


def test_a_sampler_that_learns_works_on_it() -> None:
    space = space_of(
        attention=["mha", "mla"], mla_kv_ratio={"low": 0.1, "high": 1.0, "log": True}, ffn_ratio={"low": 1.0, "high": 4.0, "step": 0.5}
    )
    study = optuna.create_study(sampler=TPESampler(seed=0, n_startup_trials=10))
    for _ in range(40):
        trial = study.ask()
        study.tell(trial, count(space.suggest(trial)).params)
    late = [t.value for t in study.trials[20:] if t.value is not None]
    early = [t.value for t in study.trials[:10] if t.value is not None]
    assert sum(late) / len(late) < sum(early) / len(early)


def test_fixed_parameters_are_never_asked_and_ranges_keep_step_and_log() -> None:
    space = space_of(num_layers={"low": 3, "high": 3}, qk_norm=[True], unique_fraction=0.5, context={"low": 64, "high": 4096, "log": True})
    trial = optuna.create_study(sampler=RandomSampler(seed=0)).ask()
    config = space.suggest(trial)
    assert set(trial.params) == {"vocab_size", "d_model", "context"}
    assert trial.distributions["d_model"] == optuna.distributions.IntDistribution(32, 64, step=16)
    assert trial.distributions["context"] == optuna.distributions.IntDistribution(64, 4096, log=True)
    assert (config.num_layers, config.qk_norm) == (3, True)


# --- repairs, each as REPAIRS states it ---------------------------------------------------


def test_heads_follow_the_attention_width() -> None:
    assert built(attention_width=0.75).num_heads == 6
    assert built(attention_width=0.01).num_heads == 1
    assert built(attention_width=1.5).num_heads == 12


@pytest.mark.parametrize(
    ("d_model", "asked", "kind", "heads", "kv_heads"),
    [
        (128, 4, "gqa", 8, 2),
        (128, 3, "gqa", 8, 4),
        (96, 4, "gqa", 6, 2),
        (80, 2, "gqa", 6, 3),
        (128, 100, "gqa", 8, 2),
        (32, 2, "mha", 2, 2),
    ],
)
def test_gqa_groups_become_a_divisor_below_the_heads(d_model: int, asked: int, kind: str, heads: int, kv_heads: int) -> None:
    config = built(d_model=d_model, attention="gqa", kv_group=asked)
    assert (config.attention, config.num_heads, config.num_kv_heads) == (kind, heads, kv_heads)


def test_mqa_has_one_kv_head_also_when_heads_differ() -> None:
    config = built(attention="mqa", layerwise_alpha="0.5..1.0")
    assert (config.attention, config.num_kv_heads) == ("mqa", 1)
    assert config.num_heads == (4, 5, 6, 6, 7, 8)


def test_mla_is_rotary_without_qk_norm_and_has_its_ranks() -> None:
    space = space_of(
        FIXED, attention=["mha", "mla"], positions="learned", qk_norm=True, mla_kv_ratio=0.4, mla_q_ratio=0.5, mla_value_ratio=0.5
    )
    mla, mha = (space.config({"attention": kind}) for kind in ("mla", "mha"))
    assert (mla.positions, mla.qk_norm, mla.num_kv_heads, mla.rotary_dim) == ("rotary", False, mla.num_heads, 8)
    assert (mla.kv_rank, mla.q_rank, mla.v_head_dim) == (48, 64, 8)
    assert (mha.positions, mha.qk_norm, mha.kv_rank, mha.q_rank, mha.rotary_dim) == ("learned", True, 0, 0, 0)


@pytest.mark.parametrize(
    ("fraction", "head_dim", "dims"), [(1.0, 16, 16), (0.25, 16, 4), (0.01, 16, 2), (1.0, 7, 6), (0.5, 6, 4), (1.0, 2, 2)]
)
def test_rotary_dims_are_even_and_fit(fraction: float, head_dim: int, dims: int) -> None:
    assert built(rotary_fraction=fraction, head_dim=head_dim).rotary_dim == dims


@pytest.mark.parametrize(
    ("pattern", "layers", "fraction", "unique"),
    [
        ("cycle", 6, 0.5, 3),
        ("cycle", 6, 0.01, 1),
        ("cycle", 6, 0.99, None),
        ("cycle_rev", 6, 0.9, 3),
        ("cycle_rev", 5, 0.9, 2),
        ("sequence", 6, 0.67, 3),
        ("sequence", 5, 0.8, 3),
        ("sequence", 6, 0.5, 3),
    ],
)
def test_sharing_uses_every_unique_layer_or_is_none(pattern: str, layers: int, fraction: float, unique: int | None) -> None:
    config = built(num_layers=layers, sharing=pattern, unique_fraction=fraction)
    assert config.num_unique_layers == unique
    # With one unique layer every pattern is the same model, which SLMConfig calls a sequence.
    assert config.sharing == {None: "none", 1: "sequence"}.get(unique, pattern)
    assert {s.attention_index for s in config.layers()} == set(range(unique or layers))


def test_one_layer_of_several_depths_shares_nothing() -> None:
    space = space_of(FIXED, num_layers=[1, 2], sharing="cycle_rev", unique_fraction=0.5)
    assert space.config({"num_layers": 1}).sharing == "none"
    assert space.config({"num_layers": 2}).num_unique_layers == 1


@pytest.mark.parametrize("part", ["both", "attention", "ffn"])
def test_shared_layers_have_equal_sizes_and_the_others_scale_over_all(part: str) -> None:
    config = built(sharing="cycle", shared_parts=part, unique_fraction=0.5, layerwise_alpha="0.5..1.0", layerwise_beta="0.5..1.5")
    over_three, over_six = (4, 6, 8) * 2, (4, 5, 6, 6, 7, 8)
    assert config.num_heads == (over_six if part == "ffn" else over_three)
    widths = tuple(s.ffn_dim for s in config.layers())
    assert len(set(widths)) == (6 if part == "attention" else 3)
    if part != "attention":
        assert all(widths[i] == widths[shared_index(i, 6, 3, "cycle")] for i in range(6))


def test_openelm_270m_comes_out_as_published() -> None:
    """OpenELM-270M: heads 12 x5, 16 x7, 20 x4 and the FFN widths of its config.json (apple/OpenELM-270M)."""
    config = built(
        vocab_size=32000,
        d_model=1280,
        num_layers=16,
        context=2048,
        head_dim=64,
        attention="gqa",
        kv_group=4,
        qk_norm=True,
        ffn_ratio=4.0,
        ffn_multiple=256,
        layerwise_alpha="0.5..1.0",
        layerwise_beta="0.125..1.0",
    )
    assert config.num_heads == (12,) * 5 + (16,) * 7 + (20,) * 4
    assert config.ffn_dim == (768, 1024, 1280, 1536, 1792, 2048, 2560, 2816, 3072, 3328, 3584, 3840, 4352, 4608, 4864, 5120)
    assert count(config).params == 271_527_168


def test_the_ratio_of_the_chosen_ffn_counts() -> None:
    space = space_of(FIXED, ffn=["gated", "standard"], ffn_ratio=2.0, standard_ffn_ratio=3.0)
    assert [space.config({"ffn": kind}).ffn_dim for kind in ("gated", "standard")] == [256, 384]
    assert built(ffn_ratio=2.0, d_model=100, ffn_multiple=64).ffn_dim == 192


def test_small_repairs_and_scale() -> None:
    assert built(norm="rmsnorm", norm_bias=True).norm_bias is False
    assert built(norm="layernorm").norm_bias is True
    assert built(norm="layernorm", norm_bias=False).norm_bias is False
    assert built(augmented_shortcuts=1, shortcut_reduction=500).shortcut_reduction == 128
    assert built(embedding_scale="sqrt_d", d_model=144).embedding_scale == 12.0
    assert all("\n" not in rule for rule in REPAIRS)


# --- vocabulary ---------------------------------------------------------------------------


def test_vocabulary_is_the_size_read_back() -> None:
    space = space_of()
    assert space.vocab_choices == (512, 1024)
    params = {"vocab_size": 1024, "d_model": 32}
    assert space.config(params).vocab_size == 1024
    assert space.config(params, vocab_sizes={512: 512, 1024: 983}).vocab_size == 983
    assert space.suggest(FixedTrial(params), vocab_sizes={1024: 983}).vocab_size == 983
    assert space.requested_vocab(params) == 1024
    assert space_of(vocab_size=700).requested_vocab({}) == 700
    with pytest.raises(KeyError):
        space.config(params, vocab_sizes={512: 512})


def test_parameters_of_another_space_are_refused() -> None:
    with pytest.raises(InvalidSpace, match="space 'mine': the parameters lack d_model"):
        space_of().config({"vocab_size": 512})


# --- files, sizes, words ------------------------------------------------------------------


@pytest.mark.parametrize("name", space_names())
def test_round_trip_through_dict_and_toml(name: str, tmp_path: Path) -> None:
    space = load_space(name)
    assert Space.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    path = tmp_path / "copy.toml"
    path.write_text(space.to_toml(), encoding="utf-8")
    assert load_space(path) == space
    assert load_space(str(path)) == space


def test_toml_of_awkward_texts_and_values(tmp_path: Path) -> None:
    table = {**NEEDED, "norm_eps": [1e-5, 1e-12], "context": {"low": 64, "high": 4096, "log": True}}
    space = Space.from_dict({"name": 'a "b" \\ é', "about": "tab\there \x7f", "parameters": table})
    path = tmp_path / "x.toml"
    path.write_text(space.to_toml(), encoding="utf-8")
    assert load_space(path) == space


def test_a_file_without_a_name_is_named_by_its_stem(tmp_path: Path) -> None:
    path = tmp_path / "badge.toml"
    path.write_text("[parameters]\nvocab_size = 512\nd_model = 32\nnum_layers = 2\nhead_dim = 16\n", encoding="utf-8")
    assert load_space(path).name == "badge"


def test_the_key_is_of_what_is_searched() -> None:
    one = space_of()
    same = Space.from_dict({"name": "other", "about": "words", "parameters": {**NEEDED, "qk_norm": False}})
    assert one.sha256 == same.sha256
    assert one.key == one.sha256[:16]
    different = [space_of(qk_norm=True), Space.from_dict({**one.to_dict(), "params": [1, 2]}), space_of(d_model={"low": 32, "high": 64})]
    assert len({s.sha256 for s in [one, *different]}) == 4


def test_size_counts_combinations() -> None:
    assert space_of().size == 2 * 3
    assert space_of(qk_norm=[True, False], ffn_ratio={"low": 2.0, "high": 4.0, "step": 0.5}).size == 2 * 3 * 2 * 5
    assert space_of(ffn_ratio={"low": 2.0, "high": 4.0}).size is None
    assert space_of(FIXED).size == 1


def test_describe_has_a_row_for_every_parameter_asked_ones_first() -> None:
    rows = describe(space_of(context={"low": 64, "high": 1048576, "log": True}, qk_norm=[False, True]))
    assert [r.name for r in rows[:4]] == ["vocab_size", "d_model", "context", "qk_norm"]
    assert [(r.kind, r.values) for r in rows[:4]] == [
        ("choice", "512, 1024"),
        ("range", "32 to 64, step 16"),
        ("range", "64 to 1048576, log"),
        ("choice", "false, true"),
    ]
    assert {r.name for r in rows} == {p.name for p in PARAMETERS}
    assert all(r.kind == "fixed" and r.meaning for r in rows[4:])


# --- refused, in one line -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"\[parameters\] is missing"),
        ({"parameters": 3}, r"\[parameters\] is missing"),
        ({"parameters": {"vocab_size": 512}}, "d_model is missing"),
        ({"parameter": NEEDED}, "'parameter' is not a key; did you mean 'parameters'?"),
        ({"name": 3, "parameters": NEEDED}, "name=3 is not a name"),
        ({"about": 3, "parameters": NEEDED}, "about=3 is not a text"),
        ({"params": [5, 2], "parameters": NEEDED}, r"params=\[5, 2\] is not least then most"),
        ({"params": [5], "parameters": NEEDED}, r"params=\[5\] is not a range"),
        ({"params": "5-10", "parameters": NEEDED}, "params='5-10' is not a range"),
    ],
)
def test_refused_outside_the_parameters(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpace, match=message):
        Space.from_dict(values)


def test_unknown_names_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpace, match="space 'tinny' is not known; did you mean 'tiny'"):
        load_space("tinny")
    with pytest.raises(InvalidSpace, match="space 'xyz' is not known; choose 'tiny', 'wearable', 'phone' or 'laptop'"):
        load_space("xyz")
    with pytest.raises(InvalidSpace, match=r"gone\.toml cannot be read \(No such file"):
        load_space(tmp_path / "gone.toml")
    with pytest.raises(InvalidSpace, match="cannot be read"):
        load_space(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("[parameters\nd_model = 3\n", encoding="utf-8")
    with pytest.raises(InvalidSpace, match=r"broken\.toml is not TOML") as caught:
        load_space(broken)
    assert "\n" not in str(caught.value)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidSpace, match="is not TOML"):
        load_space(broken)


def test_loading_a_space_imports_nothing_heavy() -> None:
    code = (
        "import sys; from search_spaces.space import *; [describe(load_space(n)) for n in space_names()];"
        "print([m for m in ('torch', 'optuna', 'tvm', 'plotly', 'numpy', 'pandas', 'tokenizers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert result.stdout.strip() == "[]"


def test_a_single_unique_layer_takes_the_mean_of_its_span() -> None:
    one = built(num_layers=1, layerwise_alpha="0.5..1.0", layerwise_beta="0.5..1.5", sharing="none")
    shared = built(sharing="sequence", unique_fraction=0.1, num_layers=4, layerwise_beta="0.5..1.5", shared_parts="both")
    plain = built(sharing="sequence", unique_fraction=0.1, num_layers=4, layerwise_beta="none", shared_parts="both")
    assert shared.num_unique_layers == 1
    assert shared.ffn_dim == plain.ffn_dim
    assert one.num_heads == built(num_layers=1, attention_width=0.75, sharing="none").num_heads


@pytest.mark.parametrize("name", space_names())
def test_ffn_widths_stay_near_the_ratio_asked(name: str) -> None:
    """Each width is the ratio within its span, whatever is shared."""
    space = load_space(name)
    rng = random.Random(0)
    for _ in range(300):
        params = space.draw(rng)
        config = space.config(params)
        value = {axis.name: params.get(axis.name, axis.plain) for axis in space.axes}
        span = str(value["layerwise_beta"])
        first, last = (1.0, 1.0) if span == "none" else map(float, span.split(".."))
        ratio = float(value["ffn_ratio"] if value["ffn"] == "gated" else value["standard_ffn_ratio"])
        widths = config.ffn_dim if isinstance(config.ffn_dim, tuple) else (config.ffn_dim,)
        least, most = min(first, last), max(first, last)
        if len(widths) == 1 and config.num_unique_layers == 1 and config.shared_parts != "attention":
            least = most = (first + last) / 2
        slack = int(value["ffn_multiple"]) + 0.01 * config.d_model
        for width in widths:
            assert width is not None
            assert least * ratio * config.d_model - slack <= width <= most * ratio * config.d_model + slack
