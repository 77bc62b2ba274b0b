import dataclasses
import itertools
import math
import random
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.doubts import is_noisy
from nas.evaluation import Evaluation, Speed
from nas.findings import chance_of_at_least, distinct, findings, kendall_tau
from nas.front import front_of
from nas.noise import Noise
from search_spaces.config import SLMConfig, attention_kind
from targets.measurement import Measurement

STEADY = {"times_s": {"prefill": [3.0, 3.0, 3.1], "decode": [1.0, 1.0, 1.01, 1.0]}}
MEASUREMENT = Measurement(device="d", times_s={}, workspace_bytes={}, packed_bytes=0, errors={}).to_dict()
NOISY = {"times_s": {"prefill": [3.0, 3.0, 3.1], "decode": [1.0, 2.0, 3.0, 4.0]}}


def trial(number: int, bpb: float, seconds: float, *, kv: int = 4, width: int = 64, params: int = 1000, **changes: object) -> Evaluation:
    """A complete trial that takes `seconds` for a byte, a prompt and a request."""
    config = SLMConfig(
        vocab_size=512, d_model=width, num_layers=2, attention=attention_kind(4, kv), num_heads=4, num_kv_heads=kv, head_dim=16
    )
    evaluation = Evaluation(
        trial=number,
        state="complete",
        config=config,
        params=params,
        bytes_per_token=2.0,
        decode_s_per_token=2 * seconds,
        prefill_s=seconds,
        request_s=seconds,
        val_bpb=bpb,
        val_bpb_stderr=0.01,
        measurement=STEADY,
    )
    return evaluation.evolve(**changes)


def text(evaluations: Sequence[Evaluation], speed: Speed = "request") -> str:
    return "\n".join(findings(evaluations, speed))


def test_nothing_yet() -> None:
    assert text([]) == "No trial has been made yet.\nThere is no front: no trial has both a score and a time."


def test_no_complete_trial() -> None:
    states = ["infeasible", "failed", "diverged", "running"]
    found = text([trial(i, 2.0, 1.0, state=state, val_bpb=None) for i, state in enumerate(states)])
    assert "0 of 4 trials completed; 1 broke a limit, 1 failed, 1 diverged in training, 1 not finished." in found
    assert "no front" in found


def test_one_trial() -> None:
    found = text([trial(7, 2.5, 0.004, kv=2)])
    assert "1 of 1 trial completed." in found
    assert "Trial 7, GQA with 2 key/value heads of 1.00 k parameters, is both the fastest and the most accurate" in found
    assert "(2.500 at 4.00 ms a request)" in found
    assert "End to end" not in found


def test_a_single_winner_among_many() -> None:
    found = text([trial(0, 2.0, 0.1), *(trial(i, 2.5 + i / 10, 0.2 + i) for i in range(1, 4))])
    assert "Trial 0, MHA with 4 heads" in found
    assert "0 of the 3 other candidates are within two standard errors" in found


def test_the_leader_and_the_trade() -> None:
    front = [trial(0, 3.0, 0.001, kv=1), trial(1, 2.2, 0.002, kv=2), trial(2, 2.0, 0.1, kv=4)]
    found = text([*front, trial(3, 3.1, 0.05)])
    assert "Below 100.0 ms a request, trial 1 has the best bits per byte" in found
    assert "(2.200 at 2.00 ms a request)" in found
    assert "MQA (1.00 ms), then GQA with 2 key/value heads (2.00 ms), then MHA with 4 heads (100 ms)" in found
    assert "33 % fewer bits per byte for 100 times the time" in found


def test_decoding_is_told_in_characters_a_second() -> None:
    found = text([trial(0, 3.0, 0.001), trial(1, 2.2, 0.002), trial(2, 2.0, 0.1)], "decode")
    assert "Above 10.00 characters a second, trial 1 has the best bits per byte" in found
    assert "(2.200 at 500 characters a second, 4.00 ms a token)" in found


@given(seed=st.integers(0, 10_000), speed=st.sampled_from(["decode", "request"]))
def test_the_limit_named_really_separates(seed: int, speed: Speed) -> None:
    rng = random.Random(seed)
    evaluations = [trial(i, rng.uniform(2, 3), 10 ** rng.uniform(-3, -2.9)) for i in range(8)]
    found = re.search(r"(Above|Below) ([\d.,]+) .*?, trial (\d+) has the best", text(evaluations, speed))
    if found is None:
        return
    limit = float(found[2].replace(",", ""))
    seconds = 1 / limit if found[1] == "Above" else limit / 1e3
    allowed = [e for e in evaluations if e.objectives(speed)[1] < seconds]
    assert min(allowed, key=lambda e: e.objectives(speed)).trial == int(found[3])


