import html
import itertools
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nas.charts import AXES, design_figure, front_figures, hover, importance_figure
from nas.describe import significant
from nas.evaluation import Evaluation, write_whole
from nas.front import choose, front_of
from nas.noise import Noise
from nas.report import Reference, starts_among, write_report
from nas.run import Run
from nas.search import rewrite_report
from search_spaces.config import SLMConfig
from search_spaces.space import load_space
from targets.measurement import Measurement

EVIL = '<img src=x onerror="alert(1)"></script><b>&amp;'
MANIFEST = {
    "device": {"name": f"board {EVIL}", "cores": 2},
    "created": "2025-01-02 03:04",
    "corpus": {"name": "speeches", "sha256": "ab"},
    "settings": {"budget_bytes": 524_288, "speed": "decode"},
    EVIL: EVIL,
}


def run(count: int, seed: int = 0) -> list[Evaluation]:
    rng = random.Random(seed)
    evaluations = []
    for i in range(count):
        width, layers, kind = rng.choice([32, 64, 96]), rng.randint(1, 6), rng.choice(["mha", "mqa"])
        config = SLMConfig(vocab_size=512, d_model=width, num_layers=layers, attention=kind, num_heads=4, head_dim=16)
        params = 12 * layers * width * width + 512 * width
        base = Evaluation(trial=i, config=config, params=params, params_drawn={"width": width, "layers": layers, "kind": kind, EVIL: i % 3})
        if i % 7 == 3:
            evaluations.append(base.evolve(state="failed", reason=f"compile: {EVIL}", stage_s={"compile": 30.0}))
            continue
        token_s = params * 1e-9 * rng.uniform(1, 1.5)
        evaluations.append(
            base.evolve(
                state="complete",
                bytes_per_token=2.0,
                peak_bytes=5 * params,
                prefill_s=token_s * 50,
                decode_s_per_token=token_s,
                request_s=token_s * 200,
                val_bpb=3.5 - params * 1e-7 - rng.uniform(0, 0.3),
                val_bpb_stderr=0.02,
                stage_s={"train": 60.0, "compile": 6.0},
            )
        )
    return evaluations


