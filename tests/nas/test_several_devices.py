"""A search over several devices, on other machines and several trials at once: two null devices with real training."""

import dataclasses
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from search_helpers import SPACE_FILE, Listener, contents, repeated_steps, run_search, settings, write_speeches

from nas.corpus import Corpus, load_corpus
from nas.errors import InvalidRun, UserError
from nas.evaluation import Evaluation
from nas.export import export_trial
from nas.front import front_of, on_each
from nas.measuring import farm_size, is_elsewhere, servers
from nas.models import NamedModel, named_model
from nas.proposals import open_study, propose
from nas.run import Run
from search_spaces.config import SLMConfig
from search_spaces.space import Space, load_space
from targets.measurement import Measurement, Timing
from targets.null import NullTarget
from targets.program import Program, Sample
from targets.spec import DeviceSpec, load_spec
from targets.target import Target, TargetError

# Reads slowly and computes fast: its order of models is another than that of the null device.
SLOW_MEMORY = dataclasses.replace(load_spec("null"), name="other", read_bytes_per_s=2e8, flops_per_s=1e12)
BOTH = ("null", "other")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(str(write_speeches(tmp_path_factory.mktemp("text") / "speeches.jsonl")))


def two() -> list[Target]:
    return [NullTarget(load_spec("null")), NullTarget(SLOW_MEMORY)]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Run:
    """Six trials on both devices."""
    run, _ = run_search(tmp_path_factory.mktemp("both") / "run", corpus, targets=two())
    return run


class Elsewhere(NullTarget):
    """A null device on another machine, with `parallel` servers; measuring takes as long as told, in no order."""

    remote = True

    def __init__(self, spec: DeviceSpec, parallel: int = 1, seed: int | None = None) -> None:
        super().__init__(spec)
        self.parallel = parallel
        self.measured: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        self._lock, self._rng = threading.Lock(), random.Random(seed) if seed is not None else None

    def measure(self, artifact: Path, sample: Sample, timing: Timing) -> Measurement:
        with self._lock:
            self.measured[artifact.parent.name] += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            wait_s = self._rng.uniform(0.0, 0.06) if self._rng is not None else 0.0
        self.arrived()
        time.sleep(wait_s)
        with self._lock:
            self.at_once -= 1
        return super().measure(artifact, sample, timing)

    def arrived(self) -> None:
        """Called in the middle of a measurement."""


# --- what a trial comes to --------------------------------------------------------------------


def test_every_model_is_measured_on_each_device_and_trained_once(tmp_path: Path, corpus: Corpus, searched: Run) -> None:
    alone = {}
    for target in two():
        run, _ = run_search(tmp_path / target.spec.name, corpus, target=target)
        alone[target.spec.name] = [e.evolve(stage_s={}) for e in run.evaluations()]
    found = [e.evolve(stage_s={}) for e in searched.evaluations()]
    assert on_each(found, BOTH) == alone  # the first ten proposals are drawn by lot, whatever there is to learn
    assert all(e.state == "complete" and set(e.others) == {"other"} for e in found)
    steps = Counter((entry["step"], entry.get("device")) for entry in searched.log_entries() if entry["event"] == "done")
    assert (steps["train", None], steps["measure", "null"], steps["measure", "other"]) == (6, 6, 6)
    assert all({"compile", "measure", "train"} <= e.stage_s.keys() for e in searched.evaluations())


def test_there_is_a_front_on_each_device_and_a_joint_one(searched: Run) -> None:
    evaluations = searched.evaluations()
    values = json.loads(searched.front_path.read_text())
    joint = {model["trial"] for model in values["front"]}
    assert joint == {e.trial for e in front_of(evaluations, "request")}
    assert list(values["devices"]) == list(BOTH)
    for device, seen in on_each(evaluations, BOTH).items():
        front = [e.trial for e in front_of(seen, "request")]
        assert values["devices"][device]["front"] == front
        assert values["devices"][device]["chosen"] in front
        assert set(front) <= joint
    for model in values["front"]:
        e = evaluations[model["trial"]]
        assert model["request_s"] == model["devices"]["null"]["request_s"] == e.request_s
        assert model["devices"]["other"]["request_s"] == e.others["other"].request_s
    assert {int(p.stem) for p in (searched.path / "weights").glob("*.safetensors")} == joint
    export_trial(searched, values["chosen"], searched.path.parent / "exported")


