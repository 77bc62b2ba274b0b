"""The report's charts as plain plotly figures (`{"data": …, "layout": …}`), made without importing plotly.

Colours are the names of CSS variables of the page, such as `--front`; the page puts the values in when it draws, so that
charts follow a light or dark theme. Text from users is escaped here: plotly reads some HTML tags in hovers and labels.
"""

import html
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nas.describe import (
    describe_trial,
    format_bpb,
    format_bytes,
    format_count,
    format_loss,
    format_ms,
    format_rate,
    format_s,
    is_text,
    objective_words,
    stopped_words,
    trial_facts,
    twin_words,
)
from nas.evaluation import Evaluation, Speed, loss_in
from nas.front import choose, front_of, on_each, pareto_front
from nas.noise import Noise

Figure = dict[str, Any]

_FEWEST_LINES = 3
"""Candidates below which parallel coordinates show nothing that the table does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A model shown beside the candidates: a known architecture, measured and trained in the same way."""

    name: str
    evaluation: Evaluation

    def on(self, device: str | None) -> "Reference":
        """The model as one device saw it; None: the first."""
        return Reference(name=self.name, evaluation=self.evaluation.on(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One quantity that the loss can be drawn against; all but `rate` are better when smaller."""

    key: str
    label: str
    title: str
    value: Callable[[Evaluation], float | None]
    """The figure in the unit of `title`."""
    rate: bool = False


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _rate(evaluation: Evaluation) -> float | None:
    seconds = evaluation.s_per_byte
    return None if not seconds else 1 / seconds


AXES = (
    Axis(key="chars", label="Characters/s", title="characters generated per second", value=_rate, rate=True),
    Axis(key="token", label="ms/token", title="milliseconds per generated token", value=lambda e: _scaled(e.decode_s_per_token, 1e3)),
    Axis(key="request", label="Request", title="milliseconds per request", value=lambda e: _scaled(e.request_s, 1e3)),
    Axis(key="prefill", label="Prompt", title="milliseconds to read the prompt", value=lambda e: _scaled(e.prefill_s, 1e3)),
    Axis(key="params", label="Parameters", title="parameters, millions", value=lambda e: _scaled(e.params, 1e-6)),
    Axis(key="memory", label="Memory", title="peak memory, MB", value=lambda e: _scaled(e.peak_bytes, 1e-6)),
)
"""What the front can be drawn against, in the order of the page's buttons."""

OBJECTIVE_AXIS: Mapping[Speed, str] = {"decode": "chars", "prefill": "prefill", "request": "request"}
"""The axis that shows the searched objective."""


def hover(evaluation: Evaluation, name: str | None = None) -> str:
    """One candidate in words, as plotly hover text; everything from outside is escaped."""
    title = html.escape(name) if name is not None else f"Trial {evaluation.trial}"
    lines = [f"<b>{title}</b>"]
    if evaluation.config is not None:
        words = describe_trial(evaluation).split(", ")
        # Plotly does not wrap hovers; three parts a line keep them narrower than a phone.
        lines += [html.escape(", ".join(words[i : i + 3])) for i in range(0, len(words), 3)]
    lines += _score_lines(evaluation)
    lines.append(f"{format_ms(evaluation.decode_s_per_token)} ms/token, {format_rate(_rate(evaluation))} characters/s")
    lines.append(f"{format_s(evaluation.request_s)} a request, {format_s(evaluation.prefill_s)} a prompt")
    lines.append(f"{format_count(evaluation.params)} parameters, {format_bytes(evaluation.peak_bytes)} peak")
    return "<br>".join(lines)


def _score_lines(evaluation: Evaluation) -> list[str]:
    """What it scored, on what; of a trial that was stopped, at its last rung."""
    rung = evaluation.last_rung
    lines = [f"{stopped_words(evaluation)} of text, with {format_bpb(loss_in(rung))} there"] if rung is not None else []
    if evaluation.task is not None:
        lines.append(f"{format_loss(evaluation)} {html.escape(objective_words([evaluation]))}")
    if rung is None:
        lines.append(f"{format_bpb(evaluation.val_bpb, evaluation.val_bpb_stderr)} bits per byte")
    twin = twin_words(evaluation)
    return [*lines, f"score of a {twin}"] if twin else lines


def front_figures(
    evaluations: Sequence[Evaluation], speed: Speed, references: Sequence[Reference] = (), noise: Noise | None = None
) -> dict[str, Figure]:
    """The loss against each axis for which figures are known, by `Axis.key`; empty without a complete trial.

    Filled marks are the searched front on every axis, hollow ones those of it whose order is within the `noise` of a training;
    the step line is the best reachable at each value of this axis. Error bars are that noise if it is known, else the error
    over held-out documents. Trials that were stopped are grey crosses at the score of their last rung, and part of nothing.
    References without a score are lines at their value of the axis. All of it is of one device (`nas.front.on_each`).
    """
    ranked = [e for e in evaluations if e.is_ranked(speed)]
    stopped = [e for e in evaluations if loss_in(e.last_rung) is not None]
    front = front_of(evaluations, speed)
    chosen = choose(front, speed)
    figures: dict[str, Figure] = {}
    for axis in AXES:
        shown, early = ([e for e in trials if (axis.value(e) or 0) > 0] for trials in (ranked, stopped))
        if shown:
            known = [r for r in references if (axis.value(r.evaluation) or 0) > 0]
            figures[axis.key] = _front_figure(axis, shown, front, chosen, known, early, noise)
    return figures


def _front_figure(
    axis: Axis,
    shown: Sequence[Evaluation],
    front: Sequence[Evaluation],
    chosen: Evaluation | None,
    references: Sequence[Reference],
    stopped: Sequence[Evaluation],
    noise: Noise | None,
) -> Figure:
    on_front = {e.trial for e in front}
    hollow = noise.unresolved(front) if noise is not None else frozenset()
    taken = chosen.trial if chosen is not None else None
    rest = [e for e in shown if e.trial in on_front and e.trial != taken]
    star = "star-open" if taken in hollow else "star"
    starts = [r for r in references if r.evaluation in shown]
    marked = {r.evaluation.trial for r in starts}
    # A start off the front has its own mark only; on the front it is a frame around the filled one.
    others = [e for e in shown if e.trial not in on_front and e.trial not in marked]
    values = [v for e in (*shown, *stopped, *(r.evaluation for r in references)) if (v := axis.value(e)) is not None]
    scale = _log_scale(min(values), max(values))
    step = _step(axis, shown, 10.0 ** scale["range"][0 if axis.rate else 1])
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best reachable",
            "x": [x for x, _ in step],
            "y": [y for _, y in step],
            "line": {"shape": "vh" if axis.rate else "hv", "width": 2, "color": "--front"},
            "hoverinfo": "skip",
        },
        *_stopped_marks(axis, stopped),
        _marks(axis, others, "other candidates", {"color": "--muted", "size": 8, "opacity": 0.55}, noise),
        _marks(axis, [e for e in rest if e.trial not in hollow], "on the front", {"color": "--front", "size": 11}, noise),
        _marks(
            axis,
            [e for e in rest if e.trial in hollow],
            "on the front, order within noise",
            {"color": "--front", "size": 11, "symbol": "circle-open", "line": {"width": 2}},
            noise,
        ),
        _marks(
            axis,
            [e for e in shown if e.trial == taken],
            "default choice" + (", order within noise" if taken in hollow else ""),
            {"color": "--chosen", "size": 19, "symbol": star, "line": {"width": 1.5, "color": "--chosen" if taken in hollow else "--card"}},
            noise,
        ),
    ]
    plain = {"color": "--text", "size": 17, "symbol": "diamond-open"}
    data.append(_named_marks(axis, starts, "plain models (starts)", plain, on_front, noise))
    others_known = [r for r in references if r not in starts]
    scored = [r for r in others_known if r.evaluation.loss is not None]
    data.append(_named_marks(axis, scored, "references", {"color": "--text", "size": 10, "symbol": "diamond-open"}))
    unscored = [r for r in others_known if r.evaluation.loss is None]
    return {
        "data": [trace for trace in data if trace["x"]],
        "layout": {
            "xaxis": {"title": {"text": f"{axis.title} (log)"}, "type": "log", **scale},
            "yaxis": {"title": {"text": _bare(objective_words(shown))}},
            "hovermode": "closest",
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "margin": {"l": 58, "r": 16, "t": 46, "b": 52},
            "height": 470,
            **_lines(axis, unscored),
        },
    }


