"""The page of one training: its loss curve, what came of it and how it was made."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from nas.charts import Figure
from nas.describe import describe_config, format_bpb, format_bytes, format_count, format_rate, format_s
from nas.evaluation import write_whole
from nas.report import note, plotly_js, script_json, settings_list
from nas.report_page import PAGE_BEGIN, PAGE_END
from search_spaces.config import SLMConfig
from search_spaces.counting import params

_MOST_POINTS = 2000
"""Points of a curve; more would only make the page slow."""

_PAGE = Template(
    PAGE_BEGIN
    + """<section><p>$words</p>$tiles</section>
<section><h2>Loss</h2>$loss_note<div id="front"></div></section>
<section><h2>Settings</h2>$settings</section>"""
    + PAGE_END
)


def write_training_report(path: Path, title: str, manifest: Mapping[str, Any], curve: Sequence[float], batch_tokens: int) -> Path:
    """Writes the page whole and returns its path.

    Args:
        path: the HTML file.
        title: the page's heading.
        manifest: what train.json says; all of it is shown.
        curve: loss of each step so far, bits per byte of training text.
        batch_tokens: tokens of a step.
    """
    figures = (
        {"front": {"loss": loss_figure(curve, batch_tokens, manifest["result"])}, "first": "loss"} if curve else {"front": {}, "first": ""}
    )
    config = SLMConfig.from_dict(manifest["config"])
    page = _PAGE.substitute(
        title=html.escape(title),
        headline=_headline(manifest, config),
        words=html.escape(describe_config(config)),
        tiles=_tiles(manifest["result"]),
        loss_note=note("One point a step; the line is a mean over neighbouring steps." if curve else "No step has been taken yet."),
        settings=settings_list(manifest),
        figures=script_json(figures),
        plotly=plotly_js() if curve else "",
    )
    return write_whole(path, page)


def loss_figure(curve: Sequence[float], batch_tokens: int, result: Mapping[str, Any] | None) -> Figure:
    """Loss against tokens read: every step as a point, a running mean as a line, the final score as a mark.

    Args:
        curve: loss of each step, bits per byte; one that is not finite is left out.
        batch_tokens: tokens of a step.
        result: `nas.pretraining.Trained.to_dict`; None while it has not ended.
    """
    points = [((step + 1) * batch_tokens, loss) for step, loss in enumerate(curve) if math.isfinite(loss)]
    shown = points[:: max(1, -(-len(points) // _MOST_POINTS))]
    smooth = _running_mean([loss for _, loss in points])[:: max(1, -(-len(points) // _MOST_POINTS))]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "a step",
            "x": [x for x, _ in shown],
            "y": [y for _, y in shown],
            "marker": {"color": "--faint", "size": 4},
            "hovertemplate": "%{y:.3f} bits per byte after %{x:,} tokens<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "training text",
            "x": [x for x, _ in shown],
            "y": smooth,
            "line": {"width": 2, "color": "--front"},
            "hoverinfo": "skip",
        },
    ]
    if result is not None:
        stderr = result["val_bpb_stderr"] or 0.0
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "held-out text",
                "x": [len(curve) * batch_tokens],
                "y": [result["val_bpb"]],
                "error_y": {"type": "data", "array": [stderr], "color": "--chosen"},
                "marker": {"color": "--chosen", "size": 13, "symbol": "star"},
                "hovertemplate": "%{y:.3f} bits per byte of held-out text<extra></extra>",
            }
        )
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "tokens read"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "bits per byte"}},
            "hovermode": "closest",
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "margin": {"l": 58, "r": 16, "t": 46, "b": 52},
            "height": 430,
        },
    }


def _running_mean(values: Sequence[float]) -> list[float]:
    """Each value's mean with those before and after it, a fiftieth of all."""
    half = max(1, len(values) // 100)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]


def _headline(manifest: Mapping[str, Any], config: SLMConfig) -> str:
    settings, corpus = manifest["settings"], manifest["corpus"]
    budget = settings["tokens"]
    items = [
        ("Model", str(manifest["model"])),
        ("Parameters", format_count(params(config))),
        ("Corpus", str(corpus["name"])),
        ("Text", format_bytes(corpus["train_bytes"])),
        ("To read", f"{budget:,} tokens" if budget else format_bytes(settings["text_bytes"])),
        ("Device", str(manifest["device"])),
        ("Date", str(manifest["created"])),
    ]
    return "".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in items)


def _tiles(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return note("It has not ended: the same command goes on.")
    figures = [
        (format_bpb(result["val_bpb"], result["val_bpb_stderr"]), "bits per byte"),
        (format_count(result["tokens"]), "tokens"),
        (f"{result['epochs']:.2f}", "times the text"),
        (format_s(result["train_s"]), "training"),
        (format_rate(result["tokens"] / result["train_s"]) if result["train_s"] > 0 else "–", "tokens/s"),
    ]
    return f'<div class="tiles">{"".join(f"<div><b>{html.escape(value)}</b><span>{label}</span></div>" for value, label in figures)}</div>'
