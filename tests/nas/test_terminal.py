import io
import json
import re
import shlex

import pytest
from rich.console import Console

from nas.describe import format_count
from nas.evaluation import Evaluation
from nas.noise import Noise
from nas.terminal import LiveView, front_table, joint_table, parseable_line
from search_spaces.config import SLMConfig
from search_spaces.counting import params

CONFIG = SLMConfig(vocab_size=512, d_model=64, num_layers=2, attention="gqa", num_heads=4, num_kv_heads=2, head_dim=16)


def trial(number: int, bpb: float = 2.5, seconds: float = 0.001, **changes: object) -> Evaluation:
    evaluation = Evaluation(
        trial=number,
        state="complete",
        config=CONFIG,
        params=812_345,
        bytes_per_token=2.0,
        peak_bytes=5_000_000,
        prefill_s=0.01,
        decode_s_per_token=seconds,
        request_s=0.034,
        val_bpb=bpb,
        val_bpb_stderr=0.012,
    )
    return evaluation.evolve(**changes)


def terminal(width: int = 120, height: int = 30) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None, legacy_windows=False)


def drawn(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def shown(table: object, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_lines_when_not_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView() as view:
        view.start(3, None)
        view.stage(0, "train", "512 kB", 0.5)
        view.note("corpus has 12 MB")
        view.finished(trial(0))
        view.finished(Evaluation(trial=1, state="failed", reason='compile: "x" = 3\nsecond line'))
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "trial=0 state=complete params=812345 bytes_per_token=2.0 peak_bytes=5000000 prefill_s=0.01 decode_s_per_token=0.001 "
        "request_s=0.034 val_bpb=2.5 val_bpb_stderr=0.012",
        'trial=1 state=failed reason="compile: \\"x\\" = 3\\nsecond line"',
    ]
    assert err == "corpus has 12 MB\n"


def test_quiet_is_lines_only_even_on_a_terminal() -> None:
    console, errors = terminal(), io.StringIO()
    with LiveView(quiet=True, console=console, errors=errors) as view:
        view.start(1, 60.0)
        view.note("nobody reads this")
        view.finished(trial(0))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == parseable_line(trial(0)) + "\n"
    assert errors.getvalue() == ""


def test_a_line_reads_back() -> None:
    evaluation = trial(3, reason="a [red]b[/red] c=d", duplicate_of=1, decode_s_per_token=0.1 + 0.2)
    line = parseable_line(evaluation)
    assert "\n" not in line
    words = dict(word.split("=", 1) for word in shlex.split(line))
    assert float(words["decode_s_per_token"]) == 0.1 + 0.2
    assert (words["trial"], words["duplicate_of"], words["reason"]) == ("3", "1", "a [red]b[/red] c=d")
    assert json.loads(line.split("reason=", 1)[1]) == evaluation.reason


def test_live_view_shows_progress_stage_and_front() -> None:
    console = terminal()
    with LiveView(console=console) as view:
        view.start(4, None)
        view.finished(trial(0, 2.5))
        view.finished(trial(1, state="failed"))
        view.stage(2, "train", "[bold]512 kB[/bold] of text", 0.43)
        view.note("a [red]note[/red]")
        view._refresh()
        text = drawn(console)
    assert "2/4 trials" in text
    assert "1 complete" in text
    assert re.search(r"\d:\d\d elapsed, ~\d+:\d\d left", text)
    assert re.search(r"trial 2 +train .*43% .*\[bold\]512 kB\[/bold\] of text", text)
    assert "a [red]note[/red]" in text
    assert "2.500 ± 0.012" in text
    assert "2 layers × 64, GQA 4/2 heads × 16" in text


def test_live_view_ends_without_a_stage_and_after_an_error() -> None:
    console = terminal()
    view = LiveView(console=console)

    def search() -> None:
        with view:
            view.start(None, 3600.0)
            view.stage(0, "compile")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search()
    assert view._live is None
    assert isinstance(console.file, io.StringIO)
    # The last of the terminal's codes makes the cursor visible again.
    assert console.file.getvalue().rindex("\x1b[?25h") > console.file.getvalue().rindex("\x1b[?25l")
    assert "compile" not in drawn(console).splitlines()[-1]


def test_time_left_is_by_pace_and_at_most_the_deadline() -> None:
    view = LiveView(console=terminal())
    earlier = [trial(i) for i in range(6)]
    view.start(10, None, earlier)
    assert view._left_s(6, 5.0) is None
    assert view._left_s(8, 10.0) == pytest.approx(10.0)
    assert view._share(6, 5.0) == pytest.approx(0.6)
    view.start(10, 12.0, earlier)
    assert view._left_s(8, 10.0) == pytest.approx(2.0)
    assert view._share(6, 9.0) == pytest.approx(0.75)
    view.start(None, None)
    assert view._left_s(3, 10.0) is None
    assert view._share(3, 10.0) is None


def test_earlier_trials_are_on_the_front_but_not_printed_again() -> None:
    lines = io.StringIO()
    with LiveView(console=Console(file=lines)) as view:
        view.start(3, None, [trial(0), trial(1)])
        view.finished(trial(2))
    assert [line.split()[0] for line in lines.getvalue().splitlines()] == ["trial=2"]
    console = terminal()
    with LiveView(console=console) as view:
        view.start(3, None, [trial(0, 2.345)])
    assert "2.345" in drawn(console)


def test_view_fits_a_small_screen() -> None:
    many = [trial(i, 3.0 - i / 50, 0.001 * (i + 1)) for i in range(40)]
    console = terminal(width=80, height=12)
    view = LiveView(console=console)
    view.start(50, None, many)
    view.stage(40, "measure", "x" * 200, 1.7)
    console.print(view._render())
    lines = drawn(console).splitlines()
    assert len(lines) <= 12
    assert max(map(len, lines)) <= 80
    assert "100%" in drawn(console)
    assert "more on the front" in drawn(console)


def test_front_table_orders_marks_and_escapes() -> None:
    knee = [trial(0, 3.0, 0.001), trial(1, 2.2, 0.002), trial(2, 2.0, 0.1), trial(3, 3.5, 0.5)]
    text = shown(front_table(knee, "decode"))
    rows = [line.split() for line in text.splitlines() if "±" in line]
    assert [r[0] for r in rows] == ["0", "1", "2"]
    assert [r[0] for r in rows if "★" in r] == ["1"]
    assert "1.00  34.0 ms    2,000   812 k  5.00 MB" in text
    assert "no model on the front yet" in shown(front_table([], "decode"))


def test_figures_are_never_cut() -> None:
    for width in (80, 100, 140):
        text = shown(front_table([trial(0), trial(1, 2.0, 0.1)], "decode", most=5, width=width), width)
        assert "2.500 ± 0.012" in text
        assert "812 k" in text
        assert ("5.00 MB" in text) == (width >= 110)


def test_fewer_rows_keep_both_ends_and_the_choice() -> None:
    front = [trial(i, 3.0 - i / 50 - (0.5 if i >= 3 else 0), 0.001 * 1.3**i) for i in range(30)]
    text = shown(front_table(front, "decode", most=4))
    rows = [line.split() for line in text.splitlines()[1:5]]
    assert [rows[0][0], rows[-1][0]] == ["0", "29"]
    assert len(rows) == 4
    assert any("★" in row for row in rows)
    assert "26 more on the front" in text


def test_times_that_are_noisy_or_slow_are_marked() -> None:
    noisy = trial(0, 3.0, measurement={"times_s": {"decode": [1.0, 1.0, 2.0, 3.0]}})
    slow = trial(1, 2.0, 0.1, measurement={"times_s": {"decode": [1.0]}, "reference_s": [9.0], "reference_best_s": 1.0})
    steady = trial(2, 1.0, 0.2, measurement={"times_s": {"decode": [1.0]}})
    assert [parseable_line(e).split()[-1] for e in (noisy, slow)] == ["noisy=true", "slow=true"]
    assert "noisy" not in parseable_line(steady)
    text = shown(front_table([noisy, slow, steady]))
    assert "1.00~" in text
    assert "100~" in text
    assert "200 " in text
    assert "~ times spread widely, or the device ran slow" in text
    assert "~" not in shown(front_table([steady]))


def test_a_precision_is_a_word_and_a_column_only_where_it_is_told() -> None:
    plain, small = trial(0), trial(1, 2.0, 0.1, weights="int8")
    assert "weights" not in parseable_line(plain)
    assert " state=complete weights=int8 params=" in parseable_line(small)
    assert "weights" not in shown(front_table([plain]))
    for width in (80, 140):
        rows = shown(front_table([plain, small], width=width), width).splitlines()
        assert "weights" in rows[0]
        assert [word for row in rows for word in ("fp32", "int8") if word in row.split()] == ["fp32", "int8"]


# --- several devices, references ---------------------------------------------------------------


def over_devices() -> list[Evaluation]:
    small = trial(0, 3.0, request_s=1.0).put("pi [5]", request_s=2.0, decode_s_per_token=0.25)
    return [small, trial(1, 2.0, request_s=9.0).put("pi [5]", request_s=3.0, decode_s_per_token=0.5), trial(2, state="failed", reason="no")]


def test_the_joint_table_has_a_column_for_each_device_and_marks_where_a_model_wins() -> None:
    beside = {"gpt2": trial(-1, request_s=40.0).evolve(val_bpb=None, val_bpb_stderr=None), "lost": Evaluation(trial=-1, reason="too big")}
    text = shown(joint_table(over_devices(), "request", ["local", "pi [5]"], references=beside))
    assert re.search(r"^ *trial +bits/byte +local +pi \[5\] +params +architecture", text)
    assert re.search(r"^ *0 +3\.000 ± 0\.012 +1\.00 s • +2\.00 s • ", text, re.MULTILINE)
    assert re.search(r"^ *1 +★ +2\.000 ± 0\.012 +9\.00 s ★ +3\.00 s ★ ", text, re.MULTILINE)
    assert re.search(r"^ *gpt2 +ref +– +40\.0 s +– ", text, re.MULTILINE)
    assert "lost: too big" in text
    assert "time of a request on each device" in text
    assert "no model on the front yet" in shown(joint_table([], "request", ["local", "pi [5]"]))


def test_references_are_listed_below_the_front() -> None:
    text = shown(front_table([trial(0)], "request", references={"gpt2": trial(-1, bpb=1.5)}))
    assert re.search(r"^ *gpt2 +ref +1\.500 ± 0\.012 ", text, re.MULTILINE)
    assert "ref: a reference, measured beside and never on the front" in text
    assert re.search(r"^ *0 +★ ", text, re.MULTILINE)


def test_a_line_names_the_device_of_what_is_not_of_the_first() -> None:
    line = parseable_line(over_devices()[0])
    assert " request_s=1.0 " in line
    assert " pi-5-.request_s=2.0" in line
    assert shlex.split(line)


def test_the_live_view_shows_all_devices_and_a_reference_before_the_first_trial() -> None:
    console = terminal()
    with LiveView(speed="request", devices=["local", "pi [5]"], console=console) as view:
        view.start(2, None)
        view.stage(-1, "reference", "gpt2")
        view._refresh()
        assert "trial -1" not in drawn(console)
        for e in over_devices():
            view.finished(e)
    assert re.search(r"local +pi \[5\]", drawn(console))


# --- noise, twins, stopped trials, other losses -------------------------------------------------

NOISE = Noise(sigma=0.0123, low=0.007, high=0.04, trainings=6, trials=(0, 2))


def test_the_noise_of_a_training_is_a_column_with_a_mark_where_it_may_turn_the_order_round() -> None:
    front = [trial(0, 3.0, 0.001), trial(1, 2.52, 0.002), trial(2, 2.5, 0.1)]
    text = shown(front_table(front, "decode", noise=NOISE), 180)
    assert "± seed" in text.splitlines()[0]
    assert [bool(re.search(r"± 0\.012 +0\.012 ≈", line)) for line in text.splitlines()[1:4]] == [False, True, True]
    assert re.search(r"3\.000 ± 0\.012 +0\.012 ", text)
    assert "± seed: standard deviation between seeds, from 6 trainings; the ± before it is over documents" in text
    assert "≈ closer than 0.035 to a neighbour" in text
    assert "seed" not in shown(front_table(front, "decode"))
    assert "≈" not in shown(front_table(front[:2], "decode", noise=NOISE))
    joint = shown(joint_table(over_devices(), "request", ["local", "pi [5]"], noise=NOISE, references={"gpt2": trial(-1)}))
    assert re.search(r"^ *trial +bits/byte +± seed +local +pi \[5\] +params +architecture", joint)
    assert re.search(r"^ *gpt2 +ref +2\.500 ± 0\.012 +34\.0 ms", joint, re.MULTILINE)


def test_a_twins_score_is_labelled_and_a_stopped_trial_counted_apart() -> None:
    twin = trial(0, 2.5, score={"val_bpb": 2.5, "twin": CONFIG.to_dict()})
    size = params(CONFIG)
    text = shown(front_table([twin, trial(1, 2.0, 0.1)]), 180)
    assert "score of" in text.splitlines()[0]
    assert f"twin of {format_count(size)}" in text
    assert "score of" not in shown(front_table([trial(0)]))
    assert f" twin_params={size}" in parseable_line(twin)

    rungs = [{"train_bytes": 64_000, "val_bpb": 3.25, "val_bpb_stderr": 0.01}]
    stopped = trial(3, state="stopped", val_bpb=None, val_bpb_stderr=None, score={"rungs": rungs}, reason="behind trial 1")
    assert parseable_line(stopped).endswith(" stopped_at_bytes=64000 loss_there=3.25")
    console = terminal()
    with LiveView(console=console) as view:
        view.start(4, None, [trial(0), stopped])
        view._refresh()
        assert "1 complete, 1 stopped" in drawn(console)


def test_the_column_of_another_loss_has_its_name() -> None:
    task = {"name": "[b]pairs.jsonl", "kind": "pairs", "loss": 0.612, "loss_stderr": 0.02, "accuracy": 0.714}
    scored = trial(0, score={"val_bpb": 2.5, "task": task})
    text = shown(front_table([scored]), 160)
    assert "loss on [b]pairs.jsonl" in text.splitlines()[0]
    assert "0.612 ± 0.020 (71 %)" in text
    assert " val_bpb=2.5 val_bpb_stderr=0.012 loss=0.612 loss_stderr=0.02 task_accuracy=0.714" in parseable_line(scored)
