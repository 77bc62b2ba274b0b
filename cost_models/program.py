"""A config and request lengths -> the `Program` a target compiles: architectures become stages and names.

`build_program` is what a search measures, one request; `build_serving_program` is what leaves, for requests of any length.
"""

import itertools
from collections.abc import Iterator, Mapping

from cost_models.profile import weight_operator
from search_spaces.config import SLMConfig
from search_spaces.model import SLM
from search_spaces.precision import Precision
from search_spaces.quantisation import stored_tensors
from search_spaces.stages import Phase, StageUse, cache_names, cache_row_shapes, stage_uses
from search_spaces.workload import RequestTokens
from targets.program import ROWS, Call, Function, Program, Stage, TensorSpec


def build_program(config: SLMConfig, tokens: RequestTokens, precision: Precision = "fp32") -> Program:
    """The program of a request: `prefill` of `tokens.prompt` tokens and `decode` of one token.

    Args:
        config: the architecture; its context must hold `tokens.total`.
        tokens: the request.
        precision: of the matrices.
    """
    assert tokens.total <= config.context, f"a request of {tokens.total} tokens exceeds context={config.context}"
    return _program(config, {"prefill": ("prefill", tokens.prompt), "decode": ("decode", 1)}, tokens.total, precision)


def build_serving_program(config: SLMConfig, precision: Precision = "fp32") -> Program:
    """The program that answers any request within the context: a padded prefill of each of `prefill_sizes`, and `decode`.

    A padded prefill takes, besides `tokens` and `positions`, `last`: the index of the last token that is no padding.
    """
    prefills: dict[str, tuple[Phase, int]] = {prefill_name(size): ("padded", size) for size in prefill_sizes(config)}
    return _program(config, prefills | {"decode": ("decode", 1)}, config.context, precision)


def prefill_sizes(config: SLMConfig) -> tuple[int, ...]:
    """Lengths that prompts are padded to: 16, 64, 256 … (a short prompt costs little more than its own length), last the context."""
    sizes = itertools.takewhile(lambda size: size < config.context, (16 * 4**i for i in itertools.count()))
    return (*sizes, config.context)


def prefill_name(size: int) -> str:
    """Name of the padded prefill of that many tokens."""
    return f"prefill_{size}"


def _program(config: SLMConfig, functions: Mapping[str, tuple[Phase, int]], bound: int, precision: Precision) -> Program:
    """The program of these functions, each a phase and its rows, over at most `bound` rows of state."""
    model = SLM(config, device="meta")
    specs = {name: TensorSpec(shape=tuple(tensor.shape), dtype=dtype) for name, tensor, dtype in stored_tensors(model, precision)}
    stages: dict[str, Stage] = {}
    made = {}
    for name, (phase, rows) in functions.items():
        uses = list(stage_uses(config, phase, rows, precision))
        stages |= {use.spec.key: Stage(key=use.spec.key, export=use.spec.export) for use in uses}
        made[name] = _function(config, name, phase, rows, uses)
    used = dict.fromkeys(name for f in made.values() for call in f.calls for name in call.weights.values())
    return Program(
        functions=made,
        stages=stages,
        weights={name: specs[name] for name in used},
        state={name: TensorSpec(shape=shape) for name, shape in _state(config)},
        bounds={"C": bound},
    )


def state_name(layer: int, cache: str) -> str:
    """Name of one of the tensors that effective layer `layer` caches."""
    return f"layer{layer}.{cache}"


def _state(config: SLMConfig) -> Iterator[tuple[str, tuple[int | str, ...]]]:
    for i in range(config.num_layers):
        for cache, row in zip(cache_names(config), cache_row_shapes(config, i), strict=True):
            yield state_name(i, cache), (1, "C", *row)


def _function(config: SLMConfig, name: str, phase: Phase, rows: int, uses: list[StageUse]) -> Function:
    rope = ("cos", "sin") if config.positions == "rotary" else ()
    state = {name: TensorSpec(shape=shape) for name, shape in _state(config)} if phase == "decode" else {}
    last = {"last": TensorSpec(shape=(1,), dtype="int64")} if phase == "padded" else {}
    calls, outputs = [], ["logits"]
    names_in: tuple[str, ...]
    names_out: tuple[str, ...]
    for use in uses:
        if use.spec.kind == "embed":
            names_in, names_out = ("tokens", "positions"), ("x", *rope)
        elif use.spec.kind == "head":
            names_in, names_out = ("x", *last), ("logits",)
        else:
            assert use.layer is not None
            caches = tuple(state_name(use.layer, cache) for cache in cache_names(config))
            names_in = ("x", *rope, *(caches if phase == "decode" else ()))
            names_out = ("x", *(cache + ROWS for cache in caches))
            outputs += names_out[1:]
        operators = {weight: weight_operator(use.spec.kind, weight) for weight in use.weights}
        calls.append(Call(stage=use.spec.key, inputs=names_in, weights=use.weights, outputs=names_out, operators=operators))
    inputs = {"tokens": TensorSpec(shape=(1, rows), dtype="int64"), "positions": TensorSpec(shape=(rows,), dtype="int64"), **last, **state}
    return Function(name=name, inputs=inputs, calls=tuple(calls), outputs=tuple(outputs), last=next(iter(last), ""))
