import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.across import across
from nas.evaluation import Evaluation
from nas.front import choose, front_json, front_of, hypervolume, on_each, pareto_front
from nas.noise import Noise
from search_spaces.config import SLMConfig
from search_spaces.counting import params

coordinate = st.integers(0, 6).map(float) | st.floats(-10, 10) | st.sampled_from([math.nan, math.inf, -math.inf])
point_lists = st.integers(1, 3).flatmap(lambda n: st.lists(st.tuples(*[coordinate] * n), max_size=25))


def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def trial(number: int, bpb: float, seconds: float, **changes: object) -> Evaluation:
    evaluation = Evaluation(trial=number, state="complete", val_bpb=bpb, request_s=seconds)
    return evaluation.evolve(**changes)


@given(points=point_lists)
def test_front_agrees_with_comparing_every_pair(points: list[tuple[float, ...]]) -> None:
    finite = [i for i, p in enumerate(points) if all(map(math.isfinite, p))]
    beaten = {i for i in finite if any(dominates(points[j], points[i]) or (points[j] == points[i] and j < i) for j in finite)}
    expected = [i for i in finite if i not in beaten]
    assert pareto_front(points) == expected


@given(points=point_lists, seed=st.integers())
def test_front_does_not_depend_on_order(points: list[tuple[float, ...]], seed: int) -> None:
    shuffled = random.Random(seed).sample(points, len(points))
    assert sorted(points[i] for i in pareto_front(points)) == sorted(shuffled[i] for i in pareto_front(shuffled))


def test_front_of_known_points() -> None:
    assert pareto_front([(3, 1), (1, 3), (2, 2), (2, 3), (2, 2), (1, math.nan), (0, math.inf)]) == [0, 1, 2]
    assert pareto_front([]) == []
    with pytest.raises(ValueError, match="coordinates"):
        pareto_front([(1.0,), (1.0, 2.0)])


@given(points=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=12))
def test_hypervolume_counts_dominated_cells(points: list[tuple[int, int]]) -> None:
    reference = (7, 6)
    cells = itertools.product(range(reference[0]), range(reference[1]))
    dominated = sum(any(px <= x and py <= y for px, py in points) for x, y in cells)
    assert hypervolume(points, reference) == dominated


def test_hypervolume_edges() -> None:
    assert hypervolume([], (1, 1)) == 0
    assert hypervolume([(math.nan, 0), (2, 0)], (1, 1)) == 0
    assert hypervolume([(0.0, 0.0)], (2.0, 3.0)) == 6.0
    with pytest.raises(ValueError, match="reference"):
        hypervolume([(0, 0)], (math.inf, 1))


def test_front_of_evaluations_is_fastest_first_and_complete_only() -> None:
    evaluations = [
        trial(0, 2.0, 3.0),
        trial(1, 3.0, 1.0),
        trial(2, 2.5, 2.0),
        trial(3, 2.6, 2.5),
        trial(4, 1.0, 0.5, state="failed"),
        trial(5, 1.0, 0.5, val_bpb=None),
        trial(6, 2.5, 2.0),
    ]
    assert [e.trial for e in front_of(evaluations, "request")] == [1, 2, 0]
    assert front_of(evaluations, "decode") == []


def test_choice_is_the_knee() -> None:
    front = [trial(0, 3.0, 1.0), trial(1, 2.2, 2.0), trial(2, 2.1, 10.0), trial(3, 2.0, 100.0)]
    assert choose(front, "request") is front[1]
    assert choose(front[::-1], "request") is front[1]


def test_choice_is_on_the_front_and_does_not_depend_on_units() -> None:
    rng = random.Random(0)
    for _ in range(200):
        evaluations = [trial(i, rng.uniform(2, 3), 10 ** rng.uniform(-3, 0)) for i in range(rng.randint(1, 12))]
        front = front_of(evaluations, "request")
        chosen = choose(front, "request")
        assert chosen in front
        slower = [e.evolve(request_s=(e.request_s or 0) * 1000) for e in front]
        again = choose(slower, "request")
        assert chosen is not None
        assert again is not None
        assert again.trial == chosen.trial


