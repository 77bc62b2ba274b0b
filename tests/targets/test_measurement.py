"""What is derived from raw times, and that they survive a file."""

import json
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from targets.measurement import NOISY_IQR, Measurement, interquartile_range

TIMES = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=30).map(tuple)


def measurement(**times_s: tuple[float, ...]) -> Measurement:
    return Measurement(device="d", times_s=times_s, workspace_bytes={"f": 1}, packed_bytes=2, errors={"f": 1e-7})


@given(times=TIMES)
def test_median_and_spread_are_numpys(times: tuple[float, ...]) -> None:
    m = measurement(f=times)
    q1, median, q3 = np.quantile(times, [0.25, 0.5, 0.75])
    assert m.median_s("f") == pytest.approx(median, rel=1e-12)
    assert m.iqr_s("f") == pytest.approx(q3 - q1, rel=1e-9, abs=1e-12 * max(times))


@given(times=TIMES, factor=st.floats(1e-3, 1e3))
def test_the_spread_scales_with_the_times_and_ignores_their_order(times: tuple[float, ...], factor: float) -> None:
    scaled = tuple(factor * t for t in reversed(times))
    assert interquartile_range(scaled) == pytest.approx(factor * interquartile_range(times), rel=1e-6, abs=1e-9 * factor * max(times))


@given(times=TIMES)
def test_noisy_is_a_spread_above_a_tenth_of_the_median(times: tuple[float, ...]) -> None:
    m = measurement(f=times)
    assert m.is_noisy("f") == (interquartile_range(times) / statistics.median(times) > NOISY_IQR)


def test_one_outlier_changes_neither_median_nor_noise() -> None:
    m = measurement(f=(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 50.0))
    assert m.median_s("f") == 1.0
    assert m.noisy == ()


def test_noisy_names_the_functions_that_are() -> None:
    m = measurement(quiet=(1.0, 1.01, 1.02, 1.03), wide=(1.0, 1.2, 1.4, 1.6), once=(3.0,))
    assert m.noisy == ("wide",)
    assert m.iqr_s("once") == 0.0


@given(
    times=st.dictionaries(st.sampled_from(["prefill", "decode"]), TIMES, min_size=1),
    reference=TIMES,
    peak=st.one_of(st.none(), st.integers(0, 1 << 40)),
    attempts=st.integers(1, 3),
)
def test_a_measurement_survives_json(
    times: dict[str, tuple[float, ...]], reference: tuple[float, ...], peak: int | None, attempts: int
) -> None:
    m = Measurement(
        device="null", times_s=times, reference_s=reference, measured_peak_bytes=peak, workspace_bytes={"decode": 7}, packed_bytes=1 << 33,
        errors={"decode": 1.5e-7}, attempts=attempts,
    )  # fmt: skip
    assert Measurement.from_dict(json.loads(json.dumps(m.to_dict()))) == m


def test_a_function_that_was_not_timed_has_no_median() -> None:
    with pytest.raises(KeyError):
        measurement(f=(1.0,)).median_s("g")
