"""The shipped contract holds for the shipped targets, and catches targets that break it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from targets.contract import TargetContract
from targets.measurement import Measurement, Timing
from targets.null import NullTarget
from targets.program import Program, Sample
from targets.spec import DeviceSpec, load_spec
from targets.target import Target, TargetError, make_target


class TestNull(TargetContract):
    computes = False

    def make(self, cache_dir: Path, **options: Any) -> Target:
        return make_target(dataclasses.replace(load_spec("null"), options=options), cache_dir)


class TestLocal(TargetContract):
    cache: ClassVar[Path]
    spec: ClassVar[DeviceSpec]

    @pytest.fixture(autouse=True)
    def _shared(self, local_spec: DeviceSpec, kernel_cache: Path) -> None:
        type(self).spec, type(self).cache = local_spec, kernel_cache

    def make(self, cache_dir: Path, **options: Any) -> Target:
        return make_target(dataclasses.replace(self.spec, options=options), self.cache)


# --- targets that break it ------------------------------------------------------------------------


class Silent(NullTarget):
    """Says that it computes, and compares nothing."""


class Forgetful(NullTarget):
    """Leaves a function out."""

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        measurement = super().measure(artifact, sample, timing)
        return dataclasses.replace(measurement, times_s={"decode": measurement.times_s["decode"]})


class Instant(NullTarget):
    """Takes no time."""

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        measurement = super().measure(artifact, sample, timing)
        return dataclasses.replace(measurement, times_s=dict.fromkeys(measurement.times_s, (0.0,)))


class Elsewhere(NullTarget):
    """Compiles into its own folder."""

    def compile(self, program: Program, out_dir: Path) -> Path:
        return super().compile(program, out_dir.parent / "mine")


class Closed(NullTarget):
    """Can be closed once."""

    closed = False

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class Verbose(NullTarget):
    """Explains itself at length."""

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        raise TargetError("this went wrong:\neverything")


class Ignorant(NullTarget):
    """Knows nothing of its ceilings."""

    @property
    def spec(self) -> DeviceSpec:
        return dataclasses.replace(super().spec, flops_per_s=0.0)


@pytest.mark.parametrize(
    ("broken", "test", "message"),
    [
        (Silent, "test_wrong_numbers_are_refused", "a TargetError was to be raised"),
        (Silent, "test_a_compile_that_fails_is_a_target_error", "a TargetError was to be raised"),
        (Silent, "test_an_unknown_option_is_refused", "'no_such_option': 1} was accepted"),
        (Forgetful, "test_a_measurement_is_complete", "not of every function"),
        (Instant, "test_a_measurement_is_complete", "has times that are none"),
        (Elsewhere, "test_what_is_compiled_lies_in_the_folder_given", "is not below"),
        (Elsewhere, "test_an_equal_program_compiled_again_disturbs_nothing", "another place"),
        (Closed, "test_closing_twice_is_closing_once", None),
        (Verbose, "test_wrong_numbers_are_refused", "is to be one line"),
        (Ignorant, "test_the_spec_says_what_the_device_is", "spec.flops_per_s is 0.0: detect or measure"),
    ],
)
def test_the_contract_catches(broken: type[NullTarget], test: str, message: str | None) -> None:
    class Contract(TargetContract):
        def make(self, cache_dir: Path, **options: Any) -> Target:
            return broken(dataclasses.replace(load_spec("null"), options=options))

    run: Callable[[], None] = getattr(Contract(), test)
    with pytest.raises(AssertionError, match=message):
        run()
    Contract.teardown_class()


def test_a_contract_needs_a_target() -> None:
    with pytest.raises(NotImplementedError, match="give a `make`"):
        TargetContract().make(Path())
