"""Fixtures that several packages' tests share."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

# Before PyTorch is imported, here and in child processes. Threads of tests that run side by side would spin while they wait for
# each other: two tests that need 2 s each took 11 s on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from rpc_helpers import Process, board_at_a_tracker

from targets.local import LocalTarget
from targets.measurement import Timing
from targets.spec import DeviceSpec, load_spec

QUICK = Timing(repeats=1, min_repeat_s=0.0, warmup_s=0.0, retries=0, timeout_s=120.0)
"""Checks everything and times hardly anything."""


@pytest.fixture(scope="session", autouse=True)
def _apart_from_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No device of the user's is seen; and tests that run side by side time nothing that counts, so they do not wait for each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        patch.setenv("EDGEWISE_CONFIG", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread, by whose number its sums are the same to the bit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def quick() -> Timing:
    return QUICK


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for all pytest-xdist workers, as searches that run side by side would share it."""
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = shared / "edgewise-cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def local_spec() -> DeviceSpec:
    """This machine with ceilings made up, so that no test waits for them to be measured."""
    return dataclasses.replace(load_spec("local"), flops_per_s=1e11, read_bytes_per_s=1e10)


@pytest.fixture(scope="session")
def local_target(local_spec: DeviceSpec, kernel_cache: Path) -> Iterator[LocalTarget]:
    target = LocalTarget(local_spec, kernel_cache)
    yield target
    target.close()


@pytest.fixture(scope="session")
def board_desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A tracker with an emulated aarch64 board, whose key is "board"; what needs it is skipped where it cannot be had."""
    with board_at_a_tracker(tmp_path_factory.mktemp("board")) as desk:
        yield desk
