"""A config and request lengths -> the `Program` a target compiles: architectures become stages and names."""

from collections.abc import Iterator

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
    model = SLM(config, device="meta")
    specs = {name: TensorSpec(shape=tuple(tensor.shape), dtype=dtype) for name, tensor, dtype in stored_tensors(model, precision)}
    stages: dict[str, Stage] = {}
    functions = {}
    for phase, rows in (("prefill", tokens.prompt), ("decode", 1)):
        uses = list(stage_uses(config, phase, rows, precision))  # type: ignore[arg-type]
        stages |= {use.spec.key: Stage(key=use.spec.key, export=use.spec.export) for use in uses}
        functions[phase] = _function(config, phase, rows, uses)  # type: ignore[arg-type]
    used = dict.fromkeys(name for f in functions.values() for call in f.calls for name in call.weights.values())
    return Program(
        functions=functions,
        stages=stages,
        weights={name: specs[name] for name in used},
        state={name: TensorSpec(shape=shape) for name, shape in _state(config)},
        bounds={"C": tokens.total},
    )


def state_name(layer: int, cache: str) -> str:
    """Name of one of the tensors that effective layer `layer` caches."""
    return f"layer{layer}.{cache}"


def _state(config: SLMConfig) -> Iterator[tuple[str, tuple[int | str, ...]]]:
    for i in range(config.num_layers):
        for cache, row in zip(cache_names(config), cache_row_shapes(config, i), strict=True):
            yield state_name(i, cache), (1, "C", *row)


def _function(config: SLMConfig, phase: Phase, rows: int, uses: list[StageUse]) -> Function:
    rope = ("cos", "sin") if config.positions == "rotary" else ()
    state = {name: TensorSpec(shape=shape) for name, shape in _state(config)} if phase == "decode" else {}
    calls, outputs = [], ["logits"]
    names_in: tuple[str, ...]
    names_out: tuple[str, ...]
    for use in uses:
        if use.spec.kind == "embed":
            names_in, names_out = ("tokens", "positions"), ("x", *rope)
        elif use.spec.kind == "head":
            names_in, names_out = ("x",), ("logits",)
        else:
            assert use.layer is not None
            caches = tuple(state_name(use.layer, cache) for cache in cache_names(config))
            names_in = ("x", *rope, *(caches if phase == "decode" else ()))
            names_out = ("x", *(name + ROWS for name in caches))
            outputs += names_out[1:]
        operators = {name: weight_operator(use.spec.kind, name) for name in use.weights}
        calls.append(Call(stage=use.spec.key, inputs=names_in, weights=use.weights, outputs=names_out, operators=operators))
    inputs = {"tokens": TensorSpec(shape=(1, rows), dtype="int64"), "positions": TensorSpec(shape=(rows,), dtype="int64"), **state}
    return Function(name=phase, inputs=inputs, calls=tuple(calls), outputs=tuple(outputs))