def test_ties_are_told_as_what_they_are() -> None:
    same = [trial(i, 2.5, 0.01) for i in range(10)]
    found = text(same)
    assert "Trial 0, MHA with 4 heads of 1.00 k parameters, is both the fastest and the most accurate" in found
    assert "9 of the 9 other candidates are within two standard errors" in found
    assert "Kendall" not in found
    assert "over-represented" not in found


def test_repeats_do_not_count_twice() -> None:
    first = trial(0, 2.5, 0.01)
    again = first.evolve(trial=1, duplicate_of=0)
    assert distinct([first, again]) == [first]
    assert distinct([again]) == [again]
    found = text([first, again, trial(2, 2.9, 0.02)])
    assert "3 of 3 trials completed; 1 repeated an earlier architecture" in found
    assert "The only other candidate is not within" in found


def test_a_surplus_on_the_front_is_weighed() -> None:
    front = [trial(i, 2.5 - i / 10, 0.01 * 2**i, kv=2) for i in range(5)]
    rest = [trial(10 + i, 3.0 + i / 100, 1.0 + i, kv=4) for i in range(30)]
    found = text([*front, *rest])
    assert re.search(r"attention = GQA: 5 of 5 there, 5 of 35 among all candidates .*more than chance explains", found)
    # 3 of 3 against 4 of 12 is rare by itself (0.018), but not as the rarest of four comparisons.
    three = [trial(i, 2.5 - i / 10, 0.01 * 2**i, kv=2) for i in range(3)]
    others = [trial(10 + i, 3.0 + i / 100, 1.0 + i, kv=2 if i == 0 else 4, width=(48, 64)[i % 2]) for i in range(9)]
    assert re.search(
        r"3 of 3 there, 4 of 12 among .* probability 0\.018, the smallest .* which chance alone could give", text([*three, *others])
    )
    mixed = [trial(i, 2.5 - i / 10, 0.01 * 2**i, kv=(2, 4)[i % 2]) for i in range(5)]
    balanced = [trial(10 + i, 3.0 + i / 100, 1.0 + i, kv=(2, 4)[i % 2]) for i in range(30)]
    assert "which chance alone could give" in text([*mixed, *balanced])


def test_size_as_a_baseline() -> None:
    larger_is_better = [trial(i, 3.0 - i / 10, 0.01 * (i + 1), params=1000 * (i + 1)) for i in range(9)]
    found = text(larger_is_better)
    assert "Kendall tau +1.00 against accuracy and +1.00 against time" in found
    assert "picks that same model" in found
    wide = trial(20, 3.2, 0.001, params=10**6)
    assert re.search(r"would pick trial 20 and lose 1\.0 bits per byte", text([*larger_is_better, wide]))


def test_order_within_noise_is_counted() -> None:
    # Neighbours differ by 0.1, then 0.012: the error of a difference is 0.01 * sqrt(2) = 0.0141.
    front = [trial(0, 2.7, 0.01), trial(1, 2.6, 0.02), trial(2, 2.588, 0.04)]
    found = text(front)
    assert (
        "Of the 2 pairs of neighbours on the front, 1 is closer in bits per byte than two standard errors of the difference, 1 closer"
        in found
    )
    assert "1 of the 2 other candidates is within two standard errors of the best" in found
    assert "may be equal" in text(front[1:])
    assert "In the two models on the front, bits per byte differ by two standard errors or more" in text(front[:2])
    assert "1 of 3 candidates have no standard error" in text([*front[:2], front[2].evolve(val_bpb_stderr=None)])


@pytest.mark.parametrize("speed", ["prefill", "decode", "request"])
def test_the_estimate_stands_beside_its_baseline(speed: Speed) -> None:
    def estimate(seconds: float) -> dict[str, float]:
        return {"prefill_s": seconds, "decode_s_per_token": 2 * seconds, "request_s": seconds}

    trials = [trial(i, 2.0 + i, 0.01 * (i + 1), estimate={**estimate(i + 1), "baseline": estimate(9 - i)}) for i in range(8)]
    assert "orders the 8 measured times with Kendall tau +1.00, its baseline" in text(trials, speed)
    assert "cache alone, with −1.00;" in text(trials, speed)
    assert "roofline" not in text(trials[:7], speed)
    assert "roofline" not in text([e.evolve(estimate=None) for e in trials], speed)


def test_noisy_measurements_are_counted() -> None:
    assert "1 of 2 measurements is noisy" in text([trial(0, 2.5, 0.01), trial(1, 2.4, 0.02, measurement=NOISY)])
    assert "noisy" not in text([trial(0, 2.5, 0.01)])
    assert "No time here was measured on a device." in text([trial(0, 2.5, 0.01, measurement=None)])


