"""The compiled program gives PyTorch's logits and cache rows, in prefill and in eight decode steps, for every choice.

With fewer bits than fp32 the reference is PyTorch on the dequantised weights.
`LocalTarget.measure` compares each output of each step and refuses a relative error above 1e-4, so a test
passes by measuring; the tests at the end show that it does refuse.
"""

import dataclasses
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from strategies import random_config

from cost_models.measured import DECODE_STEPS, make_sample
from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.precision import PRECISIONS, Precision
from search_spaces.workload import RequestTokens
from targets.local import LocalTarget
from targets.measurement import Measurement, Timing
from targets.program import Sample
from targets.target import TargetError

TOLERANCE = 1e-4
BASE: dict[str, Any] = {"vocab_size": 61, "d_model": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 40, "context": 32}
MLA: dict[str, Any] = {"attention": "mla", "kv_rank": 9, "v_head_dim": 5, "rotary_dim": 4}
GQA: dict[str, Any] = {"attention": "gqa", "num_kv_heads": 2}
BIASES = {"qkv_bias": True, "attention_bias": True, "ffn_bias": True}

CHOICES: dict[str, dict[str, Any]] = {
    "mha": {},
    "one-head": {"num_heads": 1},
    "gqa": GQA,
    "mqa": {"attention": "mqa"},
    "mla": MLA,
    "mla-query-rank": MLA | {"q_rank": 11},
    "mla-plain-widths": {"attention": "mla", "kv_rank": 16},
    "mla-rotary-wider-than-head": MLA | {"head_dim": 3, "rotary_dim": 6},
    "head-dim-odd": {"head_dim": 7, "rotary_dim": 6},
    "head-dim-odd-gqa": GQA | {"head_dim": 5, "rotary_dim": 2},
    "head-dim-odd-mla": MLA | {"head_dim": 7, "v_head_dim": 3},
    "head-dim-one": {"head_dim": 1, "positions": "learned"},
    "head-dim-free": {"head_dim": 24},
    "d-model-odd": {"d_model": 33, "head_dim": 8},
    "layer-wise": {"attention": "gqa", "num_heads": (2, 4), "num_kv_heads": (1, 2), "head_dim": 8, "ffn_dim": (17, 48)},
    "layer-wise-mla": MLA | {"num_heads": (2, 5), "head_dim": 8, "ffn_dim": (24, 40)},
    **{f"{ffn}-{act}": {"ffn": ffn, "activation": act} for ffn in ("standard", "gated") for act in ("relu", "gelu", "gelu_tanh", "silu")},
    "ffn-bias": {"ffn_bias": True},
    "layernorm": {"norm": "layernorm"},
    "layernorm-no-bias": {"norm": "layernorm", "norm_bias": False},
    "layernorm-no-weight": {"norm": "layernorm", "norm_weight": False},
    "rmsnorm-eps": {"norm": "rmsnorm", "norm_eps": 1e-3},
    "layernorm-mla": MLA | {"norm": "layernorm"},
    "qk-norm": {"qk_norm": True},
    "qk-norm-gqa": GQA | {"qk_norm": True},
    "rotary-partial": {"rotary_dim": 2},
    "rotary-theta": {"rotary_dim": 6, "rope_theta": 1e5},
    "learned": {"positions": "learned"},
    "learned-offset": {"positions": "learned", "position_offset": 2},
    "block-parallel": {"block": "parallel"},
    "block-parallel-shared-norm": {"block": "parallel_shared_norm"},
    "qkv-bias": {"qkv_bias": True},
    "qkv-bias-gqa": GQA | {"qkv_bias": True},
    "attention-bias": {"attention_bias": True},
    "biases-mla": MLA | BIASES,
    "biases-mla-query-rank": MLA | BIASES | {"q_rank": 6},
    "untied": {"tie_embeddings": False},
    "head-bias": {"head_bias": True},
    "head-bias-untied": {"tie_embeddings": False, "head_bias": True},
    "embedding-scale": {"embedding_scale": 32**0.5},
    **{
        f"sharing-{pattern}-{parts}": {"num_layers": 5, "sharing": pattern, "shared_parts": parts, "num_unique_layers": 2}
        for pattern in ("sequence", "cycle", "cycle_rev")
        for parts in ("both", "attention", "ffn")
    },
    "sharing-layer-wise": {
        "num_layers": 4, "sharing": "cycle_rev", "num_unique_layers": 2,
        "num_heads": (2, 3, 3, 2), "head_dim": 6, "ffn_dim": (17, 9, 9, 17),
    },
    **{
        f"series-{mode}-{ffn}": {"series_activation": 3, "series_mode": mode, "ffn": ffn}
        for mode in ("scalar", "channel")
        for ffn in ("gated", "standard")
    },
    "series-gelu": {"series_activation": 2, "activation": "gelu"},
    "shortcuts": {"augmented_shortcuts": 1, "shortcut_reduction": 8},
    "shortcuts-two": {"augmented_shortcuts": 2, "shortcut_reduction": 5},
    "shortcuts-mla": MLA | {"augmented_shortcuts": 1, "shortcut_reduction": 32},
    "one-layer": {"num_layers": 1},
    "vocabulary-of-two": {"vocab_size": 2},
    # Wide enough that every kind of kernel runs on several threads and in several tiles of rows.
    "wide": {"d_model": 192, "num_heads": 6, "num_kv_heads": 2, "attention": "gqa", "ffn_dim": 448, "vocab_size": 1500, "context": 160},
    "wide-mla": MLA | {"d_model": 160, "num_heads": 5, "kv_rank": 48, "head_dim": 32, "v_head_dim": 24, "rotary_dim": 16, "context": 160},
}  # fmt: skip