class Page(HTMLParser):
    """The tags, visible text and scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def figures(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])  # type: ignore[no-any-return]


def page(tmp_path: Path, evaluations: list[Evaluation], **kwargs: Any) -> Page:
    path = write_report(f"run {EVIL}", evaluations, MANIFEST, tmp_path / "out" / "report.html", **kwargs)
    assert path == tmp_path / "out" / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Page:
    evaluations = run(40)
    reference = Reference(name=f"known {EVIL}", evaluation=evaluations[0].evolve(val_bpb=3.0))
    return page(tmp_path_factory.mktemp("report"), evaluations, references=[reference])


def test_page_is_whole_and_needs_no_network(forty: Page) -> None:
    assert not [attrs for _, attrs in forty.tags if {"src", "href", "data", "action"} & attrs.keys()]
    assert {tag for tag, _ in forty.tags}.isdisjoint({"link", "img", "iframe", "object"})
    assert "plotly.js v" in forty.scripts[1]
    assert len(forty.scripts) == 3
    policy = next(attrs["content"] for tag, attrs in forty.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_size_is_plotly_and_little_more(tmp_path: Path) -> None:
    size = write_report("run", run(200), {}, tmp_path / "r.html").stat().st_size
    assert 3e6 < size < 7e6


def test_text_from_outside_is_escaped_everywhere(forty: Page) -> None:
    # As text it is there, as markup nowhere: no such tags, and no `<` at all in the charts' data.
    assert f"run {EVIL}" in forty.text
    assert f"board {EVIL}" in forty.text
    assert f"compile: {EVIL}" in forty.text
    assert "onerror" not in {name for _, attrs in forty.tags for name in attrs}
    assert "<" not in forty.scripts[0]
    drawn = json.dumps(forty.figures, ensure_ascii=False)
    assert "<img" not in drawn
    assert "&lt;img" in drawn
    assert "‹img" in drawn


def test_headline_and_sections(forty: Page) -> None:
    for words in (
        "2025-01-02 03:04",
        "speeches",
        "524 kB",
        "34 of 40 complete",
        "How to read this",
        "Default choice",
        "What this run shows",
    ):
        assert words in forty.text


def test_figures_are_valid_plotly(forty: Page) -> None:
    import plotly.graph_objects as go

    figures = forty.figures
    assert figures["first"] == "chars"
    assert list(figures["front"]) == [axis.key for axis in AXES]
    for figure in (*figures["front"].values(), figures["design"], figures["importance"]):
        plain = json.loads(re.sub(r'"color": "--\w+"', '"color": "#123456"', json.dumps(figure)))
        go.Figure(plain)


def test_every_complete_trial_is_drawn_once_and_no_other() -> None:
    evaluations = run(40)
    complete = [e for e in evaluations if e.state == "complete"]
    for figure in front_figures(evaluations, "decode").values():
        marks = {t["name"]: t for t in figure["data"] if t["mode"] == "markers"}
        assert sum(len(t["x"]) for t in marks.values()) == len(complete)
        assert len(marks["default choice"]["x"]) == 1
        assert len(marks["on the front"]["x"]) + 1 == len(front_of(evaluations, "decode"))
        assert marks["other candidates"]["error_y"]["array"] == [0.02] * len(marks["other candidates"]["x"])


def test_the_plain_models_a_space_begins_with_have_their_own_mark() -> None:
    space = load_space("tiny")
    evaluations = [e.evolve(params_drawn=space.start(e.trial) or {"d_model": 48}) for e in run(40)]
    evaluations[1] = evaluations[1].evolve(params_drawn=evaluations[0].params_drawn)  # a start, but not of this trial
    starts = starts_among(evaluations, space)
    assert [s.evaluation.trial for s in starts] == [0, 2]  # trial 3 failed
    assert starts[0].name.startswith("plain, ")
    complete = sum(e.state == "complete" for e in evaluations)
    for figure in front_figures(evaluations, "decode", starts).values():
        marks = {t["name"]: t for t in figure["data"] if t["name"] != "best reachable"}
        assert "references" not in marks
        assert marks["plain models (starts)"]["text"] == [s.name for s in starts]
        filled = {m["hovertext"][i].split("<br>")[0] for n, m in marks.items() if "plain" not in n for i in range(len(m["x"]))}
        drawn = filled | {f"<b>Trial {s.evaluation.trial}</b>" for s in starts}
        assert len(drawn) == complete
        assert len(marks["other candidates"]["x"]) < complete - len(front_of(evaluations, "decode"))
    assert not starts_among(run(10), space)


def test_a_report_of_a_folder_marks_its_plain_models(tmp_path: Path) -> None:
    space = load_space("tiny")
    manifest = {**MANIFEST, "space": space.to_dict()}
    folder = Run(tmp_path, manifest)
    for e in run(8):
        write_whole(folder.trial_path(e.trial), json.dumps(e.evolve(params_drawn=space.start(e.trial) or {}).to_dict()))
    rewrite_report(folder)
    assert "plain models (starts)" in folder.report_path.read_text()


@pytest.mark.parametrize("axis", [a for a in AXES if a.key in ("chars", "request", "params")], ids=lambda a: a.key)
def test_step_line_is_the_best_reachable(axis: Any) -> None:
    evaluations = [e for e in run(40) if e.state == "complete"]
    figure = front_figures(evaluations, "decode")[axis.key]
    line = figure["data"][0]
    # Towards worse values the best so far holds until the next corner: speeds worsen to the left, everything else to the right.
    assert line["line"]["shape"] == ("vh" if axis.rate else "hv")
    corners = list(zip(line["x"], line["y"], strict=True))
    for x, y in corners:
        reachable = [e.val_bpb for e in evaluations if (axis.value(e) >= x if axis.rate else axis.value(e) <= x)]
        assert y == min(reachable)
    for (_, y0), (_, y1) in itertools.pairwise(corners):
        assert y1 >= y0 if axis.rate else y1 <= y0
    low, high = figure["layout"]["xaxis"]["range"]
    assert all(10**low * 0.999 <= x <= 10**high * 1.001 for x in line["x"])
    assert len(figure["layout"]["xaxis"]["tickvals"]) >= 4


def test_first_axis_is_the_searched_one(tmp_path: Path) -> None:
    for speed, first in (("decode", "chars"), ("prefill", "prefill"), ("request", "request")):
        shown = page(tmp_path, run(10), speed=speed)
        assert shown.figures["first"] == first
        pressed = [attrs["data-axis"] for tag, attrs in shown.tags if tag == "button" and attrs["aria-pressed"] == "true"]
        assert pressed == [first]


def test_axes_without_figures_have_no_button(tmp_path: Path) -> None:
    bare = [e.evolve(decode_s_per_token=None, peak_bytes=None) for e in run(10)]
    shown = page(tmp_path, bare, speed="request")
    assert list(shown.figures["front"]) == ["request", "prefill", "params"]


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_small_runs(tmp_path: Path, count: int) -> None:
    shown = page(tmp_path, run(count))
    assert f"{count - count // 4} of {count} complete" in shown.text
    assert re.search(r"Importance needs 8 different complete trials; there are \d", shown.text)
    assert shown.figures["importance"] is None
    assert "How to read this" in shown.text


def test_no_complete_trial(tmp_path: Path) -> None:
    shown = page(tmp_path, [e for e in run(40) if e.state == "failed"])
    assert "there is no model to choose" in shown.text
    assert "Nothing to draw yet" in shown.text
    assert f"compile: {EVIL}" in shown.text
    assert shown.figures == {"front": {}, "others": [], "first": "", "design": None, "importance": None}


def test_records_without_a_config_are_shown(tmp_path: Path) -> None:
    shown = page(tmp_path, [e.evolve(config=None, params_drawn={}, params=None) for e in run(12)])
    assert "architecture unknown" in shown.text
    assert "No drawn parameter is known to vary" in shown.text


def test_minutes_by_stage(forty: Page) -> None:
    # 34 complete trials: 60 s of training, 6 s of compiling; 6 failed: 30 s of compiling.
    for words in ("34.0 min", "6.4 min", "40.4 minutes in all, over 40 trials"):
        assert words in forty.text


def test_table_has_the_front_in_words(forty: Page) -> None:
    front = front_of(run(40), "decode")
    for e in front:
        assert f"{e.val_bpb:.3f} ± 0.020" in forty.text
    assert any(attrs.get("class") == "best" for tag, attrs in forty.tags if tag == "tr")


def test_the_front_is_taken_apart_the_default_choice_unfolded(tmp_path: Path) -> None:
    times_s = {"prefill": (1e-3,), "decode": (1e-4,)}
    profile = {phase: {"ffn": 4e-5, "attention": 3e-5, EVIL: 1e-6} for phase in times_s}
    record = Measurement(device="board", times_s=times_s, workspace_bytes={}, packed_bytes=0, errors={}, profile=profile).to_dict()
    evaluations = [e.evolve(measurement=record) for e in run(40)]
    shown = page(tmp_path, evaluations)
    front = front_of(evaluations, "decode")
    folds = [attrs for tag, attrs in shown.tags if tag == "details" and "class" not in attrs][: len(front)]
    assert sum("open" in attrs for attrs in folds) == 1
    assert all(f"trial {e.trial}" in shown.text for e in front)
    assert shown.text.count("between kernels") == 2 * len(front)
    assert EVIL in shown.text
    assert "device's best" in shown.text


def test_a_front_without_profiles_says_so(forty: Page) -> None:
    assert "no model of the front was measured on a device that can tell" in forty.text


def test_design_axes_are_those_that_vary() -> None:
    figure = design_figure(run(40), "decode")
    assert figure is not None
    dimensions = {d["label"]: d for d in figure["data"][0]["dimensions"]}
    assert {"bits per byte", "characters/s", "layers", "width", "attention", "kv heads"} <= dimensions.keys()
    assert "activation" not in dimensions
    assert dimensions["attention"]["ticktext"] == ["MHA", "MQA"]
    assert len({len(d["values"]) for d in dimensions.values()}) == 1
    assert design_figure(run(2), "decode") is None


def test_importance_bars_are_the_largest_first_from_above() -> None:
    figure = importance_figure(({"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 0.1, "b": 0.1, "c": 0.8}), most=2)
    assert [bar["y"] for bar in figure["data"]] == [["a", "c"], ["a", "c"]]
    assert figure["data"][1]["x"] == [0.7, 0.1]


def test_hover_says_the_architecture_and_escapes_names() -> None:
    evaluation = run(1)[0]
    text = hover(evaluation, EVIL)
    assert text.startswith(f"<b>{html.escape(EVIL)}</b><br>")
    assert "gated SiLU" in text
    assert set(re.findall(r"<[^>]*>", text)) == {"<b>", "</b>", "<br>"}


def test_a_precision_is_shown_wherever_a_model_is(tmp_path: Path) -> None:
    plain = run(12)
    assert "<th>weights</th>" not in write_report("r", plain, MANIFEST, tmp_path / "plain.html").read_text()
    mixed = [e.evolve(weights="int4" if i % 2 else "fp32", params_drawn={**e.params_drawn, "weights": "x"}) for i, e in enumerate(plain)]
    text = write_report("r", mixed, MANIFEST | {"settings": {"weights": "fp32,int4"}}, tmp_path / "mixed.html").read_text()
    assert "<th>weights</th>" in text
    assert "<dt>Weights</dt><dd>fp32, int4</dd>" in text
    best = choose(front_of(mixed, "decode"), "decode")
    assert best is not None
    assert f"tied, {best.weights} weights</p>" in text
    failed = [e for e in mixed if e.state == "failed"]
    assert all(f"tied, {e.weights} weights</td>" in text for e in failed)


def test_a_start_is_known_by_its_architecture_whatever_its_precision() -> None:
    space = load_space("tiny")
    start = run(1)[0].evolve(state="complete", params_drawn={**(space.start(0) or {}), "weights": "int8"})
    assert [r.evaluation for r in starts_among([start], space)] == [start]


def test_charts_tell_the_precision_where_it_is_told() -> None:
    mixed = [e.evolve(weights="int4" if i % 2 else "fp32") for i, e in enumerate(run(12))]
    assert "int4 weights" in hover(mixed[1])
    assert "weights" not in hover(mixed[0])
    figure = design_figure(mixed, "decode")
    assert figure is not None
    (found,) = (d for d in figure["data"][0]["dimensions"] if d["label"] == "weights")
    assert found["ticktext"] == ["fp32", "int4"]


# --- several devices, references ---------------------------------------------------------------


def over_devices(count: int = 30) -> list[Evaluation]:
    """Trials of two devices; small models are relatively slower on the second."""
    rng = random.Random(1)
    evaluations = []
    for e in run(count):
        if e.request_s is None or e.params is None:
            evaluations.append(e)
        else:
            factor = rng.uniform(2, 9)
            figures = {"request_s": factor * e.request_s, "decode_s_per_token": factor * (e.decode_s_per_token or 0), "peak_bytes": 9}
            evaluations.append(e.put(f"board {EVIL}", **figures))
    return evaluations


SEVERAL = MANIFEST | {"targets": [{"name": "laptop"}, {"name": f"board {EVIL}", "flops_per_s": 1.0}]}


def test_a_report_of_several_devices_has_a_front_of_each_and_says_who_wins_where(tmp_path: Path) -> None:
    import plotly.graph_objects as go

    evaluations = over_devices()
    path = write_report("run", evaluations, SEVERAL, tmp_path / "r.html", speed="request")
    shown = Page(path.read_text(encoding="utf-8"))
    assert {attrs.get("id") for tag, attrs in shown.tags if tag == "div"} >= {"front", "front1", "design", "importance"}
    assert len(shown.figures["others"]) == 1
    there = [e.on(f"board {EVIL}") for e in evaluations]
    for figure, seen in ((shown.figures["front"], evaluations), (shown.figures["others"][0], there)):
        marks = {t["name"]: t for t in figure["request"]["data"]}
        front = front_of([e.on(None) for e in seen], "request")
        assert len(marks["on the front"]["x"]) + len(marks["default choice"]["x"]) == len(front)
        go.Figure(json.loads(re.sub(r'"color": "--\w+"', '"color": "#123456"', json.dumps(figure["request"]))))
    assert "onerror" not in {name for _, attrs in shown.tags for name in attrs}
    assert f"board {EVIL}" in shown.text
    assert "Default choice for all devices" in shown.text
    assert shown.text.count("★") > 3
    assert "order 26 candidates with Kendall tau" in shown.text
    bars = [bar["name"] for bar in shown.figures["importance"]["data"]]
    assert (bars[0], bars[-1], len(bars)) == ("time on laptop", "bits per byte", 3)


def test_references_are_marks_on_the_picture_or_lines_where_they_have_no_score(tmp_path: Path) -> None:
    import plotly.graph_objects as go

    evaluations = run(20)
    scored = Reference(name="scored", evaluation=evaluations[0].evolve(trial=-1, val_bpb=2.9))
    unscored = Reference(name=f"unscored {EVIL}", evaluation=evaluations[1].evolve(trial=-1, val_bpb=None, reason="no weights"))
    shown = page(tmp_path, evaluations, references=[scored, unscored])
    for key in ("chars", "request", "params"):
        figure = shown.figures["front"][key]
        marks = {t["name"]: t for t in figure["data"]}
        assert marks["references"]["text"] == ["scored"]
        (line,), (name,) = figure["layout"]["shapes"], figure["layout"]["annotations"]
        assert name["text"].startswith("unscored &lt;img")
        assert 10 ** name["x"] == pytest.approx(line["x0"])
        low, high = figure["layout"]["xaxis"]["range"]
        assert low < name["x"] < high
        go.Figure(json.loads(re.sub(r'"color": "--\w+"', '"color": "#123456"', json.dumps(figure))))
    assert "References, measured beside" in shown.text
    assert "no weights" in shown.text
    assert f"{len(front_of(evaluations, 'decode'))} models" in shown.text


# --- noise, stopped trials, twins, other losses -------------------------------------------------


def test_error_bars_are_the_noise_of_a_training_and_marks_within_it_are_hollow(tmp_path: Path) -> None:
    evaluations = run(40)
    front = front_of(evaluations, "decode")
    losses = sorted(e.val_bpb for e in front if e.val_bpb is not None)
    gaps = [b - a for a, b in itertools.pairwise(losses)]
    sigma = (min(gaps) + max(gaps)) / 2 / math.sqrt(8)
    noise = Noise(sigma=sigma, low=sigma / 2, high=3 * sigma, trainings=6, trials=(0, 2))
    close, best = noise.unresolved(front), choose(front, "decode")
    assert best is not None
    assert 0 < len(close) < len(front)
    for figure in front_figures(evaluations, "decode", noise=noise).values():
        marks = {t["name"]: t for t in figure["data"] if t["mode"] == "markers"}
        assert {bar for t in marks.values() for bar in t["error_y"]["array"]} == {sigma}
        assert len(marks["on the front, order within noise"]["x"]) == len(close - {best.trial})
        assert marks["on the front, order within noise"]["marker"]["symbol"] == "circle-open"
        chosen = "default choice, order within noise" if best.trial in close else "default choice"
        assert ("open" in marks[chosen]["marker"]["symbol"]) == (best.trial in close)
    shown = page(tmp_path, evaluations, noise=noise)
    assert (
        f"Error bars are the standard deviation between trainings with other seeds, {significant(sigma, 2)}; the ± of the table"
        in shown.text
    )
    assert shown.text.count("within noise") >= len(close)
    assert "are one standard error over held-out text" in page(tmp_path, evaluations).text


def test_stopped_trials_are_grey_crosses_at_their_rung_and_part_of_nothing(tmp_path: Path) -> None:
    evaluations = run(40)
    before = front_figures(evaluations, "decode")["chars"]
    rungs = [{"train_bytes": 64_000, "val_bpb": 0.5, "val_bpb_stderr": 0.01}, {"train_bytes": 256_000, "val_bpb": 0.25}]
    for number, count in ((0, 1), (1, 2), (2, 2)):
        done = evaluations[number]
        early = {"val_bpb": None, "val_bpb_stderr": None, "score": {"rungs": rungs[:count]}, "reason": "behind trial 5"}
        evaluations.append(done.evolve(trial=40 + number, state="stopped", **early))
    figure = front_figures(evaluations, "decode")["chars"]
    marks = {t["name"]: t for t in figure["data"]}
    assert marks["stopped at 64.0 kB"]["y"] == [0.5]
    assert marks["stopped at 256 kB"]["y"] == [0.25, 0.25]
    assert marks["stopped at 256 kB"]["marker"]["color"] == "--faint"
    assert "stopped at 256 kB of text, with 0.250 there" in marks["stopped at 256 kB"]["hovertext"][0]
    kept = [t for t in figure["data"] if "stopped" not in t["name"]]
    assert [t["y"] for t in kept] == [t["y"] for t in before["data"]]
    shown = page(tmp_path, evaluations)
    for words in (
        "34 of 43 complete, 3 stopped early",
        "Crosses are trials that were stopped early",
        "stopped at 64.0 kB",
        "behind trial 5",
    ):
        assert words in shown.text
    assert not front_figures([e for e in evaluations if e.state == "stopped"], "decode")


def test_another_loss_and_a_twin_are_labelled(tmp_path: Path) -> None:
    name = f"pairs {EVIL}.jsonl"
    evaluations = []
    for e in run(20):
        if e.val_bpb is not None and e.config is not None:
            task = {"name": name, "kind": "pairs", "loss": e.val_bpb / 5, "loss_stderr": 0.02, "accuracy": 0.714}
            e = e.evolve(score={"val_bpb": e.val_bpb, "task": task, "twin": e.config.to_dict()})
        evaluations.append(e)
    figure = front_figures(evaluations, "decode")["chars"]
    assert figure["layout"]["yaxis"]["title"]["text"].startswith("loss on pairs ‹img")
    best = choose(front_of(evaluations, "decode"), "decode")
    assert best is not None
    assert best.loss is not None
    assert any(best.loss in t["y"] for t in figure["data"])
    shown = page(tmp_path, evaluations)
    for words in (f"loss on {name}", "(71 %)", "score of", "twin of", "Every score is that of a twin", "over the tasks that are scored"):
        assert words in shown.text
    assert "onerror" not in {attribute for _, attrs in shown.tags for attribute in attrs}
    drawn = json.dumps(shown.figures, ensure_ascii=False)
    assert "<img" not in drawn
    assert "<th>score of</th>" not in write_report("r", run(20), MANIFEST, tmp_path / "plain.html").read_text()
