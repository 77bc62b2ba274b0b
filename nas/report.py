"""The report of a run: one HTML page that holds everything it needs and opens without a network."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from nas.breakdown import COLUMNS, breakdown_rows, trial_profiles
from nas.charts import AXES, OBJECTIVE_AXIS, Figure, Reference, design_figure, front_figures, importance_figure
from nas.describe import describe_config, describe_trial, format_bpb, format_bytes, format_count, format_ms, format_rate, format_s
from nas.evaluation import WEIGHTS, Evaluation, Speed, write_whole
from nas.findings import findings
from nas.front import choose, front_of
from nas.importance import FEWEST_TRIALS, importances
from nas.report_page import PAGE
from search_spaces.workload import Workload

if TYPE_CHECKING:
    import optuna

    from search_spaces.space import Space

__all__ = ["Reference", "starts_among", "write_report"]

_STAGES = ("count", "tokenizer", "compile", "measure", "train")
"""The order in which a trial's stages are shown; others come after them."""

_MOST_LISTED = 200
"""Unfinished trials listed one by one; the rest are counted."""


def write_report(
    run_title: str,
    evaluations: Sequence[Evaluation],
    manifest: Mapping[str, Any],
    path: Path,
    references: Sequence[Reference] = (),
    *,
    speed: Speed = "decode",
    study: "optuna.Study | None" = None,
) -> Path:
    """Writes the page whole and returns its path.

    Args:
        run_title: the page's heading.
        evaluations: every trial, in any state; none at all is fine.
        manifest: the run's settings, all shown. `device`, `created`, `corpus` and `train_bytes` head the page; each is
            looked for at any depth and may be text, a number or a mapping with a `name`.
        path: the HTML file.
        references: models to mark by name: some of `evaluations` (see `starts_among`), or known ones from elsewhere.
        speed: the time the run searched by.
        study: the Optuna study, for its parameters' distributions.
    """
    front = front_of(evaluations, speed)
    figures = front_figures(evaluations, speed, references)
    shares = importances(evaluations, speed, study)
    design = design_figure(evaluations, speed)
    first = OBJECTIVE_AXIS[speed] if OBJECTIVE_AXIS[speed] in figures else next(iter(figures), "")
    drawn: dict[str, Any] = {"front": figures, "first": first, "design": design}
    drawn["importance"] = None if shares is None else importance_figure(shares)
    page = Template(PAGE).substitute(
        title=html.escape(run_title),
        headline=_headline(manifest, evaluations, front),
        findings="".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(evaluations, speed)),
        chosen=_chosen(front, speed),
        buttons=_buttons(figures, first),
        front_note=_front_note(figures),
        table=_front_table(front, speed),
        breakdowns=_breakdowns(front, speed, manifest),
        design_note=_note(
            "One line per complete candidate, dark where bits per byte are few. Drag along an axis to pick out some."
            if design
            else "Too few candidates have completed to compare their designs."
        ),
        importance_note="" if shares else _note(_no_importance(evaluations)),
        unfinished=_unfinished(evaluations),
        stages=_stages(evaluations),
        settings=_settings(manifest),
        figures=_script_json(drawn),
        plotly=_plotly() if figures else "",
    )
    return write_whole(path, page)


def starts_among(evaluations: Sequence[Evaluation], space: "Space") -> list[Reference]:
    """The plain models that the space begins with, of which the trial is complete, to mark among the candidates."""
    return [
        Reference(name=f"plain, {format_count(e.params)}", evaluation=e)
        for e in evaluations
        if e.state == "complete" and e.params_drawn and _without_weights(e) == space.start(e.trial)
    ]


def _without_weights(evaluation: Evaluation) -> dict[str, Any]:
    """The parameters drawn of the space alone."""
    return {name: value for name, value in evaluation.params_drawn.items() if name != WEIGHTS}