def make(**changes: Any) -> SLMConfig:
    return SLMConfig(**{**BASE, **changes})


MANY = 70
"""More rows than attention takes keys at a time."""
PROMPTS = (2, 9, 22)
"""Rows below, just above and far above a register tile. Few of them, so that candidates share compiled kernels."""


def request(config: SLMConfig, rng: random.Random) -> RequestTokens:
    """A prompt that leaves room for the decode steps, and for some tokens more or less."""
    prompt = MANY if config.context > 2 * MANY else rng.choice(PROMPTS)
    return RequestTokens(prompt=prompt, generated=rng.randint(DECODE_STEPS, config.context - prompt))


def combination(rng: random.Random) -> SLMConfig:
    """Random choices and random inner sizes; the outer ones are two each, so that candidates share compiled kernels."""
    config = random_config(rng, max_layers=3)
    return dataclasses.replace(config, d_model=rng.choice((32, 45)), vocab_size=rng.choice((61, 200)), context=rng.choice((32, 41)))


def measure(
    target: LocalTarget,
    folder: Path,
    config: SLMConfig,
    tokens: RequestTokens,
    timing: Timing,
    seed: int = 0,
    precision: Precision = "fp32",
) -> Measurement:
    artifact = target.compile(build_program(config, tokens, precision), folder)
    return target.measure(artifact, make_sample(config, tokens, seed, precision=precision), timing)


def problem(found: Measurement) -> str | None:
    """What is wrong with a measurement that was not refused, if anything."""
    if set(found.errors) != {"prefill", "decode"} or not all(0 < error < TOLERANCE for error in found.errors.values()):
        return f"errors are {found.errors}"  # exactly 0 would mean that nothing was compared
    return None


TELLING: dict[str, tuple[Precision, ...]] = {
    "mha": ("fp16", "int8", "int4"),
    "wide": ("fp16", "int8", "int4"),
    "d-model-odd": ("int8", "int4"),
    "gqa": ("int4",),
    "mla-query-rank": ("int8",),
    "biases-mla": ("int4",),
    "learned": ("int8",),
    "untied": ("fp16",),
    "shortcuts": ("int4",),
}
"""What is always tried in fewer bits; the rest, and `PAIRS` in float32, only where `-m ""` asks for every test."""
PAIRS = ("gated-relu", "gated-gelu", "standard-gelu_tanh", "standard-silu", "series-scalar-standard", "series-channel-gated")
"""Pairs of two values that are both always tried, each with another partner."""


def every(values: Iterable[Any], always: Callable[[Any, Precision], bool]) -> list[Any]:
    """Each value in each precision, marked slow where it is not always tried."""
    return [
        pytest.param(value, precision, marks=() if always(value, precision) else pytest.mark.slow)
        for precision in PRECISIONS
        for value in values
    ]


