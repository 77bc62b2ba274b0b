"""Whole models built here for other machines: one library that such a machine loads."""

from pathlib import Path

import pytest

from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.workload import RequestTokens
from targets.spec import load_spec
from targets.toolchain import toolchain
from targets.tvm_compile import compile_program

CONFIG = SLMConfig(vocab_size=61, d_model=32, num_layers=2, num_heads=4, attention="gqa", num_kv_heads=2, ffn_dim=40, context=16)
TOKENS = RequestTokens(prompt=5, generated=6)
SHARED = 3
"""ET_DYN in ELF's e_type."""
MACHINES = {"pi5": (64, 183), "pi-32bit": (32, 40), "riscv64-rvv": (64, 243)}
"""Bits of an address, and ELF's e_machine: AArch64, ARM, RISC-V."""


@pytest.mark.parametrize("name", MACHINES)
def test_a_model_is_linked_for_another_machine(name: str, kernel_cache: Path, tmp_path: Path) -> None:
    tools = toolchain(load_spec(name))
    made = compile_program(build_program(CONFIG, TOKENS), tools, kernel_cache, tmp_path / "program")
    (library,) = made.glob("program-*.so")
    header = library.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert ({1: 32, 2: 64}[header[4]], int.from_bytes(header[18:20], "little")) == MACHINES[name]
    assert int.from_bytes(header[16:18], "little") == SHARED