def test_the_sampler_is_told_the_time_on_each_device(searched: Run) -> None:
    with open_study(None, searched.path, f"edgewise-{searched.manifest['id']}", 2) as (study, _):
        told = [t.values for t in study.get_trials()]
    assert told == [list(e.objectives("request")) for e in searched.evaluations()]
    assert {len(values) for values in told} == {3}


def test_a_limit_holds_on_every_device(tmp_path: Path, corpus: Corpus, searched: Run) -> None:
    there = sorted(e.others["other"].decode_s_per_token or 0.0 for e in searched.evaluations())
    limit_s = there[2]
    _, outcome = run_search(tmp_path / "run", corpus, targets=two(), given=settings(max_latency_s=limit_s))
    states = Counter(e.state for e in outcome.evaluations)
    assert states == {"complete": 3, "infeasible": 3}
    for e in outcome.evaluations:
        assert e.decode_s_per_token is not None
        assert e.decode_s_per_token <= limit_s
        if e.state == "infeasible":
            assert e.reason is not None
            assert "on 'other' is above --max-latency" in e.reason
            assert e.score is None


def test_memory_that_one_device_lacks_rules_a_model_out(tmp_path: Path, corpus: Corpus) -> None:
    small = NullTarget(dataclasses.replace(SLOW_MEMORY, memory_bytes=10_000))
    run, outcome = run_search(tmp_path / "run", corpus, trials=2, targets=[NullTarget(load_spec("null")), small])
    assert all(e.state == "infeasible" and "above the memory of 'other'" in (e.reason or "") for e in outcome.evaluations)
    assert {entry["step"] for entry in run.log_entries()} == {"count"}
    with open_study(None, run.path, f"edgewise-{run.manifest['id']}", 2) as (study, _):
        assert [t.values for t in study.get_trials()] == [[8.0, 1.0, 1.0]] * 2


class Broken(NullTarget):
    """A device on which nothing compiles."""

    def compile(self, program: Program, out_dir: Path) -> Path:
        raise TargetError("no room for it")


def test_a_device_that_fails_is_named_and_the_others_have_measured(tmp_path: Path, corpus: Corpus) -> None:
    targets = [NullTarget(load_spec("null")), Broken(SLOW_MEMORY)]
    run, outcome = run_search(tmp_path / "run", corpus, trials=1, targets=targets)
    (only,) = outcome.evaluations
    assert (only.state, only.reason) == ("failed", "other: no room for it")
    assert only.measurement is not None
    assert only.others["other"].measurement is None
    assert not (run.path / "artifacts").exists()


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([SLOW_MEMORY], "was made with --target null, other, not other"),
        ([SLOW_MEMORY, load_spec("null")], "not other, null; use the same"),
        ([load_spec("null"), dataclasses.replace(SLOW_MEMORY, cores=7)], r"was made with another 'other' \(cores 1, not 7\)"),
    ],
    ids=["fewer", "order", "machine"],
)
def test_a_run_keeps_its_devices(corpus: Corpus, searched: Run, specs: list[DeviceSpec], message: str) -> None:
    before = contents(searched.path)
    with pytest.raises(InvalidRun, match=message):
        run_search(searched.path, corpus, trials=7, targets=[NullTarget(spec) for spec in specs])
    assert contents(searched.path) == before


def test_two_devices_of_one_name_are_refused(tmp_path: Path, corpus: Corpus) -> None:
    with pytest.raises(UserError, match="target 'null' is there twice"):
        run_search(tmp_path / "run", corpus, targets=[NullTarget(load_spec("null"))] * 2)


# --- elsewhere, and several at once -----------------------------------------------------------