def choice_is_always_tried(choice: str, precision: Precision) -> bool:
    return choice not in PAIRS if precision == "fp32" else precision in TELLING.get(choice, ())


@pytest.mark.parametrize(("choice", "precision"), every(CHOICES, choice_is_always_tried))
def test_a_choice_alone_agrees_with_pytorch(
    choice: str, precision: Precision, local_target: LocalTarget, tmp_path: Path, quick: Timing
) -> None:
    config = make(**CHOICES[choice])
    tokens = request(config, random.Random(choice))
    assert problem(measure(local_target, tmp_path / "program", config, tokens, quick, precision=precision)) is None


COMBINED = 4
"""Combinations a group."""
GROUPS: dict[int, Precision] = {4: "fp32", 5: "fp16", 6: "int8", 7: "int4"}
"""The groups that are always tried, and in what precision."""
COUNTED = ("d_model", "vocab_size", "num_layers", "series_activation", "augmented_shortcuts")
"""Numbers of which each is a choice; of the others it is a choice only whether each layer has its own."""


def seeds(group: int) -> range:
    return range(COMBINED * group, COMBINED * group + COMBINED)


def test_the_combinations_that_are_always_tried_have_every_choice() -> None:
    def choices(groups: Iterable[int]) -> set[tuple[str, Any]]:
        found = set()
        for seed in (seed for group in groups for seed in seeds(group)):
            config = combination(random.Random(seed))
            for name in (field.name for field in dataclasses.fields(config)):
                value = getattr(config, name)
                if isinstance(value, tuple) or name == "q_rank":
                    found.add((name, bool(value)))
                elif isinstance(value, str | bool | None) or name in COUNTED:
                    found.add((name, value))
        return found

    assert choices(GROUPS) == choices(range(50))