def _plotly() -> str:
    # Here and not at the top: only a page with charts needs it, and it is slow to import.
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _script_json(drawn: Mapping[str, Figure]) -> str:
    """JSON that can stand inside a script element: without `<` no text in it can end the element."""
    return json.dumps(drawn, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


# --- sections -----------------------------------------------------------------------------


def _headline(manifest: Mapping[str, Any], evaluations: Sequence[Evaluation], front: Sequence[Evaluation]) -> str:
    done = sum(e.state == "complete" for e in evaluations)
    budget = _find(manifest, "train_bytes")
    items = [
        ("Device", _name(_find(manifest, "device"))),
        ("Date", _name(_find(manifest, "created"))),
        ("Corpus", _name(_find(manifest, "corpus"))),
        ("Training text", format_bytes(budget) if isinstance(budget, int | float) and not isinstance(budget, bool) else _name(budget)),
        ("Weights", "" if (weights := _name(_find(manifest, "weights"))) == "fp32" else weights.replace(",", ", ")),
        ("Trials", f"{done} of {len(evaluations)} complete"),
        ("Front", f"{len(front)} {'model' if len(front) == 1 else 'models'}"),
    ]
    return "".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in items if value)


def _find(manifest: object, key: str) -> Any:
    """The value under `key`, the shallowest there is."""
    level = [manifest]
    while level:
        for mapping in level:
            if isinstance(mapping, Mapping) and mapping.get(key) is not None:
                return mapping[key]
        level = [v for m in level if isinstance(m, Mapping) for v in m.values()]
    return None


def _name(value: object) -> str:
    if isinstance(value, Mapping):
        return _name(value.get("name"))
    return "" if value is None else str(value)


def _chosen(front: Sequence[Evaluation], speed: Speed) -> str:
    best = choose(front, speed)
    if best is None:
        return _note("No trial has completed yet, so there is no model to choose.")
    words = html.escape(describe_trial(best)) if best.config is not None else "architecture unknown"
    figures = [
        (format_bpb(best.val_bpb, best.val_bpb_stderr), "bits per byte"),
        (format_rate(1 / best.s_per_byte if best.s_per_byte else None), "characters/s"),
        (format_ms(best.decode_s_per_token), "ms/token"),
        (format_s(best.request_s), "a request"),
        (format_count(best.params), "parameters"),
        (format_bytes(best.peak_bytes), "peak memory"),
    ]
    tiles = "".join(f"<div><b>{html.escape(value)}</b><span>{label}</span></div>" for value, label in figures)
    heading = f'<p class="choice"><span class="star">★</span> Default choice: trial {best.trial}</p>'
    return f'{heading}<p>{words}</p><div class="tiles">{tiles}</div>'


def _buttons(figures: Mapping[str, Figure], first: str) -> str:
    shown = [(axis, str(axis.key == first).lower()) for axis in AXES if axis.key in figures]
    return "".join(
        f'<button type="button" data-axis="{axis.key}" aria-pressed="{pressed}">{axis.label}</button>' for axis, pressed in shown
    )


def _front_note(figures: Mapping[str, Figure]) -> str:
    return "" if figures else _note("Nothing to draw yet: no trial has both bits per byte and a time.")


_COLUMNS = ("trial", "architecture", "parameters", "weights", "ms/token", "request", "characters/s", "peak", "bits per byte")


def _front_table(front: Sequence[Evaluation], speed: Speed) -> str:
    if not front:
        return _note("The front is empty.")
    best = choose(front, speed)
    rows = []
    for e in front:
        cells = [
            f"{e.trial}{' ★' if e is best else ''}",
            describe_config(e.config) if e.config is not None else "–",
            format_count(e.params),
            e.weights,
            format_ms(e.decode_s_per_token),
            format_s(e.request_s),
            format_rate(1 / e.s_per_byte if e.s_per_byte else None),
            format_bytes(e.peak_bytes),
            format_bpb(e.val_bpb, e.val_bpb_stderr),
        ]
        rows.append((cells, "best" if e is best else ""))
    keep = [i for i, name in enumerate(_COLUMNS) if name != "weights" or any(e.names_weights for e in front)]
    return _table([_COLUMNS[i] for i in keep], [([cells[i] for i in keep], kind) for cells, kind in rows], wide=(1,))