def test_who_is_elsewhere_and_how_many_there_are() -> None:
    farm = Elsewhere(SLOW_MEMORY, parallel=6)
    board = Elsewhere(SLOW_MEMORY)
    local = NullTarget(load_spec("null"))
    assert [is_elsewhere(t) for t in (farm, board, local)] == [True, True, False]
    assert [servers(t) for t in (farm, board, local)] == [6, 1, 1]
    assert [farm_size(targets) for targets in ([local], [board, local], [local, farm, board])] == [1, 1, 6]
    assert farm_size([Elsewhere(SLOW_MEMORY, parallel=1000)]) == 64
    with pytest.raises(UserError, match="ahead=65 is not within 1 and 64"):
        settings(ahead=65)


def test_another_machine_measures_while_this_one_trains(tmp_path: Path, corpus: Corpus, searched: Run) -> None:
    done = threading.Event()

    class Seen(Elsewhere):
        def arrived(self) -> None:
            done.set()

    def wait(trial: int, stage: str) -> None:
        if stage == "train":
            assert done.wait(30)  # measured any later, this would never be set

    targets = [NullTarget(load_spec("null")), Seen(SLOW_MEMORY)]
    run, _ = run_search(tmp_path / "run", corpus, targets=targets, view=Listener(wait))
    assert contents(run.path) == contents(searched.path)
    assert not (run.path / "artifacts").exists()
    times = [e["time"] for e in run.log_entries()]
    assert times == sorted(times)


def test_a_farm_measures_as_many_at_once_as_it_has_servers(tmp_path: Path, corpus: Corpus) -> None:
    meet = threading.Barrier(6, timeout=60)

    class Farm(Elsewhere):
        def arrived(self) -> None:
            meet.wait()  # nobody goes on until six are here

    farm = Farm(SLOW_MEMORY, parallel=6)
    run, outcome = run_search(tmp_path / "run", corpus, trials=6, target=farm, given=settings(ahead=farm_size([farm])))
    assert [e.state for e in outcome.evaluations] == ["complete"] * 6
    assert farm.most_at_once == 6
    assert max(farm.measured.values()) == 1
    assert run.manifest["settings"]["ahead"] == 6


def test_no_device_measures_more_at_once_than_it_has_servers(tmp_path: Path, corpus: Corpus) -> None:
    farm = Elsewhere(dataclasses.replace(SLOW_MEMORY, name="farm"), parallel=2, seed=0)
    run_search(tmp_path / "run", corpus, trials=6, target=farm, given=settings(ahead=5))
    assert farm.most_at_once <= 2


