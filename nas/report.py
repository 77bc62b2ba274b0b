"""The report of a run: one HTML page that holds everything it needs and opens without a network."""

import html
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from nas.across import CHOSEN, ON_FRONT, across
from nas.breakdown import COLUMNS, breakdown_rows, trial_profiles
from nas.charts import AXES, OBJECTIVE_AXIS, Figure, Reference, design_figure, front_figures, importance_figure
from nas.describe import (
    describe_config,
    describe_trial,
    format_bpb,
    format_bytes,
    format_count,
    format_loss,
    format_ms,
    format_rate,
    format_s,
    objective_words,
    significant,
    stopped_words,
    twin_words,
)
from nas.evaluation import WEIGHTS, Evaluation, Speed, write_whole
from nas.findings import findings
from nas.front import choose, front_of, on_each
from nas.importance import FEWEST_TRIALS, importances
from nas.noise import Noise
from nas.report_page import PAGE
from search_spaces.workload import Workload

if TYPE_CHECKING:
    import optuna

    from search_spaces.space import Space

__all__ = ["Reference", "starts_among", "write_report"]

_STAGES = ("count", "tokenizer", "compile", "measure", "train", "repeat")
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
    noise: Noise | None = None,
) -> Path:
    """Writes the page whole and returns its path.

    Args:
        run_title: the page's heading.
        evaluations: every trial, in any state; none at all is fine.
        manifest: the run's settings, all shown. `device`, `created`, `corpus` and `budget_bytes` head the page; each is
            looked for at any depth and may be text, a number or a mapping with a `name`. With several `targets`, there is
            a front of each.
        path: the HTML file.
        references: models to mark by name: some of `evaluations` (see `starts_among`), or known ones from elsewhere.
        speed: the time the run searched by.
        study: the Optuna study, for its parameters' distributions.
        noise: what one training of a model differs by from another, if it is known.
    """
    specs = [spec for spec in manifest.get("targets", ()) if isinstance(spec, Mapping)]
    devices = [_name(spec) for spec in specs] if len(specs) > 1 else []
    seen = on_each(evaluations, devices or [""])
    of_device = {device: [r.on(device if i else None) for r in references] for i, device in enumerate(seen)}
    front = front_of(evaluations, speed)
    figures = [front_figures(there, speed, of_device[device], noise) for device, there in seen.items()]
    first = OBJECTIVE_AXIS[speed] if any(OBJECTIVE_AXIS[speed] in drawn for drawn in figures) else next((k for f in figures for k in f), "")
    shares = importances(evaluations, speed, study)
    design = design_figure(evaluations, speed, devices)
    drawn: dict[str, Any] = {"front": figures[0], "others": figures[1:], "first": first, "design": design}
    drawn["importance"] = None if shares is None else importance_figure(shares, devices, objective=objective_words(evaluations))
    page = Template(PAGE).substitute(
        title=html.escape(run_title),
        headline=_headline(manifest, devices, evaluations, front),
        findings="".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(evaluations, speed, devices, noise)),
        chosen=_chosen(evaluations, speed, devices),
        buttons=_buttons(figures, first),
        front_note=_front_note(figures, evaluations, noise),
        charts="".join(f'{_device_heading(device)}<div id="front{i or ""}"></div>' for i, device in enumerate(seen)),
        table=_fronts(evaluations, speed, devices, references, noise),
        breakdowns="".join(
            _device_heading(device) + _breakdowns(front_of(there, speed), speed, manifest, specs[i] if specs else manifest)
            for i, (device, there) in enumerate(seen.items())
        ),
        design_note=note(
            "One line per complete candidate, dark where the loss is small. Drag along an axis to pick out some."
            if design
            else "Too few candidates have completed to compare their designs."
        ),
        importance_note="" if shares else note(_no_importance(evaluations)),
        unfinished=_unfinished(evaluations),
        stages=_stages(evaluations),
        settings=settings_list(manifest),
        figures=script_json(drawn),
        plotly=plotly_js() if first else "",
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