def test_choice_without_a_knee() -> None:
    assert choose([], "request") is None
    only = trial(0, 2.0, 1.0)
    assert choose([only], "request") is only
    ends = [trial(0, 3.0, 1.0), trial(1, 2.0, 10.0)]
    assert choose(ends, "request") is ends[1]
    bulging_out = [trial(0, 3.0, 1.0), trial(1, 2.9, 9.0), trial(2, 2.0, 10.0)]
    assert choose(bulging_out, "request") is bulging_out[2]


# --- several devices --------------------------------------------------------------------------


def on_two(trial: int, bpb: float, here_s: float, there_s: float) -> Evaluation:
    return Evaluation(trial=trial, state="complete", val_bpb=bpb, request_s=here_s).put("there", request_s=there_s)


def test_the_joint_front_holds_that_of_every_device() -> None:
    rng = random.Random(5)
    evaluations = [on_two(i, rng.uniform(1, 2), rng.uniform(1, 9), rng.uniform(1, 9)) for i in range(60)]
    joint = {e.trial for e in front_of(evaluations, "request")}
    seen = on_each(evaluations, ["here", "there"])
    for device, place in (("here", 1), ("there", 2)):
        front = front_of(seen[device], "request")
        assert {e.trial for e in front} < joint
        assert [e.objectives("request")[1] for e in front] == sorted(evaluations[e.trial].objectives("request")[place] for e in front)


def test_the_joint_choice_weighs_devices_alike() -> None:
    # Trial 1 is the knee, however slow one of the devices is in all it does.
    for slow in (1.0, 1e3):
        found = [on_two(0, 3.0, 1.0, slow), on_two(1, 2.1, 1.5, 1.6 * slow), on_two(2, 2.0, 9.0, 8.0 * slow)]
        best = choose(found, "request")
        assert best is not None
        assert best.trial == 1
    two = choose([on_two(0, 2.0, 1.0, 5.0), on_two(1, 3.0, 5.0, 0.9)], "request")
    assert two is not None
    assert two.trial == 0  # of two, that of the fewest bits per byte


def test_across_says_on_which_device_a_model_wins() -> None:
    evaluations = [on_two(0, 3.0, 1.0, 1.0), on_two(1, 2.1, 2.0, 11.0), on_two(2, 2.0, 12.0, 12.0), on_two(3, 2.3, 9.0, 1.2)]
    found = across([*evaluations, on_two(4, 3.5, 9.0, 9.5)], "request", ["here", "there"])
    assert [e.trial for e in found.front] == [0, 3, 1, 2]
    assert found.chosen is evaluations[1]
    assert found.times[1] == ("2.00 s ★", "11.0 s •")
    assert found.times[3] == ("9.00 s", "1.20 s ★")


# --- what the JSON says -----------------------------------------------------------------------


def test_the_front_as_json_names_the_loss_its_noise_and_twins() -> None:
    config = SLMConfig(vocab_size=300, d_model=16, num_layers=1, num_heads=2)
    front = [trial(0, 3.0, 1.0), trial(1, 2.02, 2.0, score={"val_bpb": 2.02, "twin": config.to_dict()}), trial(2, 2.0, 3.0)]
    stopped = trial(3, 2.0, 0.5, state="stopped", val_bpb=None, score={"rungs": [{"train_bytes": 64_000, "val_bpb": 1.0}]})
    noise = Noise(sigma=0.01, low=0.005, high=0.03, trainings=6, trials=(0, 2))
    values = front_json([*front, stopped], "request", noise=noise)
    assert (values["objective"], values["noise"]["sigma"], values["noise"]["sigma_interval"]) == ("bits per byte", 0.01, [0.005, 0.03])
    assert [m["trial"] for m in values["front"]] == [0, 1, 2]
    assert [m["order_within_noise"] for m in values["front"]] == [False, True, True]
    assert [m["loss"] for m in values["front"]] == [m["val_bpb"] for m in values["front"]] == [3.0, 2.02, 2.0]
    assert [m["twin"] for m in values["front"]] == [None, {"params": params(config), "config": config.to_dict()}, None]
    plain = front_json(front, "request")
    assert plain["noise"] is None
    assert "order_within_noise" not in plain["front"][0]
