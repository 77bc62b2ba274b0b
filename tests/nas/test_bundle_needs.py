"""What a bundle asks of the machine: a processor with what it was compiled for, and the TVM that compiled it."""

import importlib.metadata
from pathlib import Path

import pytest

from nas.bundle_runner import BundleError, check_packages, check_processor


def test_another_processor_is_refused_by_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = {"machine": "x86_64", "cpu": "znver4", "flags": ["avx2", "avx512f", "avx512_vnni"]}
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse2 avx avx2 avx512f avx512_vnni\n")
    check_processor(target, cpuinfo)
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse2 avx avx2\n")
    with pytest.raises(BundleError, match="compiled for znver4, and this processor lacks avx512f, avx512_vnni; export one with --target"):
        check_processor(target, cpuinfo)
    check_processor(target, tmp_path / "not there")  # a system that does not say
    arm = {"machine": "aarch64", "cpu": "cortex-a76", "flags": ["asimddp"]}
    with pytest.raises(BundleError, match="compiled for aarch64, and this machine is x86_64"):
        check_processor(arm, cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    cpuinfo.write_text("Features\t: fp asimd evtstrm asimddp\n")
    check_processor(arm, cpuinfo)
    cpuinfo.write_text("Features\t: fp asimd evtstrm\n")
    with pytest.raises(BundleError, match="lacks asimddp"):
        check_processor(arm, cpuinfo)
    cpuinfo.write_text("flags\t\t: fpu sse2\n")  # an emulator that shows the processor below
    check_processor(arm, cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    cpuinfo.write_text("isa\t\t: rv64imafdc_zicsr\n")
    with pytest.raises(BundleError, match="this processor lacks v;"):
        check_processor({"machine": "riscv64", "cpu": "generic-rv64", "flags": ["c", "v"]}, cpuinfo)


def test_another_tvm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages({"apache-tvm": "0.27.0.post1"})
    with pytest.raises(BundleError, match=r"compiled by TVM 0\.26\.1, and 0\.27\S* is installed; run `pip install apache-tvm==0\.26\.1"):
        check_packages({"apache-tvm": "0.26.1"})

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(BundleError, match=r"apache-tvm is not installed; run `pip install apache-tvm==0\.27\.0 numpy tokenizers`"):
        check_packages({"apache-tvm": "0.27.0"})
