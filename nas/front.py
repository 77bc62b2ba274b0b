"""Which candidates nothing beats: the Pareto front, its volume, the one to take by default, and all that as JSON.

In a search over several devices there is a front on each, of its trials as that device saw them (`on_each`), and the joint
front, of the loss and the time on every device. A model on one device's front is on the joint front, too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nas.describe import objective_words
from nas.errors import InvalidRun
from nas.evaluation import Evaluation, Speed
from nas.run import Run
from search_spaces.counting import params

if TYPE_CHECKING:
    from nas.noise import Noise

FRONT_FIELDS = (
    "trial",
    "state",
    "config",
    "weights",
    "bytes_per_token",
    "params",
    "flops_per_token",
    "weight_bytes",
    "kv_bytes_per_token",
    "peak_bytes",
    "prefill_s",
    "decode_s_per_token",
    "request_s",
    "bytes_per_s",
    "val_bpb",
    "val_bpb_stderr",
)
"""What front.json and `--json` say of each model, beside its loss and its twin; raw records are in trials/."""

_FIGURES = ("peak_bytes", "prefill_s", "decode_s_per_token", "request_s", "bytes_per_s")
"""What they say of it on each device, where there are several."""


def pareto_front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices of the points that no other point dominates, in ascending order; all coordinates are minimised.

    A point dominates another if it is nowhere worse and somewhere better. Of equal points only the first is kept;
    a point with a coordinate that is not finite is left out and dominates nothing.

    Raises:
        ValueError: if points differ in their number of coordinates.
    """
    if len({len(p) for p in points}) > 1:
        raise ValueError(f"points have {sorted({len(p) for p in points})} coordinates; give all of them the same number")
    finite = [i for i, p in enumerate(points) if all(math.isfinite(v) for v in p)]
    # In lexicographic order a point can only be dominated by an earlier one, so the kept ones suffice to compare with.
    kept: list[int] = []
    for i in sorted(finite, key=lambda j: (tuple(points[j]), j)):
        if not any(all(a <= b for a, b in zip(points[k], points[i], strict=True)) for k in kept):
            kept.append(i)
    return sorted(kept)


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area that the points dominate below `reference`, both coordinates minimised.

    The sum over the front, by ascending first coordinate, of (r0 - x) * (previous y - y), where y starts at r1
    (Zitzler & Thiele 1999, "size of the space covered"). Points not better than the reference in both coordinates add 0.

    Raises:
        ValueError: if the reference is not finite.
    """
    if not all(math.isfinite(r) for r in reference):
        raise ValueError(f"reference={reference} is not finite; give a point worse than those of interest")
    inside = [p for p in points if p[0] < reference[0] and p[1] < reference[1]]
    area, ceiling = 0.0, reference[1]
    for i in sorted(pareto_front(inside), key=lambda j: inside[j]):
        x, y = inside[i]
        area += (reference[0] - x) * (ceiling - y)
        ceiling = y
    return area


def front_of(evaluations: Sequence[Evaluation], speed: Speed = "decode") -> list[Evaluation]:
    """The complete evaluations on the front of (loss, seconds on each device), fastest first (see `mean_seconds`)."""
    ranked = [e for e in evaluations if e.is_ranked(speed)]
    indices = pareto_front([e.objectives(speed) for e in ranked])
    return sorted((ranked[i] for i in indices), key=lambda e: (mean_seconds(e, speed), e.trial))


def mean_seconds(evaluation: Evaluation, speed: Speed) -> float:
    """The geometric mean of the seconds on all devices: a device that is slow in everything does not decide alone."""
    seconds = evaluation.objectives(speed)[1:]
    return seconds[0] if len(seconds) == 1 else math.exp(math.fsum(map(math.log, seconds)) / len(seconds))


def on_each(evaluations: Sequence[Evaluation], devices: Sequence[str]) -> dict[str, list[Evaluation]]:
    """The trials as each device alone saw them, by its name; `devices` are those of the run in the order of its manifest."""
    return {device: [e.on(None if i == 0 else device) for e in evaluations] for i, device in enumerate(devices)}


def on_fronts(run: Run, done: Sequence[Evaluation], speed: Speed) -> list[Evaluation]:
    """The trials on the front of any device, or on the joint one: those whose weights are kept."""
    fronts = [front_of(done, speed)]
    if len(run.devices) > 1:
        fronts += [front_of(seen, speed) for seen in on_each(done, run.devices).values()]
    kept = {e.trial for front in fronts for e in front}
    return [e for e in done if e.trial in kept]


def choose(front: Sequence[Evaluation], speed: Speed = "decode") -> Evaluation | None:
    """The model to take by default: the knee of the front; None if it is empty.

    Log seconds (their mean over the devices) and the loss are each scaled to 0..1 between the front's ends; the knee is
    the point furthest below the line that joins the ends, that is, the largest 1 - x - y (Das 1999, the "bulge" of a
    front). Of equal ones the faster is taken. If no point lies below the line (always so with two), it is the one with the
    smallest loss.
    """
    if not front:
        return None
    ordered = sorted(front, key=lambda e: (mean_seconds(e, speed), e.trial))
    points = [(math.log(mean_seconds(e, speed)), e.objectives(speed)[0]) for e in ordered]
    x0, x1 = points[0][0], points[-1][0]
    y1, y0 = min(y for _, y in points), max(y for _, y in points)
    best, best_depth = ordered[min(range(len(points)), key=lambda i: points[i][1])], 1e-9
    if x1 > x0 and y0 > y1:
        for evaluation, (x, y) in zip(ordered, points, strict=True):
            depth = 1.0 - (x - x0) / (x1 - x0) - (y - y1) / (y0 - y1)
            if depth > best_depth:
                best, best_depth = evaluation, depth
    return best


def speed_of(run: Run) -> Speed:
    """The time a run trades against accuracy.

    Raises:
        InvalidRun: if its manifest does not say.
    """
    speed = run.manifest["settings"].get("speed") if isinstance(run.manifest["settings"], dict) else None
    if speed not in ("prefill", "decode", "request"):
        raise InvalidRun(f"{run.path / 'manifest.json'} is damaged: speed={speed!r}; restore it, or give another --run")
    known: Speed = speed
    return known


def front_json(
    evaluations: Sequence[Evaluation],
    speed: Speed,
    devices: Sequence[str] = (),
    references: Mapping[str, Evaluation] | None = None,
    noise: "Noise | None" = None,
) -> dict[str, Any]:
    """The front of these trials as plain JSON values: what was traded, the default choice, the models fastest first.

    With several devices it is the joint front; `devices` has for each its own default choice and the trials on its own
    front, and every model has its figures on each. Models measured beside the candidates are under `references`. `loss` is
    what was minimised, named in `objective`. With the `noise` of a training known, every model says whether a neighbour in
    loss is too close to be told apart from it.
    """
    front = front_of(evaluations, speed)
    chosen = choose(front, speed)
    values: dict[str, Any] = {"speed": speed, "objective": objective_words(evaluations), "chosen": None if chosen is None else chosen.trial}
    values["noise"] = None if noise is None else noise.to_dict()
    values["front"] = [_model_json(e, devices) for e in front]
    if noise is not None:
        unresolved = noise.unresolved(front)
        values["front"] = [{**model, "order_within_noise": model["trial"] in unresolved} for model in values["front"]]
    if len(devices) > 1:
        values["devices"] = {}
        for device, seen in on_each(evaluations, devices).items():
            there = front_of(seen, speed)
            best = choose(there, speed)
            values["devices"][device] = {"chosen": None if best is None else best.trial, "front": [e.trial for e in there]}
    if references:
        values["references"] = [
            {"name": name, "reason": e.reason, **{key: v for key, v in _model_json(e, devices).items() if key != "trial"}}
            for name, e in references.items()
        ]
    return values


def _model_json(evaluation: Evaluation, devices: Sequence[str]) -> dict[str, Any]:
    values = evaluation.to_dict()
    shown = {name: values[name] for name in FRONT_FIELDS}
    shown |= {"loss": evaluation.loss, "loss_stderr": evaluation.loss_stderr, "task_accuracy": (evaluation.task or {}).get("accuracy")}
    twin = evaluation.twin
    shown["twin"] = None if twin is None else {"params": params(twin), "config": twin.to_dict()}
    if len(devices) > 1:
        seen = {device: there[0] for device, there in on_each([evaluation], devices).items()}
        shown["devices"] = {device: {name: getattr(e, name) for name in _FIGURES} for device, e in seen.items()}
    return shown
