"""The tests that every target must pass: the author of a plug-in subclasses them, and pytest runs them.

```
from targets.contract import TargetContract

class TestMyTarget(TargetContract):
    def make(self, cache_dir, **options):
        return MyTarget(DeviceSpec(name="mine", kind="mine", options=options), cache_dir)
```

One target serves a class's tests and is closed after the last. They compile a program of some thousand weights
(`targets.contract_program`) and measure it a few times: what a target needs to start is most of the time they take.
"""

import json
import math
import tempfile
import threading
from pathlib import Path
from typing import Any, ClassVar

from targets.contract_program import LOGITS, STATE, contract_program, contract_sample
from targets.measurement import Measurement, Timing
from targets.program import ROWS
from targets.spec import DeviceSpec, InvalidDevice
from targets.target import Target, TargetError

QUICK = Timing(repeats=3, min_repeat_s=0.0, warmup_s=0.0, retries=0, timeout_s=120.0)
"""Checks everything and times hardly anything."""


class TargetContract:
    """What holds of every target.

    Attributes:
        computes: whether the target runs the program; one that counts or predicts compares no numbers.
    """

    computes: ClassVar[bool] = True

    _folder: ClassVar["tempfile.TemporaryDirectory[str] | None"] = None
    _target: ClassVar[Target | None] = None
    _artifact: ClassVar[Path | None] = None

    def make(self, cache_dir: Path, **options: Any) -> Target:
        """A new target; called for the first test of the class, and by tests that need one of their own.

        Args:
            cache_dir: where it may keep things; the same folder in every call.
            options: what `DeviceSpec.options` shall be.
        """
        raise NotImplementedError("give a `make` that returns the target to test")

    # --- what the tests work with ---------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """A folder of this class's tests, removed after the last."""
        mine = type(self)
        if mine._folder is None:
            mine._folder = tempfile.TemporaryDirectory(prefix="edgewise-contract-")
        return Path(mine._folder.name)

    @property
    def target(self) -> Target:
        """The target of this class's tests, made for the first."""
        mine = type(self)
        if mine._target is None:
            mine._target = self.make(self.folder / "cache")
        return mine._target

    @property
    def artifact(self) -> Path:
        """The program, compiled by the first test that asks."""
        mine = type(self)
        if mine._artifact is None:
            mine._artifact = self.target.compile(contract_program(), self.folder / "program")
        return mine._artifact

    @classmethod
    def teardown_class(cls) -> None:
        """Closes the target and removes what it kept."""
        if cls._target is not None:
            cls._target.close()
        if cls._folder is not None:
            cls._folder.cleanup()
        cls._target = cls._artifact = cls._folder = None

    # --- the device -------------------------------------------------------------------------------

    def test_the_spec_says_what_the_device_is(self) -> None:
        """Cores and ceilings are known, and the spec survives a run's manifest."""
        spec = self.target.spec
        assert spec.name and spec.kind, "name and kind of the spec are what users call the device"
        for field in ("cores", "flops_per_s", "read_bytes_per_s"):
            assert getattr(spec, field) > 0, f"spec.{field} is {getattr(spec, field)}: detect or measure what the device file leaves out"
        assert DeviceSpec.from_dict(json.loads(json.dumps(spec.to_dict())), spec.name) == spec
        assert self.target.spec == spec, "the spec is found out once, then kept"

    def test_an_unknown_option_is_refused(self) -> None:
        """A mistyped option of a device file is an error, not a default."""
        try:
            target = self.make(self.folder / "cache", no_such_option=1)
        except (InvalidDevice, TargetError) as error:
            self._is_one_line(error, naming="no_such_option")
        else:
            target.close()
            raise AssertionError("options={'no_such_option': 1} was accepted; raise InvalidDevice for options that you do not know")

    def test_closing_twice_is_closing_once(self) -> None:
        """Also before anything was compiled."""
        target = self.make(self.folder / "cache")
        target.close()
        target.close()

    # --- compiling --------------------------------------------------------------------------------

    def test_what_is_compiled_lies_in_the_folder_given(self) -> None:
        """The folder need not be there."""
        folder = self.folder / "program"
        assert self.artifact.exists(), f"{self.artifact} is not there"
        assert self.artifact.resolve().is_relative_to(folder.resolve()), f"{self.artifact} is not below {folder}"

    def test_an_equal_program_compiled_again_disturbs_nothing(self) -> None:
        """The same stages, in another folder: both can be measured."""
        first = self.artifact
        second = self.target.compile(contract_program(), self.folder / "again")
        assert second != first, f"both lie at {first}: the second was to be compiled into another place"
        for artifact in (first, second, first):
            self._complete(self.target.measure(artifact, contract_sample(), QUICK))

    def test_a_compile_that_fails_is_a_target_error(self) -> None:
        """One line, and the target goes on."""
        if not self.computes:
            return
        for failing in ("contract_embed_5", "contract_body_1"):
            error = self._refused(lambda failing=failing: self.target.compile(contract_program(failing), self.folder / failing))
            assert "made to fail" in str(error), f"the error says why, unlike: {error}"
        self.target.compile(contract_program(), self.folder / "after")

    # --- measuring --------------------------------------------------------------------------------

    def test_a_measurement_is_complete(self) -> None:
        """Every function has times, a workspace and, where it was checked, an error."""
        self._complete(self.target.measure(self.artifact, contract_sample(), QUICK))

    def test_a_measurement_survives_json(self) -> None:
        """Run folders keep it as JSON."""
        measurement = self.target.measure(self.artifact, contract_sample(), QUICK)
        assert Measurement.from_dict(json.loads(json.dumps(measurement.to_dict()))) == measurement

    def test_other_weights_are_taken_with_the_same_program(self) -> None:
        """Weights come with the sample: a compiled program holds none."""
        for seed in (1, 2):
            self._complete(self.target.measure(self.artifact, contract_sample(seed=seed), QUICK))

    def test_wrong_numbers_are_refused(self) -> None:
        """In any output of any step; the message says which, and the target goes on."""
        if not self.computes:
            return
        for name in (f"step0.{LOGITS}", f"step0.{STATE}{ROWS}", f"step3.{LOGITS}"):
            error = self._refused(lambda name=name: self.target.measure(self.artifact, contract_sample(wrong=name), QUICK))
            step, _, output = name.partition(".")
            assert output in str(error) and step[-1] in str(error), f"the error names the step and the output {output}, unlike: {error}"
        self._complete(self.target.measure(self.artifact, contract_sample(), QUICK))

    def test_a_compile_beside_a_measurement_harms_neither(self) -> None:
        """A search compiles the next candidate in another thread meanwhile."""
        artifact, target = self.artifact, self.target
        compiled: list[Path] = []
        thread = threading.Thread(target=lambda: compiled.append(target.compile(contract_program(), self.folder / "beside")))
        thread.start()
        measurement = target.measure(artifact, contract_sample(), QUICK)
        thread.join(timeout=300)
        self._complete(measurement)
        assert compiled and compiled[0].exists(), "the compile in the other thread failed"
        self._complete(target.measure(compiled[0], contract_sample(), QUICK))

    # --- what several tests ask ---------------------------------------------------------------------

    def _complete(self, measurement: Measurement) -> None:
        program = contract_program()
        assert measurement.device == self.target.spec.name
        assert set(measurement.times_s) == set(program.functions), f"times are of {set(measurement.times_s)}, not of every function"
        for name, times in measurement.times_s.items():
            assert 1 <= len(times) <= QUICK.repeats, f"{name} has {len(times)} times; {QUICK.repeats} were asked for"
            assert all(0 < t < math.inf for t in times), f"{name} has times that are none: {times}"
        assert all(0 < t < math.inf for t in measurement.reference_s)
        assert measurement.reference_s, "reference_s is empty: time a fixed kernel beside, to notice a device that slowed down"
        assert set(measurement.workspace_bytes) == set(program.functions)
        assert all(count >= 0 for count in measurement.workspace_bytes.values())
        assert measurement.packed_bytes >= program.weight_bytes, (
            "packed_bytes counts the weights in the device's layout, each at least once"
        )
        assert set(measurement.errors) == set(program.functions), "errors has each checked function"
        assert all(0 <= error <= contract_sample().tolerance for error in measurement.errors.values())

    def _refused(self, call: Any) -> TargetError:
        try:
            call()
        except TargetError as error:
            self._is_one_line(error)
            return error
        raise AssertionError("a TargetError was to be raised")

    @staticmethod
    def _is_one_line(error: Exception, naming: str = "") -> None:
        assert str(error).strip() and "\n" not in str(error), f"the message is to be one line, not {str(error)!r}"
        assert naming in str(error), f"the error names {naming}, unlike: {error}"
