"""What compiled code may use is named as the machine that runs it names it."""

from typing import Any

import pytest

pytest.importorskip("tvm")

from targets.tvm_features import processor_flags


@pytest.mark.parametrize(
    ("target", "has", "lacks"),
    [
        ({"mtriple": "x86_64-linux-gnu", "mcpu": "cascadelake"}, {"avx2", "fma", "avx512f", "avx512_vnni"}, {"avx512_bf16", "avx_vnni"}),
        ({"mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"}, {"avx2", "bmi1", "abm", "sse4_2"}, {"avx512f"}),
        ({"mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"}, set(), {"avx", "pni"}),
        ({"mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}, {"asimd", "asimddp", "asimdhp"}, {"sve"}),
        ({"mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}, {"asimd"}, {"asimddp"}),
        (
            {"mtriple": "armv7l-linux-gnueabihf", "mcpu": "generic", "mattr": ["+neon", "+vfp4"], "mfloat-abi": "hard"},
            {"neon", "vfpv4"},
            set(),
        ),
        ({"mtriple": "riscv64-linux-gnu", "mcpu": "generic-rv64", "mattr": ["+m", "+a", "+f", "+d", "+c", "+v"]}, {"c", "v"}, {"zvfh"}),
    ],
    ids=lambda value: value["mcpu"] if isinstance(value, dict) else None,
)
def test_flags_are_those_of_linux(target: dict[str, Any], has: set[str], lacks: set[str]) -> None:
    flags = set(processor_flags({"kind": "llvm", **target}))
    assert has <= flags
    assert not lacks & flags


def test_of_a_gpu_the_host_counts() -> None:
    host = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a78"}
    assert processor_flags({"kind": "cuda", "arch": "sm_87", "host": host}) == processor_flags(host) != []