@pytest.mark.parametrize(("group", "precision"), every(range(50), lambda group, precision: GROUPS.get(group) == precision))
def test_random_combinations_agree_with_pytorch(
    group: int, precision: Precision, local_target: LocalTarget, tmp_path: Path, quick: Timing
) -> None:
    failures = []
    for seed in seeds(group):
        rng = random.Random(seed)
        config = combination(rng)
        tokens = request(config, rng)
        try:
            what = problem(measure(local_target, tmp_path / str(seed), config, tokens, quick, seed, precision))
        except TargetError as error:
            what = str(error)
        if what is not None:
            failures.append(f"seed {seed}: {what}\n  {tokens}\n  {config}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    ("prompt", "generated", "context"), [(1, 1, 2), (1, 12, 32), (2, 3, 5), (24, 8, 32), (31, 1, 32)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("attention", [{}, MLA], ids=["mha", "mla"])
def test_requests_at_the_edges_agree_with_pytorch(
    prompt: int, generated: int, context: int, attention: dict[str, Any], local_target: LocalTarget, tmp_path: Path, quick: Timing
) -> None:
    """One token of prompt, one generated, and a context that is full at the last step."""
    config = make(num_layers=1, context=context, **attention)
    found = measure(local_target, tmp_path / "program", config, RequestTokens(prompt=prompt, generated=generated), quick)
    assert problem(found) is None


# --- what differs is refused ------------------------------------------------------------------

TOKENS = RequestTokens(prompt=6, generated=10)


@pytest.fixture(scope="module")
def artifact(local_target: LocalTarget, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_target.compile(build_program(make(), TOKENS), tmp_path_factory.mktemp("checked") / "program")


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
    """The sample of `make()` with one array of its file changed after everything was computed."""
    sample = make_sample(make(), TOKENS, 0)

    def write(path: Path) -> None:
        sample.write(path)
        arrays = load_file(path)
        arrays[name] = change(arrays[name].clone()).contiguous()
        save_file(arrays, path)

    return dataclasses.replace(sample, write=write)


def at_first(value: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Sets the first element of a tensor to a value made from the tensor."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value(tensor)
        return tensor

    return change


def moved(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Moves one element that is not the largest by a share of the largest."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        smallest = tensor.abs().argmin()
        tensor.view(-1)[smallest] += share * tensor.abs().max()
        return tensor

    return change


@pytest.mark.parametrize(
    ("array", "where"),
    [
        ("step0.logits", r"step 0 \(prefill\): output logits"),
        ("step0.layer1.k.rows", r"step 0 \(prefill\): output layer1\.k\.rows"),
        ("step3.logits", r"step 3 \(decode\): output logits"),
        ("step8.layer0.v.rows", r"step 8 \(decode\): output layer0\.v\.rows"),
    ],
)
def test_one_wrong_value_is_refused_with_its_step_and_output(
    array: str, where: str, local_target: LocalTarget, artifact: Path, quick: Timing
) -> None:
    with pytest.raises(TargetError, match=where + r" differs from PyTorch's by 0\.00\d+ of its largest value \(limit 0\.0001\)") as caught:
        local_target.measure(artifact, changed(array, moved(2e-3)), quick)
    assert "\n" not in str(caught.value)


def test_the_limit_is_a_ten_thousandth_of_the_largest_value(local_target: LocalTarget, artifact: Path, quick: Timing) -> None:
    within = local_target.measure(artifact, changed("step3.logits", moved(9e-5)), quick)
    assert within.errors["decode"] == pytest.approx(9e-5, rel=0.02)
    with pytest.raises(TargetError, match=r"step 3 \(decode\): output logits"):
        local_target.measure(artifact, changed("step3.logits", moved(1.1e-4)), quick)


@pytest.mark.parametrize(
    ("weight", "where"),
    [
        ("ffns.1.up.weight", r"step 0 \(prefill\): output logits"),
        ("attentions.0.q.weight", r"step 0 \(prefill\): output logits"),
        ("embed.tokens.weight", r"step 0 \(prefill\): output"),
        ("head.norm.weight", r"step 0 \(prefill\): output logits"),
    ],
)
def test_one_wrong_weight_is_refused(weight: str, where: str, local_target: LocalTarget, artifact: Path, quick: Timing) -> None:
    with pytest.raises(TargetError, match=where):
        local_target.measure(artifact, changed(weight, lambda tensor: tensor * 1.05), quick)


def test_a_wrong_input_is_refused_at_the_step_that_reads_it(local_target: LocalTarget, artifact: Path, quick: Timing) -> None:
    with pytest.raises(TargetError, match=r"step 4 \(decode\)"):
        local_target.measure(artifact, changed("step4.tokens", lambda tensor: (tensor + 1) % 61), quick)
    with pytest.raises(TargetError, match=r"step 5 \(decode\)"):
        local_target.measure(artifact, changed("step5.positions", lambda tensor: tensor - 1), quick)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("array", ["step2.logits", "attentions.1.k.weight"])
def test_a_value_that_is_not_finite_is_refused(array: str, value: float, local_target: LocalTarget, artifact: Path, quick: Timing) -> None:
    step = 2 if array.startswith("step2") else 0
    with pytest.raises(TargetError, match=rf"step {step} \("):
        local_target.measure(artifact, changed(array, at_first(lambda _: value)), quick)


def test_not_finite_on_both_sides_is_refused(local_target: LocalTarget, artifact: Path, quick: Timing) -> None:
    """A model whose weights are broken gives NaN in PyTorch too: that is no agreement."""
    sample = make_sample(make(), TOKENS, 0)

    def write(path: Path) -> None:
        sample.write(path)
        arrays = load_file(path)
        arrays["head.norm.weight"][0] = float("nan")
        for n in range(DECODE_STEPS + 1):
            arrays[f"step{n}.logits"][:] = float("nan")
        save_file(arrays, path)

    with pytest.raises(TargetError, match=r"step 0 \(prefill\): output logits differs from PyTorch's by nan"):
        local_target.measure(artifact, dataclasses.replace(sample, write=write), quick)


def test_a_wrong_shape_is_refused(local_target: LocalTarget, artifact: Path, quick: Timing) -> None:
    with pytest.raises(TargetError, match=r"step 1 \(decode\): output logits has shape \(1, 1, 61\), not \(1, 1, 60\)"):
        local_target.measure(artifact, changed("step1.logits", lambda tensor: tensor[..., :60]), quick)


def test_after_a_refusal_the_next_measurement_stands(local_target: LocalTarget, artifact: Path, quick: Timing) -> None:
    with pytest.raises(TargetError):
        local_target.measure(artifact, changed("step0.logits", moved(1.0)), quick)
    assert problem(local_target.measure(artifact, make_sample(make(), TOKENS, 0), quick)) is None
