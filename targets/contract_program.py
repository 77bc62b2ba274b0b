"""The small program that `targets.contract` puts a target through: a table of tokens, a state that grows, logits.

A prompt's tokens become rows x of the table, and rows m = x W of state. The logits of the last row are (x + m + a) T' with
the same table T, where a is 0 in a prompt and softmax(x M') M over the rows M so far in a step. It has what matters in
a language model: stages that chain, a weight that two stages share, state whose length varies, integers in, numbers out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from targets.arrays import write_arrays
from targets.program import ROWS, Call, Function, Program, Sample, Stage, Step, TensorSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

VOCAB, WIDTH, PROMPT, STEPS = 48, 32, 5, 3
"""Rows and columns of the table, tokens of the prompt, and steps after it."""
STATE, LOGITS = "memory", "logits"
_MOST_ROWS = PROMPT + STEPS


@dataclass(frozen=True, slots=True)
class ExportStage:
    """Exports one of the program's stages: of "embed" or "body", for `rows` tokens; a single one reads the state."""

    part: str
    rows: int

    def __call__(self) -> "ExportedProgram":
        """The exported stage, its parameters under "stage."."""
        import torch
        from torch import Tensor, nn

        step = self.rows == 1

        class Embed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stage = nn.Embedding(VOCAB, WIDTH)

            def forward(self, tokens: Tensor) -> tuple[Tensor]:
                return (self.stage(tokens),)

        class Body(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stage = nn.ModuleDict({"mix": nn.Linear(WIDTH, WIDTH, bias=False), "table": nn.Linear(WIDTH, VOCAB, bias=False)})

            def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
                rows = self.stage["mix"](x)
                last = x[:, -1:] + rows[:, -1:]
                for memory in state:
                    p = torch.softmax((memory * x).sum(dim=-1), dim=-1)
                    last = last + (p[..., None] * memory).sum(dim=1, keepdim=True)
                return self.stage["table"](last), rows

        if self.part == "embed":
            return torch.export.export(Embed().eval(), (torch.zeros(1, self.rows, dtype=torch.int64),), strict=False)
        arguments = (torch.zeros(1, self.rows, WIDTH), *((torch.zeros(1, PROMPT, WIDTH),) if step else ()))
        dynamic = (None, ({1: torch.export.Dim("C", min=2, max=1 << 20)},)) if step else (None,)
        return torch.export.export(Body().eval(), arguments, dynamic_shapes=dynamic, strict=False)


@dataclass(frozen=True, slots=True)
class FailingStage:
    """An export that raises."""

    def __call__(self) -> "ExportedProgram":
        """Raises, as an exporter may."""
        raise ValueError("this stage is made to fail\nin two lines")


def contract_program(failing: str = "") -> Program:
    """The program: `prefill` of `PROMPT` tokens and `decode` of one.

    Args:
        failing: name of a stage that is replaced by one which fails to export; "": none.
    """
    stages, functions = {}, {}
    for name, rows in (("prefill", PROMPT), ("decode", 1)):
        state = {STATE: TensorSpec(shape=(1, "C", WIDTH))} if name == "decode" else {}
        embed, body = f"contract_embed_{rows}", f"contract_body_{rows}"
        for key, part in ((embed, "embed"), (body, "body")):
            stages[key] = (
                Stage(key=f"{key}_failing", export=FailingStage()) if key == failing else Stage(key=key, export=ExportStage(part, rows))
            )
        functions[name] = Function(
            name=name,
            inputs={"tokens": TensorSpec(shape=(1, rows), dtype="int64"), **state},
            calls=(
                Call(stage=embed, inputs=("tokens",), weights={"weight": "table"}, outputs=("x",)),
                Call(
                    stage=body, inputs=("x", *state), weights={"mix.weight": "mix", "table.weight": "table"}, outputs=(LOGITS, STATE + ROWS)
                ),
            ),
            outputs=(LOGITS, STATE + ROWS),
        )
    return Program(
        functions=functions,
        stages=stages,
        weights={"table": TensorSpec(shape=(VOCAB, WIDTH)), "mix": TensorSpec(shape=(WIDTH, WIDTH))},
        state={STATE: TensorSpec(shape=(1, "C", WIDTH))},
        bounds={"C": _MOST_ROWS},
    )


def contract_sample(wrong: str = "", seed: int = 0) -> Sample:
    """The prompt, `STEPS` steps after it with their results, and both functions to time.

    Args:
        wrong: name of an array whose values are written wrong, as in "step2.logits"; "": none.
        seed: of weights and tokens.
    """

    def step(n: int) -> Step:
        expected = {name: f"step{n}.{name}" for name in (LOGITS, STATE + ROWS)}
        return Step(function="decode" if n else "prefill", inputs={"tokens": f"step{n}.tokens"}, expected=expected)

    steps = tuple(step(n) for n in range(1 + STEPS))
    return Sample(
        write=lambda path: _write(path, wrong, seed),
        steps=steps,
        timed={"prefill": (steps[0].inputs, 0), "decode": (steps[-1].inputs, _MOST_ROWS - 1)},
    )


def _write(path: Path, wrong: str, seed: int) -> None:
    write_arrays(path, ((name, array + 0.01 * np.abs(array).max() if name == wrong else array) for name, array in _arrays(seed)))


def _arrays(seed: int) -> Iterator[tuple[str, NDArray[Any]]]:
    rng = np.random.default_rng(seed)
    table, mix = (rng.standard_normal(shape).astype(np.float32) / 4 for shape in ((VOCAB, WIDTH), (WIDTH, WIDTH)))
    yield "table", table
    yield "mix", mix
    memory = np.zeros((0, WIDTH), np.float32)
    for n in range(1 + STEPS):
        tokens = rng.integers(0, VOCAB, PROMPT if n == 0 else 1, np.int64)
        x = table[tokens]
        rows = x @ mix.T
        last = x[-1:] + rows[-1:]
        if n:
            scores = np.exp(x @ memory.T)
            last = last + scores / scores.sum() @ memory
        memory = np.concatenate((memory, rows))
        yield f"step{n}.tokens", tokens[None]
        yield f"step{n}.{LOGITS}", (last @ table.T)[None].astype(np.float32)
        yield f"step{n}.{STATE}{ROWS}", rows[None]