def _lines(axis: Axis, shown: Sequence[Reference]) -> dict[str, Any]:
    """A dotted line with its name over the whole height for each model: its loss is not known."""
    places = [(r, value) for r in shown if (value := axis.value(r.evaluation)) is not None]
    if not places:
        return {}
    line = {"color": "--muted", "width": 1, "dash": "dot"}
    name = {"showarrow": False, "yref": "paper", "y": 1, "yanchor": "top", "textangle": -90, "xanchor": "right", "font": {"size": 11}}
    return {
        "shapes": [{"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": line} for _, x in places],
        # Plotly takes the place of an annotation on a logarithmic axis as a logarithm, that of a shape as it is.
        "annotations": [{**name, "x": math.log10(x), "text": html.escape(r.name)} for r, x in places],
    }


def _stopped_marks(axis: Axis, stopped: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Grey crosses for each rung at which trials were stopped: less text than the others read, so their scores do not compare."""
    at: dict[str, list[Evaluation]] = {}
    for e in stopped:
        at.setdefault(stopped_words(e), []).append(e)
    marker = {"color": "--faint", "size": 7, "symbol": "x-thin", "line": {"width": 1.5, "color": "--faint"}}
    return [{**_marks(axis, there, words, marker), "y": [loss_in(e.last_rung) for e in there]} for words, there in at.items()]


def _marks(axis: Axis, shown: Sequence[Evaluation], name: str, marker: dict[str, Any], noise: Noise | None = None) -> dict[str, Any]:
    """Marks with error bars: the noise of a training, or without it the error over what was scored."""
    muted = marker["color"] == "--muted"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [axis.value(e) for e in shown],
        "y": [e.loss for e in shown],
        "error_y": {
            "type": "data",
            "array": [_error(e, noise) for e in shown],
            "color": "--faint" if muted else marker["color"],
            "thickness": 1 if muted else 1.5,
            "width": 0 if muted else 3,
        },
        "marker": marker,
        "hovertext": [hover(e) for e in shown],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _error(evaluation: Evaluation, noise: Noise | None) -> float:
    return noise.sigma if noise is not None else evaluation.loss_stderr or 0.0


def _named_marks(
    axis: Axis,
    shown: Sequence[Reference],
    name: str,
    marker: dict[str, Any],
    drawn: Collection[int] = (),
    noise: Noise | None = None,
) -> dict[str, Any]:
    """Open marks with their names above; without the error bars of trials `drawn` already, which would lie on each other."""
    marks = _marks(axis, [r.evaluation for r in shown], name, marker, noise)
    marks["hovertext"] = [hover(r.evaluation, r.name) for r in shown]
    marks["error_y"]["array"] = [0.0 if r.evaluation.trial in drawn else _error(r.evaluation, noise) for r in shown]
    text = [html.escape(r.name) for r in shown]
    return {**marks, "text": text, "mode": "markers+text", "textposition": "top center", "textfont": {"size": 11}}


def _step(axis: Axis, shown: Sequence[Evaluation], edge: float) -> list[tuple[float, float]]:
    """The corners of "least loss reachable at this value or better", by value, out to the worst value `edge`."""
    pairs = [(x, y) for e in shown if (x := axis.value(e)) is not None and (y := e.loss) is not None]
    sign = -1.0 if axis.rate else 1.0
    kept = [pairs[i] for i in pareto_front([(sign * x, y) for x, y in pairs])]
    return sorted([*kept, (edge, min(y for _, y in kept))])


def _log_scale(low: float, high: float) -> dict[str, Any]:
    """Range (as logarithms) and round ticks of a log axis; plotly's own ticks are bare digits between powers of ten."""
    pad = max(0.04, 0.06 * math.log10(high / low))
    bottom, top = math.log10(low) - pad, math.log10(high) + pad
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(d / 4 for d in range(4, 40))):
        ticks = [s * 10.0**p for p in range(math.floor(bottom) - 1, math.ceil(top) + 1) for s in steps]
        inside = [t for t in ticks if bottom <= math.log10(t) <= top]
        if len(inside) >= 4:
            break
    return {"tickvals": inside, "ticktext": [f"{t:,.6g}" for t in inside], "range": [bottom, top]}