def test_a_slow_machine_is_told() -> None:
    quiet = {"times_s": {"decode": [0.01] * 5}, "reference_best_s": 0.001}
    assert "slow" not in text([trial(0, 2.5, 0.01, measurement=quiet | {"reference_s": [0.00124] * 5})])
    assert "1 of 1 measurement is noisy, or taken" in text([trial(0, 2.5, 0.01, measurement=quiet | {"reference_s": [0.00126] * 5})])


@pytest.mark.parametrize(
    ("record", "expected"),
    [(None, False), ({}, False), ({"times_s": None}, False), ({"times_s": {"decode": []}}, False), (STEADY, False), (NOISY, True)],
)
def test_what_counts_as_noisy(record: dict[str, object] | None, expected: bool) -> None:
    assert is_noisy(record) is expected


@given(st.dictionaries(st.sampled_from(["prefill", "decode"]), st.lists(st.floats(1.0, 1.5), min_size=1, max_size=9), min_size=1))
def test_noisy_agrees_with_the_measurement_itself(times_s: dict[str, list[float]]) -> None:
    measurement = Measurement.from_dict({**MEASUREMENT, "times_s": times_s})
    assert is_noisy(measurement.to_dict()) == bool(measurement.noisy)
    assert is_noisy(Evaluation(trial=0, measurement=measurement.to_dict()).measurement) == bool(measurement.noisy)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_kendall_tau_by_definition(pairs: list[tuple[int, int]]) -> None:
    tau = kendall_tau([x for x, _ in pairs], [y for _, y in pairs])
    combos = list(itertools.combinations(pairs, 2))
    products = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in combos]
    balance = sum(p > 0 for p in products) - sum(p < 0 for p in products)
    tied_x, tied_y = (sum(a[k] == b[k] for a, b in combos) for k in (0, 1))
    if len(combos) in (tied_x, tied_y):
        assert tau is None
    else:
        assert tau == pytest.approx(balance / math.sqrt((len(combos) - tied_x) * (len(combos) - tied_y)))
        assert -1 - 1e-12 <= tau <= 1 + 1e-12


def test_kendall_tau_of_orders() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(2 / 3)
    assert kendall_tau([1], [1]) is None


def test_chance_by_enumeration() -> None:
    total, marked, draws = 7, 3, 4
    hits = [sum(i < marked for i in drawn) for drawn in itertools.combinations(range(total), draws)]
    for least in range(draws + 1):
        assert chance_of_at_least(least, draws, marked, total) == pytest.approx(sum(h >= least for h in hits) / len(hits))


@given(seed=st.integers(0, 10_000), count=st.integers(0, 20), speed=st.sampled_from(["prefill", "decode", "request"]))
def test_any_run_gives_whole_sentences(seed: int, count: int, speed: Speed) -> None:
    rng = random.Random(seed)
    evaluations = [
        trial(
            i,
            rng.choice([2.0, 2.1, rng.uniform(2, 3)]),
            rng.choice([0.1, rng.uniform(1e-6, 1e3)]),
            kv=rng.choice([1, 2, 4]),
            params=rng.randint(1, 3),
            state=rng.choice(["complete", "complete", "failed"]),
            val_bpb_stderr=rng.choice([0.0, 0.1]),
            duplicate_of=rng.choice([None, None, rng.randint(0, 30)]),
        )
        for i in range(count)
    ]
    for changes in ({}, {"config": None}, {"params": None}, {"val_bpb_stderr": None}):
        for sentence in findings([e.evolve(**changes) for e in evaluations], speed):
            assert re.fullmatch(r"\S.*[.]", sentence)
            assert "None" not in sentence
            assert "nan" not in sentence
    assert bool(front_of(evaluations, speed)) == ("no front" not in text(evaluations, speed))


def test_what_rounding_cost_is_told_by_precision() -> None:
    def rounded(number: int, bpb: float, before: float, precision: str) -> Evaluation:
        return trial(number, bpb, 0.01 * (number + 1), weights=precision, score={"val_bpb": bpb, "val_bpb_fp32": before})

    found = text([trial(0, 2.9, 0.01), rounded(1, 2.5, 2.48, "int4"), rounded(2, 2.41, 2.4, "int4"), rounded(3, 2.35, 2.3501, "int8")])
    assert "Rounding trained weights to int4 changed bits per byte by +0.015 in the median of 2 candidates, +0.010 to +0.020." in found
    assert "Rounding trained weights to int8 changed bits per byte by −0.00010 in the one candidate that has them." in found
    assert "of 1.00 k parameters in int4 (2.500 at" in found
    assert "Rounding" not in text([trial(0, 2.9, 0.01)])