def plotly_js() -> str:
    # Here and not at the top: only a page with charts needs it, and it is slow to import.
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def script_json(drawn: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element: without `<` no text in it can end the element."""
    return json.dumps(drawn, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


# --- sections -----------------------------------------------------------------------------


def _device_heading(device: str) -> str:
    """The name of one of several devices, above what is of it alone."""
    return f"<h3>{html.escape(device)}</h3>" if device else ""


def _headline(manifest: Mapping[str, Any], devices: Sequence[str], evaluations: Sequence[Evaluation], front: Sequence[Evaluation]) -> str:
    done, stopped = (sum(e.state == state for e in evaluations) for state in ("complete", "stopped"))
    budget = _find(manifest, "budget_bytes")
    items = [
        ("Devices", ", ".join(devices)) if devices else ("Device", _name(_find(manifest, "device"))),
        ("Date", _name(_find(manifest, "created"))),
        ("Corpus", _name(_find(manifest, "corpus"))),
        ("Training text", format_bytes(budget) if isinstance(budget, int | float) and not isinstance(budget, bool) else _name(budget)),
        ("Weights", "" if (weights := _name(_find(manifest, "weights"))) == "fp32" else weights.replace(",", ", ")),
        ("Accuracy", "" if (words := objective_words(evaluations)) == "bits per byte" else words),
        ("Trials", f"{done} of {len(evaluations)} complete" + (f", {stopped} stopped early" if stopped else "")),
        ("Joint front" if devices else "Front", f"{len(front)} {'model' if len(front) == 1 else 'models'}"),
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


def _chosen(evaluations: Sequence[Evaluation], speed: Speed, devices: Sequence[str]) -> str:
    best = choose(front_of(evaluations, speed), speed)
    if best is None:
        return note("No trial has completed yet, so there is no model to choose.")
    words = html.escape(describe_trial(best)) if best.config is not None else "architecture unknown"
    seen = on_each([best], devices or [""])
    figures = [(format_bpb(best.val_bpb, best.val_bpb_stderr), "bits per byte")]
    if best.task is not None:
        figures.insert(0, (format_loss(best), objective_words([best])))
    if twin := twin_words(best):
        figures.append((twin, "what was trained and scored"))
    for device, (e, *_) in seen.items():
        where = f" on {device}" if devices else ""
        figures += [
            (format_rate(1 / e.s_per_byte if e.s_per_byte else None), f"characters/s{where}"),
            (format_ms(e.decode_s_per_token), f"ms/token{where}"),
            (format_s(e.request_s), f"a request{where}"),
        ]
    figures += [(format_count(best.params), "parameters"), (format_bytes(_most_memory(list(seen.values()))), "peak memory")]
    tiles = "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>" for value, label in figures)
    which = "Default choice for all devices" if devices else "Default choice"
    heading = f'<p class="choice"><span class="star">★</span> {which}: trial {best.trial}</p>'
    return f'{heading}<p>{words}</p><div class="tiles">{tiles}</div>'


def _most_memory(seen: Sequence[Sequence[Evaluation]]) -> int | None:
    return max((e.peak_bytes for there in seen for e in there if e.peak_bytes is not None), default=None)


def _buttons(figures: Sequence[Mapping[str, Figure]], first: str) -> str:
    shown = [(axis, str(axis.key == first).lower()) for axis in AXES if any(axis.key in drawn for drawn in figures)]
    return "".join(
        f'<button type="button" data-axis="{axis.key}" aria-pressed="{pressed}">{axis.label}</button>' for axis, pressed in shown
    )


def _front_note(figures: Sequence[Mapping[str, Figure]], evaluations: Sequence[Evaluation], noise: Noise | None) -> str:
    """What the error bars are, and what is drawn that does not compare."""
    if not any(figures):
        return note("Nothing to draw yet: no trial has both a score and a time.")
    over = "the tasks that are scored" if any(e.task is not None and e.task.get("kind") != "text" for e in evaluations) else "held-out text"
    if noise is None:
        words = (
            f"Error bars are one standard error over {over}, the same for all candidates; how much another seed would change is not known."
        )
    else:
        words = (
            f"Error bars are the standard deviation between trainings with other seeds, {significant(noise.sigma, 2)}; the ± of the table "
            f"below is another error, that over {over}, which is the same for all candidates. Hollow marks of the front are closer to "
            f"a neighbour than {significant(noise.least_difference, 2)}, so noise may have put them in this order."
        )
    stopped = " Crosses are trials that were stopped early, at the score of less text: they do not compare with the rest."
    return note(words + (stopped if any(e.state == "stopped" for e in evaluations) else ""))


def _columns(evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    """Those of a table of models; some are shown only if a cell says something."""
    start = ("trial", "architecture", "parameters", "weights", "ms/token", "request", "characters/s", "peak")
    return (*start, objective_words(evaluations), "order", "score of")


_OPTIONAL = ("weights", "order", "score of")


def _fronts(
    evaluations: Sequence[Evaluation], speed: Speed, devices: Sequence[str], references: Sequence[Reference], noise: Noise | None
) -> str:
    """The front; of several devices first the models by what they take on each, then the front of each. Then the references."""
    known = [r for r in references if r.evaluation not in evaluations]
    if not devices:
        return _front_table(evaluations, speed, noise) + _references(known)
    found = across(evaluations, speed, devices)
    if not found.front:
        return note("The front is empty.") + _references(known)
    rows = []
    hollow = noise.unresolved(found.front) if noise is not None else frozenset()
    for e in found.front:
        is_best = found.chosen is not None and e.trial == found.chosen.trial
        start = [f"{e.trial}{' ★' if is_best else ''}", describe_trial(e), format_count(e.params)]
        end = [format_loss(e), _order_words(e, hollow), twin_words(e)]
        rows.append(([*start, *found.times[e.trial], *end], "best" if is_best else ""))
    columns = ("trial", "architecture", "parameters", *devices, objective_words(found.front), "order", "score of")
    legend = note(f"Under each device the {found.unit}; {CHOSEN} is the default choice there, {ON_FRONT} a model on its front.")
    parts = [_table(*_without_empty(columns, rows), wide=(1,)), legend]
    for i, (device, seen) in enumerate(on_each(evaluations, devices).items()):
        beside = [r.on(device if i else None) for r in known]
        inside = _front_table(seen, speed, noise) + _references(beside)
        parts.append(f"<details><summary>The front on {html.escape(device)}</summary>{inside}</details>")
    return "".join(parts)


def _front_table(evaluations: Sequence[Evaluation], speed: Speed, noise: Noise | None) -> str:
    front = front_of(evaluations, speed)
    if not front:
        return note("The front is empty.")
    best = choose(front, speed)
    hollow = noise.unresolved(front) if noise is not None else frozenset()
    rows = [(_row(e, f"{e.trial}{' ★' if e is best else ''}", hollow), "best" if e is best else "") for e in front]
    return _table(*_without_empty(_columns(front), rows), wide=(1,))


def _without_empty(columns: Sequence[str], rows: Sequence[tuple[list[str], str]]) -> tuple[list[str], list[tuple[list[str], str]]]:
    """A table's columns and rows without those of `_OPTIONAL` in which no cell says anything."""
    keep = [i for i, name in enumerate(columns) if name not in _OPTIONAL or any(cells[i] for cells, _ in rows)]
    plain = ["fp32" if name == "weights" else "" for name in columns]
    return [columns[i] for i in keep], [([cells[i] or plain[i] for i in keep], kind) for cells, kind in rows]


def _order_words(e: Evaluation, hollow: Collection[int]) -> str:
    return "within noise" if e.trial in hollow else ""


def _row(e: Evaluation, name: str, hollow: Collection[int] = ()) -> list[str]:
    return [
        name,
        describe_config(e.config) if e.config is not None else "–",
        format_count(e.params),
        e.weights if e.names_weights else "",
        format_ms(e.decode_s_per_token),
        format_s(e.request_s),
        format_rate(1 / e.s_per_byte if e.s_per_byte else None),
        format_bytes(e.peak_bytes),
        format_loss(e),
        _order_words(e, hollow),
        twin_words(e),
    ]


def _references(references: Sequence[Reference]) -> str:
    """Models measured beside the candidates, of one device, with the reason where something is not known."""
    if not references:
        return ""
    rows = [([*_row(r.evaluation, r.name), r.evaluation.reason or ""], "") for r in references]
    columns, rows = _without_empty(("model", *_columns([r.evaluation for r in references])[1:], "note"), rows)
    return "<h3>References, measured beside</h3>" + _table(columns, rows, wide=(1, len(columns) - 1))


def _breakdowns(front: Sequence[Evaluation], speed: Speed, manifest: Mapping[str, Any], device: Mapping[str, Any]) -> str:
    """Each model of a device's front taken apart, the default choice unfolded."""
    lengths = {name: value for name in ("prompt_bytes", "generate_bytes") if (value := _find(manifest, name))}
    ceilings = {name: _find(device, name) or 0.0 for name in ("flops_per_s", "read_bytes_per_s")}
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
    return "".join(parts) or note("Nothing is known: no model of the front was measured on a device that can tell.")


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
        return note("Every trial completed." if evaluations else "No trial has been made yet.")
    rows = [
        ([str(e.trial), stopped_words(e) or e.state, e.reason or "–", format_count(e.params), describe_trial(e)], "")
        for e in rest[:_MOST_LISTED]
    ]
    table = _table(("trial", "state", "reason", "parameters", "architecture"), rows, wide=(2, 4))
    return table + (note(f"… and {len(rest) - _MOST_LISTED} more.") if len(rest) > _MOST_LISTED else "")


def _stages(evaluations: Sequence[Evaluation]) -> str:
    totals: dict[str, float] = dict.fromkeys(_STAGES, 0.0)
    for e in evaluations:
        for stage, seconds in e.stage_s.items():
            totals[stage] = totals.get(stage, 0.0) + (seconds or 0.0)
    whole = sum(totals.values())
    if whole <= 0:
        return note("No time has been recorded.")
    bars = "".join(
        f'<div class="stage"><span>{html.escape(stage)}</span><i style="width:{100 * seconds / whole:.1f}%"></i>'
        f"<b>{f'{seconds / 60:.1f} min' if seconds >= 3 else format_s(seconds)}</b></div>"
        for stage, seconds in totals.items()
        if seconds > 0
    )
    return f'<div class="stages">{bars}</div>' + note(f"{whole / 60:.1f} minutes in all, over {len(evaluations)} trials.")


def settings_list(manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return note("No settings were recorded.")
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
