"""A processor's SIMD registers and byte dot products, from LLVM's name of it."""

import pytest

pytest.importorskip("tvm")

from targets.tvm_probe import vectors


@pytest.mark.parametrize(
    ("triple", "cpu", "vector_bytes", "dot"),
    [
        ("x86_64-linux-gnu", "znver4", 64, "vnni"),
        ("x86_64-linux-gnu", "rocketlake", 64, "vnni"),
        ("x86_64-linux-gnu", "skylake-avx512", 64, "madd"),
        ("x86_64-linux-gnu", "alderlake", 32, "vnni"),
        ("x86_64-linux-gnu", "znver3", 32, "madd"),
        ("x86_64-linux-gnu", "sandybridge", 32, ""),
        ("x86_64-linux-gnu", "knl", 64, ""),
        ("x86_64-linux-gnu", "nehalem", 16, "madd"),
        ("aarch64-linux-gnu", "cortex-a53", 16, ""),
        ("aarch64-linux-gnu", "cortex-a76", 16, "sdot"),
    ],
)
def test_known_processors(triple: str, cpu: str, vector_bytes: int, dot: str) -> None:
    assert vectors(triple, cpu) == {"vector_bytes": vector_bytes, "dot": dot}