def test_a_precision_may_be_what_the_front_has_in_common() -> None:
    front = [trial(i, 2.5 - i / 10, 0.01 * 2**i, weights="int8") for i in range(5)]
    rest = [trial(10 + i, 3.0 + i / 100, 1.0 + i) for i in range(30)]
    assert "weights = int8: 5 of 5 there, 5 of 35 among all candidates" in text([*front, *rest])


def test_findings_over_devices_say_which_model_wins_where() -> None:
    def on_two(trial: int, bpb: float, here_s: float, there_s: float) -> Evaluation:
        return Evaluation(trial=trial, state="complete", val_bpb=bpb, request_s=here_s).put("there", request_s=there_s)

    apart = [on_two(0, 3.0, 1.0, 1.0), on_two(1, 2.1, 2.0, 11.0), on_two(2, 2.0, 12.0, 12.0), on_two(3, 2.3, 9.0, 1.2)]
    sentences = findings(apart, "request", ["here", "there"])
    assert sentences[:2] == ["4 of 4 trials completed.", "The default choice is trial 1 on here and trial 3 on there."]
    assert "Of 4 models on some front, 3 are on every one, trial 3 only on there." in sentences
    assert any(sentence.startswith("On there: Below ") for sentence in sentences)
    alike = [on_two(i, 3.0 - i / 10, 1.0 + i, 2.0 + 2 * i) for i in range(9)]
    sentences = findings(alike, "request", ["here", "there"])
    assert "The front has the same 9 models on every device." in sentences
    assert "The times on here and there order 9 candidates with Kendall tau +1.00 (1: alike)." in sentences
    assert findings([], "request", ["here", "there"])[-1].startswith("There is no front")


def test_the_noise_between_trainings_is_told_beside_the_error_over_documents() -> None:
    noise = Noise(sigma=0.01, low=0.006, high=0.0287, trainings=6, trials=(0, 2), diverged=1)
    front = [trial(0, 2.7, 0.01), trial(1, 2.6, 0.02), trial(2, 2.58, 0.04)]
    found = "\n".join(findings(front, "request", noise=noise))
    assert (
        "the standard deviation of bits per byte between trainings is 0.010 (from 6 trainings of trials 0 and 2, 1 more diverged; so few "
        "say only that it is between 0.0060 and 0.029, with 95 % confidence)."
    ) in found
    assert "Of the 2 pairs of neighbours on the front, 1 is closer than 0.028 (two standard errors of a difference between seeds)" in found
    assert "Of the 2 pairs of neighbours on the front, 1 is closer in bits per byte than two standard errors of the difference" in found
    apart = dataclasses.replace(noise, sigma=0.001)
    assert "Neighbours on the front differ by 0.0028 (" in "\n".join(findings(front, "request", noise=apart))
    assert "seed" not in text(front)


def test_stopped_trials_and_twins_are_counted() -> None:
    stopped = [
        trial(i, 2.0, 0.001, state="stopped", val_bpb=None, val_bpb_stderr=None, score={"rungs": [{"train_bytes": size, "val_bpb": 2.0}]})
        for i, size in enumerate((64_000, 64_000, 256_000), start=10)
    ]
    twin = trial(0, 2.5, 0.01)
    assert twin.config is not None
    twin = twin.evolve(score={"val_bpb": 2.5, "twin": twin.config.to_dict()})
    found = text([twin, trial(1, 2.4, 0.02), *stopped])
    assert "2 of 5 trials completed; 2 were stopped at 64.0 kB of text, 1 was stopped at 256 kB of text." in found
    assert "1 of 2 scores is that of a twin, a smaller model of the same kind" in found
    assert "Every score is that of a twin" in text([twin, *stopped])
    assert "twin" not in text([trial(1, 2.4, 0.02)])


def test_a_loss_on_tasks_is_called_so() -> None:
    def on_tasks(number: int, loss: float, seconds: float) -> Evaluation:
        task = {"name": "pairs.jsonl", "kind": "pairs", "loss": loss, "loss_stderr": 0.01, "accuracy": 1 - loss / 2}
        return trial(number, 2.0, seconds, params=1000 * (number + 1), score={"val_bpb": 2.0, "task": task})

    found = text([on_tasks(i, 0.9 - i / 20, 0.01 * 2**i) for i in range(9)])
    assert "has the smallest loss on pairs.jsonl measured here" in found
    assert re.search(r"trades \d+ % less loss on pairs.jsonl for 256 times the time", found)
    assert "of the smallest loss on pairs.jsonl (0.500 ± 0.010 (75 %)), over the tasks scored." in found
    assert "bits per byte" not in found
    assert "trades" not in text([on_tasks(0, 0.0, 0.01), on_tasks(1, -1.0, 0.02)])