# --- design -------------------------------------------------------------------------------


def design_figure(evaluations: Sequence[Evaluation], speed: Speed, devices: Sequence[str] = ()) -> Figure | None:
    """Parallel coordinates of every design choice that varies, coloured by the loss; None with too few candidates."""
    ranked = [e for e in evaluations if e.is_ranked(speed) and e.config is not None]
    facts = [trial_facts(e) for e in ranked]
    if len(ranked) < _FEWEST_LINES:
        return None
    losses, name = [e.loss for e in ranked if e.loss is not None], objective_words(ranked)
    dimensions: list[dict[str, Any]] = [{"label": _short(_bare(name), 24), "values": losses}]
    for device, seen in on_each(ranked, devices or [""]).items():
        rates = [math.log10(r) for e in seen if (r := _rate(e)) is not None]
        if len(rates) == len(ranked) and max(rates) > min(rates):
            scale = _log_scale(10 ** min(rates), 10 ** max(rates))
            places = {"tickvals": [math.log10(t) for t in scale["tickvals"]], "ticktext": scale["ticktext"], "range": scale["range"]}
            label = f"characters/s on {_bare(_short(device))}" if len(devices) > 1 else "characters/s"
            dimensions.append({"label": label, "values": rates, **places})
    dimensions += [d for fact in facts[0] if (d := _dimension(fact, [f[fact] for f in facts])) is not None]
    bar = {"title": {"text": "bpb" if is_text(ranked) else "loss"}, "thickness": 12}
    return {
        "data": [
            {
                "type": "parcoords",
                "line": {
                    "color": losses,
                    "colorscale": "Viridis",
                    "showscale": True,
                    "colorbar": bar,
                },
                "dimensions": dimensions,
                "labelangle": -20,
                "labelside": "top",
            }
        ],
        "layout": {"margin": {"l": 64, "r": 30, "t": 76, "b": 24}, "height": 430, "width": max(640, 70 * len(dimensions))},
    }