def _breakdowns(front: Sequence[Evaluation], speed: Speed, manifest: Mapping[str, Any]) -> str:
    """Each model of the front taken apart, the default choice unfolded."""
    lengths = {name: value for name in ("prompt_bytes", "generate_bytes") if (value := _find(manifest, name))}
    ceilings = {name: _find(manifest, name) or 0.0 for name in ("flops_per_s", "read_bytes_per_s")}
    best = choose(front, speed)
    parts = []
    for e in front:
        phases = trial_profiles(e, Workload(**lengths))
        if not phases or e.config is None:
            continue
        summary = f"trial {e.trial}{' ★' if e is best else ''}: {html.escape(describe_trial(e))}"
        tables = "".join(
            f"<h3>{phase}</h3>{_table(COLUMNS, [(row, '') for row in breakdown_rows(profile, **ceilings)], wide=())}"
            for phase, profile in phases.items()
        )
        parts.append(f"<details{' open' if e is best else ''}><summary>{summary}</summary>{tables}</details>")
    return "".join(parts) or _note("Nothing is known: no model of the front was measured on a device that can tell.")


def _table(columns: Sequence[str], rows: Sequence[tuple[Sequence[str], str]], wide: Sequence[int]) -> str:
    """An HTML table; the columns `wide` share the room, the others keep to one line."""

    def row(tag: str, cells: Sequence[str]) -> str:
        room = ' class="wide"'
        return "".join(f"<{tag}{room if i in wide else ''}>{html.escape(cell)}</{tag}>" for i, cell in enumerate(cells))

    head = row("th", columns)
    body = "".join(f'<tr class="{kind}">{row("td", cells)}</tr>' for cells, kind in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _no_importance(evaluations: Sequence[Evaluation]) -> str:
    done = sum(e.state == "complete" and e.duplicate_of is None for e in evaluations)
    if done < FEWEST_TRIALS:
        return f"Importance needs {FEWEST_TRIALS} different complete trials; there are {done}."
    return "No drawn parameter is known to vary among the complete trials, so none can be called important."


def _unfinished(evaluations: Sequence[Evaluation]) -> str:
    rest = sorted((e for e in evaluations if e.state != "complete"), key=lambda e: e.trial)
    if not rest:
        return _note("Every trial completed." if evaluations else "No trial has been made yet.")
    rows = [([str(e.trial), e.state, e.reason or "–", format_count(e.params), describe_trial(e)], "") for e in rest[:_MOST_LISTED]]
    table = _table(("trial", "state", "reason", "parameters", "architecture"), rows, wide=(2, 4))
    return table + (_note(f"… and {len(rest) - _MOST_LISTED} more.") if len(rest) > _MOST_LISTED else "")


def _stages(evaluations: Sequence[Evaluation]) -> str:
    totals: dict[str, float] = dict.fromkeys(_STAGES, 0.0)
    for e in evaluations:
        for stage, seconds in e.stage_s.items():
            totals[stage] = totals.get(stage, 0.0) + (seconds or 0.0)
    whole = sum(totals.values())
    if whole <= 0:
        return _note("No time has been recorded.")
    bars = "".join(
        f'<div class="stage"><span>{html.escape(stage)}</span><i style="width:{100 * seconds / whole:.1f}%"></i>'
        f"<b>{f'{seconds / 60:.1f} min' if seconds >= 3 else format_s(seconds)}</b></div>"
        for stage, seconds in totals.items()
        if seconds > 0
    )
    return f'<div class="stages">{bars}</div>' + _note(f"{whole / 60:.1f} minutes in all, over {len(evaluations)} trials.")


def _settings(manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return _note("No settings were recorded.")
    rows = []
    for key, value in manifest.items():
        if isinstance(value, Mapping | list | tuple):
            text = html.escape(json.dumps(value, indent=1, default=str, ensure_ascii=False))
            count = f"{len(value)} {'entry' if len(value) == 1 else 'entries'}"
            shown = f"<details><summary>{count}</summary><pre>{text}</pre></details>"
        else:
            shown = html.escape(str(value))
        rows.append(f"<div><dt>{html.escape(str(key))}</dt><dd>{shown}</dd></div>")
    return f'<dl class="settings">{"".join(rows)}</dl>'