@pytest.fixture(scope="module")
def ahead_of(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> dict[str, bytes]:
    """The files of fourteen trials, four under way at once, on two devices of which one is elsewhere."""
    path = tmp_path_factory.mktemp("ahead") / "run"
    run_search(path, corpus, trials=14, targets=_mixed(0), given=_ahead())
    return contents(path)


def _ahead(**changes: Any) -> Any:
    # More trials than the sampler draws by lot, so that it learns, and trials of no cost.
    return settings(ahead=4, budget_bytes=1500, **changes)


def _mixed(seed: int) -> Sequence[Target]:
    return [NullTarget(load_spec("null")), Elsewhere(SLOW_MEMORY, parallel=4, seed=seed)]


def test_which_measurement_is_ready_first_changes_nothing(tmp_path: Path, corpus: Corpus, ahead_of: dict[str, bytes]) -> None:
    run_search(tmp_path / "run", corpus, trials=14, targets=_mixed(1), given=_ahead())
    assert contents(tmp_path / "run") == ahead_of


def test_a_proposal_sees_the_trials_that_had_ended_and_no_other(tmp_path: Path, corpus: Corpus, ahead_of: dict[str, bytes]) -> None:
    drawn = [json.loads(ahead_of[f"trials/{k:05d}.json"])["params_drawn"] for k in range(14)]
    run, _ = run_search(tmp_path / "run", corpus, trials=14, targets=_mixed(2), given=_ahead())
    space = load_space(SPACE_FILE)
    with open_study(None, run.path, f"edgewise-{run.manifest['id']}", 2) as (study, _):
        assert [dict(propose(study, space, "tpe", 0, k, ahead=4).params) for k in range(14)] == drawn
        assert [dict(propose(study, space, "tpe", 0, k, ahead=1).params) for k in range(14)] != drawn


class Killed(BaseException):
    """Stands for the end of the process: nothing in the program catches it."""


def test_ended_at_any_stage_with_several_under_way_it_goes_on_to_the_same_end(
    tmp_path: Path, corpus: Corpus, ahead_of: dict[str, bytes]
) -> None:
    rng = random.Random(3)
    for session in itertools.count():
        left = rng.randint(8, 24)

        def end(trial: int, stage: str, left: list[int] = [left]) -> None:  # noqa: B006  # one list a session
            left[0] -= 1
            if left[0] < 0 and stage != "report":
                raise Killed

        try:
            run, _ = run_search(tmp_path / "run", corpus, trials=14, targets=_mixed(session), view=Listener(end), given=_ahead())
            break
        except Killed:
            assert session < 60
    assert session > 3
    assert contents(run.path) == ahead_of
    assert repeated_steps(run) == []


def test_an_equal_model_under_way_is_waited_for(tmp_path: Path, corpus: Corpus) -> None:
    values = load_space(SPACE_FILE).to_dict()
    values["parameters"] |= {"vocab_size": 300, "num_layers": 1, "activation": "relu"}
    space = Space.from_dict(values)
    farm = Elsewhere(SLOW_MEMORY, parallel=4, seed=0)
    run, outcome = run_search(tmp_path / "run", corpus, trials=16, space=space, target=farm, given=_ahead())
    copies = [e for e in outcome.evaluations if e.duplicate_of is not None]
    assert any(e.trial - (e.duplicate_of or 0) < 4 for e in copies)  # of one that was under way
    different = [e for e in outcome.evaluations if e.duplicate_of is None]
    assert len({e.config.key for e in different if e.config is not None}) == len(different)
    assert farm.measured.total() == len(different)
    assert Counter(entry["step"] for entry in run.log_entries() if entry["event"] == "start")["train"] == len(different)


def test_another_number_at_once_is_another_run(tmp_path: Path, corpus: Corpus) -> None:
    run_search(tmp_path / "run", corpus, trials=1, given=settings(ahead=2))
    with pytest.raises(InvalidRun, match="was made with --ahead 2, not 3; use the same to go on with it"):
        run_search(tmp_path / "run", corpus, trials=1, given=settings(ahead=3))


def test_time_that_is_up_leaves_what_is_under_way_for_the_next_session(tmp_path: Path, corpus: Corpus) -> None:
    run, outcome = run_search(tmp_path / "run", corpus, trials=None, timeout_s=1e-6, given=_ahead(), targets=_mixed(0))
    assert outcome.evaluations == ()

    def slow(trial: int, stage: str) -> None:
        if stage == "train":
            time.sleep(0.8)

    run, outcome = run_search(tmp_path / "run", corpus, trials=None, timeout_s=0.7, given=_ahead(), targets=_mixed(0), view=Listener(slow))
    assert [e.trial for e in outcome.evaluations] == [0]
    assert run.load(1) is not None
    assert not (run.path / "artifacts").exists()


# --- references -------------------------------------------------------------------------------


TINY = SLMConfig(vocab_size=500, d_model=16, num_layers=1, num_heads=2, ffn_dim=32, context=1024)


def known(name: str = "known", config: SLMConfig = TINY, folder: Path | None = None) -> NamedModel:
    return NamedModel(name=name, config=config, folder=folder, exact_tokens=config.context)


def test_a_reference_is_measured_once_on_every_device_and_is_no_trial(tmp_path: Path, corpus: Corpus, searched: Run) -> None:
    farm = Elsewhere(SLOW_MEMORY)
    targets = [NullTarget(load_spec("null")), farm]
    for _ in range(2):
        run, outcome = run_search(tmp_path / "run", corpus, trials=2, targets=targets, references=[known("a/../b")])
    assert [e.trial for e in outcome.evaluations] == [0, 1]
    (name,) = run.references()
    assert name == "a-..-b"
    e = run.references()[name]
    assert (e.state, e.config, e.val_bpb) == ("complete", TINY, None)
    assert e.decode_s_per_token != e.others["other"].decode_s_per_token
    assert farm.measured.total() == 3
    values = json.loads(run.front_path.read_text())
    assert [r["name"] for r in values["references"]] == [name]
    assert name in run.report_path.read_text()
    for trial in range(2):
        assert run.trial_path(trial).read_bytes() == (searched.path / "trials" / f"{trial:05d}.json").read_bytes()


def test_a_reference_with_weights_is_scored_on_the_same_text(tmp_path: Path, corpus: Corpus, searched: Run) -> None:
    best = front_of(searched.evaluations(), "request")[-1]
    folder = export_trial(searched, best.trial, tmp_path / "mine")
    run, _ = run_search(tmp_path / "run", corpus, trials=1, references=[named_model(str(folder))])
    e = run.references()["mine"]
    assert e.state == "complete"
    # The candidates' tokens are counted on the training text, a reference's on the held-out text: windows differ a little.
    assert e.val_bpb == pytest.approx(best.val_bpb, rel=0.02)
    assert e.val_bpb_stderr is not None
    assert e.bytes_per_token == pytest.approx(best.bytes_per_token, rel=0.2)
    rounded, _ = run_search(tmp_path / "int4", corpus, trials=1, references=[named_model(str(folder))], given=settings(weights=("int4",)))
    assert rounded.references()["mine"].val_bpb not in (None, e.val_bpb)
    assert (rounded.references()["mine"].weight_bytes or 0) < (e.weight_bytes or 0) / 2


def test_a_reference_that_cannot_run_says_why_and_stops_nothing(tmp_path: Path, corpus: Corpus) -> None:
    view = Listener()
    short = dataclasses.replace(TINY, context=64)
    _, outcome = run_search(
        tmp_path / "run", corpus, trials=1, view=view, target=Broken(SLOW_MEMORY), references=[known("short", short), known("broken")]
    )
    assert "reference short: the request needs" in view.notes[0]
    assert view.notes[1] == "reference broken: no room for it"
    assert len(outcome.evaluations) == 1


def test_references_called_alike_are_refused(tmp_path: Path, corpus: Corpus) -> None:
    with pytest.raises(UserError, match="--reference same is there twice"):
        run_search(tmp_path / "run", corpus, trials=1, references=[known("same"), known("same")])


# --- records ----------------------------------------------------------------------------------


def test_a_record_reads_as_it_was_written_and_as_each_device_saw_it() -> None:
    e = Evaluation(trial=1, state="complete", val_bpb=2.0, bytes_per_token=2.0, request_s=1.0, decode_s_per_token=0.5, peak_bytes=7)
    both = e.put("pi5", request_s=3.0, decode_s_per_token=1.0)
    assert Evaluation.from_dict(json.loads(json.dumps(both.to_dict()))) == both
    assert both.on(None) == e
    assert (both.on("pi5").request_s, both.on("pi5").peak_bytes, both.on("pi5").val_bpb) == (3.0, None, 2.0)
    assert both.objectives("request") == (2.0, 1.0, 3.0)
    assert both.objectives("decode") == (2.0, 0.25, 0.5)
    assert not both.is_ranked("prefill")
    assert not e.put("pi5").is_ranked("request")
    assert both.put(None, request_s=9.0).on("pi5") == both.on("pi5")
    for wrong in ({"pi5": {"speed": 1}}, {"pi5": 3}, {"pi5": {"peak_bytes": 1.5}}, 7):
        with pytest.raises(InvalidRun):
            Evaluation.from_dict({**e.to_dict(), "others": wrong})