def _dimension(name: str, values: Sequence[str | int | float]) -> dict[str, Any] | None:
    distinct = sorted(set(values), key=lambda v: (isinstance(v, str), v))
    if len(distinct) < 2:
        return None
    if len(distinct) <= 8:
        # Few values are spread evenly, whatever they are: 512 and 1024 would otherwise lie on each other below 65536.
        place = {v: i for i, v in enumerate(distinct)}
        ticks = {"tickvals": list(range(len(distinct))), "ticktext": [_short(_bare(v)) for v in distinct]}
        return {"label": _bare(name), "values": [place[v] for v in values], **ticks}
    if isinstance(distinct[-1], str):
        return None  # so many texts have no order and no room
    return {"label": _bare(name), "values": list(values)}


def _short(text: str, most: int = 14) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _bare(value: str | int | float) -> str:
    """Text for a place where plotly may or may not read tags: angle brackets are replaced by ones that never do."""
    return str(value).replace("<", "‹").replace(">", "›")


def importance_figure(
    shares: Sequence[Mapping[str, float]], devices: Sequence[str] = (), most: int = 12, objective: str = "bits per byte"
) -> Figure:
    """Bars of each parameter's share of importance, for the loss and for time (on each of several devices)."""
    loss, *times = shares
    words = ["time"] if len(times) == 1 else [f"time on {_bare(device)}" for device in devices]
    names = sorted(loss, key=lambda n: -max(share[n] for share in shares))[:most][::-1]
    bars = [*((word, share, "--muted") for word, share in zip(words, times, strict=True)), (_bare(objective), loss, "--front")]
    opacities = [1.0 - 0.5 * i / max(1, len(times) - 1) for i in range(len(times))] + [1.0]
    return {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "y": [_bare(n) for n in names],
                "x": [share[n] for n in names],
                "marker": {"color": color, "opacity": opacity},
                "hovertemplate": f"%{{y}}: %{{x:.0%}} of what decides {name}<extra></extra>",
            }
            for (name, share, color), opacity in zip(bars, opacities, strict=True)
        ],
        "layout": {
            "barmode": "group",
            "bargap": 0.3,
            "xaxis": {"tickformat": ".0%", "title": {"text": "share of importance"}, "rangemode": "tozero"},
            "yaxis": {"automargin": True, "type": "category"},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "reversed"},
            "margin": {"l": 16, "r": 16, "t": 40, "b": 50},
            "height": 110 + 20 * len(bars) * len(names),
        },
    }
